"""The networks in training: quantisation, its gradients and losses, the discriminator, codes brought back to life."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from st_ar.config import AdversaryConfig, VQConfig
from st_ar.tokenizer.vq import VQTokenizer
from st_ar.training.vqgan import VQGAN, Discriminator, hinge_loss, revive

TINY = VQConfig(channels=8, multipliers=(1, 2), z_channels=8, codebook_size=16, codebook_dim=4, residual_blocks=1)


def network(seed: int = 0) -> VQGAN:
    """With codes of many lengths, none of which is 1: only their directions count."""
    torch.manual_seed(seed)
    made = VQGAN(TINY)
    with torch.no_grad():
        made.codebook *= torch.linspace(0.3, 3, 16)[:, None]
    return made


def pictures(count: int = 3, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# The network


def nearest_by_hand(z: Tensor, codebook: Tensor) -> Tensor:
    """Codes of features [B, d, h, w]: of each place the unit code at the smallest Euclidean distance, one by one."""
    unit = [code / code.norm() for code in codebook.detach()]
    codes = torch.zeros(len(z), *z.shape[2:], dtype=torch.int64)
    for image in range(len(z)):
        for row in range(z.shape[2]):
            for column in range(z.shape[3]):
                here = z[image, :, row, column]
                codes[image, row, column] = int(torch.stack([(here - code).norm() for code in unit]).argmin())
    return codes


def test_forward_is_what_a_plain_loop_gives() -> None:
    gan, images = network(), pictures()
    made = gan(images)
    with torch.no_grad():
        z = gan.reader(images)
        codes = nearest_by_hand(z, gan.codebook)
        q = torch.zeros_like(z)
        for image, row, column in torch.cartesian_prod(*map(torch.arange, codes.shape)):
            code = gan.codebook[codes[image, row, column]]
            q[image, :, row, column] = code / code.norm()
        painted = gan.painter(q)
    assert torch.equal(made.codes, codes)
    assert len(codes.unique()) > 3
    torch.testing.assert_close(made.images, painted, rtol=0, atol=1e-5)
    assert made.codebook_loss.item() == pytest.approx((q - z).square().mean().item(), rel=1e-5)
    assert made.commitment_loss.item() == pytest.approx((q - z).square().mean().item(), rel=1e-5)
    assert torch.equal(
        made.features, torch.stack([z[b, :, i, j] for b, i, j in torch.cartesian_prod(*map(torch.arange, codes.shape))])
    )
    assert not made.features.requires_grad
    torch.testing.assert_close(made.features.norm(dim=1), torch.ones(48))


def gradients(gan: VQGAN, loss: Callable[[VQGAN], Tensor]) -> dict[str, Tensor]:
    """Of each parameter that the loss reaches."""
    gan.zero_grad()
    loss(gan).backward()
    return {name: p.grad.clone() for name, p in gan.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_reader_gets_the_gradient_at_the_codes() -> None:
    gan, images = network(), pictures()
    found = gradients(gan, lambda g: F.mse_loss(g(images).images, images))
    with torch.no_grad():
        codes = gan(images).codes
    q = F.normalize(gan.codebook.detach())[codes].permute(0, 3, 1, 2).requires_grad_()
    gan.zero_grad()
    F.mse_loss(gan.painter(q), images).backward()
    assert q.grad is not None
    painter = {f"painter.{name}": p.grad.clone() for name, p in gan.painter.named_parameters() if p.grad is not None}
    gan.zero_grad()
    gan.reader(images).backward(q.grad)
    reader = {f"reader.{name}": p.grad.clone() for name, p in gan.reader.named_parameters() if p.grad is not None}
    assert "codebook" not in found  # the likeness does not move the codes
    assert any(name.startswith("reader.encoder") for name in found)
    for name, expected in (painter | reader).items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(expected)), expected, rtol=1e-4, atol=1e-6)


def test_the_codebook_loss_moves_the_codes_in_use_alone() -> None:
    gan, images = network(), pictures()
    found = gradients(gan, lambda g: g(images).codebook_loss)
    assert set(found) == {"codebook"}
    with torch.no_grad():
        made, z = gan(images), gan.reader(images)
    used = torch.zeros(16, dtype=torch.bool)
    used[made.codes.flatten()] = True
    assert torch.equal(found["codebook"].abs().sum(dim=1) > 0, used)
    codebook = gan.codebook.detach().clone().requires_grad_()
    q = (codebook / codebook.norm(dim=1, keepdim=True))[made.codes].permute(0, 3, 1, 2)
    ((q - z) ** 2).mean().backward()
    torch.testing.assert_close(found["codebook"], codebook.grad)


def test_the_commitment_loss_moves_the_reader_alone() -> None:
    gan, images = network(), pictures()
    found = gradients(gan, lambda g: g(images).commitment_loss)
    assert found
    assert all(name.startswith("reader.") for name in found)
    with torch.no_grad():
        made = gan(images)
    q = F.normalize(gan.codebook.detach())[made.codes].permute(0, 3, 1, 2)
    expected = gradients(gan, lambda g: ((q - g.reader(images)) ** 2).mean())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_the_losses_pull_features_and_codes_together() -> None:
    gan, images = network(), pictures()
    optimizer = torch.optim.Adam(gan.parameters(), lr=1e-3)
    before = gan(images).codebook_loss.item()
    for _ in range(30):
        made = gan(images)
        optimizer.zero_grad()
        (made.codebook_loss + 0.25 * made.commitment_loss).backward()
        optimizer.step()
    assert gan(images).codebook_loss.item() < 0.5 * before


def test_the_weights_are_a_tokenizers_with_the_same_codes_and_reconstructions() -> None:
    gan, images = network(), pictures()
    tokenizer = VQTokenizer(TINY, gan.tensors())
    with torch.no_grad():
        made = gan(images)
    assert torch.equal(tokenizer.encode(images), made.codes)
    torch.testing.assert_close(tokenizer.decode(made.codes), made.images, rtol=0, atol=1e-5)
    assert {name.split(".")[0] for name in gan.tensors()} == {
        *("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
    }
    assert not any(tensor.requires_grad for tensor in gan.tensors().values())


def test_codes_begin_at_length_one() -> None:
    torch.manual_seed(0)
    torch.testing.assert_close(VQGAN(TINY).codebook.norm(dim=1), torch.ones(16))


def test_an_image_is_reconstructed_alike_alone_and_in_a_batch() -> None:
    gan, images = network(), pictures()
    with torch.no_grad():
        torch.testing.assert_close(gan(images[1:2]).images, gan(images).images[1:2], rtol=0, atol=1e-5)


# The discriminator


@given(real=st.lists(st.floats(-3, 3), min_size=1, max_size=6), fake=st.lists(st.floats(-3, 3), min_size=1, max_size=6))
def test_hinge_loss_against_its_formula(real: list[float], fake: list[float]) -> None:
    expected = sum(max(0.0, 1 - r) for r in real) / len(real) + sum(max(0.0, 1 + f) for f in fake) / len(fake)
    assert hinge_loss(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(expected / 2, abs=1e-6)


def test_hinge_loss_of_sure_and_of_mistaken_verdicts() -> None:
    ones = torch.ones(2, 1, 3, 3)
    assert hinge_loss(ones * 1.5, -ones).item() == 0
    assert hinge_loss(ones * 0, ones * 0).item() == 1
    assert hinge_loss(-ones, ones * 2).item() == 2.5  # (2 + 3) / 2


def discriminator(layers: int) -> Discriminator:
    """Its last layer's zeros would hide what a verdict depends on."""
    torch.manual_seed(0)
    made = Discriminator(AdversaryConfig(channels=4, layers=layers))
    for parameter in made.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.1)
    return made


@pytest.mark.parametrize(("layers", "size", "verdicts"), [(1, 16, 6), (2, 32, 6), (3, 64, 6), (3, 256, 30), (2, 12, 1)])
def test_there_is_a_verdict_for_every_patch(layers: int, size: int, verdicts: int) -> None:
    with torch.device("meta"):
        judge = Discriminator(AdversaryConfig(layers=layers))
        assert judge(torch.empty(2, 3, size, size)).shape == (2, 1, verdicts, verdicts)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_verdict_sees_as_many_pixels_as_promised(layers: int) -> None:
    # Group norms see the whole image: without them a verdict's gradient is where its convolutions look.
    judge = discriminator(layers)
    plain = nn.Sequential(*(layer for layer in judge.layers if not isinstance(layer, nn.GroupNorm)))
    seen = 9 * 2**layers - 2
    size = 2**layers * (2 * (seen // 2**layers) // 2 + 6)
    images = torch.randn(1, 3, size, size, requires_grad=True)
    verdicts = plain(images)
    middle = verdicts.shape[2] // 2
    verdicts[0, 0, middle, middle].backward()
    assert images.grad is not None
    touched = images.grad[0].abs().sum(dim=0) > 0
    rows, columns = touched.any(dim=1).nonzero(), touched.any(dim=0).nonzero()
    assert (int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1) == (seen, seen)


def test_a_verdict_does_not_depend_on_the_batch() -> None:
    judge, images = discriminator(2), pictures(4, 32)
    with torch.no_grad():
        together, alone = judge(images), torch.cat([judge(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3  # it does depend on the image


def test_the_convolutions_begin_small() -> None:
    torch.manual_seed(0)
    judge = Discriminator(AdversaryConfig(channels=16, layers=2))
    for layer in judge.layers:
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 1000:
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)


# Codes brought back to life

DEAD = [1, 4, 5, 11]


def revived(seed: int = 0) -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer, Tensor, tuple[Tensor, ...]]:
    """A codebook after two optimizer steps, of which some codes were revived; and what was there before."""
    torch.manual_seed(0)
    codebook, averaged = (nn.Parameter(torch.randn(16, 4)) for _ in range(2))
    optimizer = torch.optim.AdamW([codebook], fused=True)
    for _ in range(2):
        codebook.grad = torch.randn(16, 4)
        optimizer.step()
    state = optimizer.state[codebook]
    before = tuple(t.detach().clone() for t in (codebook, averaged, state["exp_avg"], state["exp_avg_sq"]))
    features = F.normalize(torch.randn(20, 4), dim=-1)
    dead = torch.zeros(16, dtype=torch.bool)
    dead[DEAD] = True
    generator = torch.Generator().manual_seed(seed)
    assert revive(codebook, averaged, dead, features, optimizer, generator) == len(DEAD)
    return codebook, averaged, optimizer, features, before


def test_dead_codes_become_features_in_both_codebooks_and_the_others_stay() -> None:
    codebook, averaged, _, features, before = revived()
    for row in range(16):
        if row in DEAD:
            assert (features == codebook[row]).all(dim=1).any()
            assert torch.equal(averaged[row], codebook[row])
        else:
            assert torch.equal(codebook[row], before[0][row])
            assert torch.equal(averaged[row], before[1][row])


def test_moments_of_revived_codes_are_forgotten_and_others_kept() -> None:
    codebook, _, optimizer, _, before = revived()
    state = optimizer.state[codebook]
    for name, old in (("exp_avg", before[2]), ("exp_avg_sq", before[3])):
        kept = [row for row in range(16) if row not in DEAD]
        assert not state[name][DEAD].any()
        assert torch.equal(state[name][kept], old[kept])
        assert old[DEAD].abs().min() > 0
    assert state["step"].item() == 2


def test_the_generator_alone_decides_what_is_drawn() -> None:
    first, again, other = revived(0)[0], revived(0)[0], revived(1)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_before_the_first_optimizer_step_there_are_no_moments_to_forget() -> None:
    codebook, averaged = (nn.Parameter(torch.zeros(4, 2)) for _ in range(2))
    features = torch.tensor([[0.6, 0.8]])
    optimizer = torch.optim.AdamW([codebook])
    dead = torch.tensor([True, False, True, True])
    assert revive(codebook, averaged, dead, features, optimizer, torch.Generator()) == 3
    assert torch.equal(codebook.detach(), dead[:, None] * features)


def test_where_none_is_dead_nothing_happens() -> None:
    codebook = nn.Parameter(torch.randn(4, 2))
    before = copy.deepcopy(codebook)
    none = torch.zeros(4, dtype=torch.bool)
    optimizer = torch.optim.AdamW([codebook])
    assert revive(codebook, codebook, none, torch.ones(3, 2), optimizer, torch.Generator()) == 0
    assert torch.equal(codebook, before)
