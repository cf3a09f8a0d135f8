import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from st_ar.selfguided import losses
from st_ar.selfguided.losses import Reduction, linear_next_token_loss, mim_loss, next_token_loss, step_loss, view_loss
from tests.reference import equations

Contrast = Callable[..., Tensor]
REFERENCE = {step_loss: equations.step_loss, view_loss: equations.view_loss}
contrasts = pytest.mark.parametrize("loss", [step_loss, view_loss], ids=["step", "view"])


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal_images(images: int, views: int, positions: int) -> Tensor:
    """Features [B, M, K, D]: the same in all views and positions of an image, orthogonal between images."""
    return torch.eye(images, dtype=torch.float64)[:, None, None].expand(images, views, positions, images)


# Against the equations


@given(sequences=st.integers(1, 4), length=st.integers(1, 5), vocab=st.integers(1, 6), seed=st.integers(0, 1000))
def test_next_token_loss_against_the_naive_loop(sequences: int, length: int, vocab: int, seed: int) -> None:
    logits = 3 * normal(sequences, length, vocab, seed=seed)
    tokens = torch.randint(vocab, (sequences, length), generator=torch.Generator().manual_seed(seed))
    assert next_token_loss(logits, tokens).item() == pytest.approx(equations.next_token_loss(logits, tokens), abs=1e-6)


@given(
    rows=st.sampled_from([1, 7, 512, 513, 1300]),
    width=st.integers(1, 9),
    vocab=st.integers(1, 12),
    factor=st.floats(0.1, 3),
    seed=st.integers(0, 1000),
)
def test_the_loss_without_logits_is_the_loss_and_so_are_its_gradients(
    rows: int, width: int, vocab: int, factor: float, seed: int
) -> None:
    tokens = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    found, expected = ([normal(n, width, seed=seed + n).requires_grad_() for n in (rows, vocab)] for _ in range(2))
    both = linear_next_token_loss(*found, tokens), next_token_loss(torch.nn.functional.linear(*expected), tokens)
    assert both[0].item() == pytest.approx(both[1].item(), abs=1e-12)
    for loss in both:
        (factor * loss).backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_compiled_loss_is_the_same_with_the_same_gradients(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses._compiled_cross_entropy.cache_clear()
    tokens = torch.randint(40, (700,), generator=torch.Generator().manual_seed(0))
    found: list[tuple[Tensor, ...]] = []
    for compiled in (False, True):
        x, weight = (4 * normal(n, 16, seed=n).to(dtype) for n in (700, 40))
        loss = linear_next_token_loss(x.requires_grad_(), weight.requires_grad_(), tokens, compiled=compiled)
        (3 * loss).backward()
        assert x.grad is not None
        assert weight.grad is not None
        found.append((loss, x.grad, weight.grad))
    losses._compiled_cross_entropy.cache_clear()
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance / 100)


def test_the_loss_without_logits_takes_tokens_of_any_shape_and_needs_no_gradient() -> None:
    x, weight, tokens = normal(2, 3, 4, 5, seed=0), normal(6, 5, seed=1), torch.arange(24).view(2, 3, 4) % 6
    expected = next_token_loss(x @ weight.T, tokens)
    assert linear_next_token_loss(x.requires_grad_(), weight, tokens).item() == pytest.approx(expected.item())
    with torch.no_grad():
        assert linear_next_token_loss(x, weight, tokens).item() == pytest.approx(expected.item())


def test_the_loss_without_logits_multiplies_in_autocasts_type_and_sums_in_float32() -> None:
    tokens = torch.arange(1200) % 64
    x, weight = normal(1200, 16, seed=0).float(), normal(64, 16, seed=1).float()
    found, expected, exact = ([x.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_next_token_loss(*found, tokens)
        wanted = next_token_loss(torch.nn.functional.linear(*expected), tokens)
    true = next_token_loss(torch.nn.functional.linear(*exact), tokens)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for each in (loss, wanted, true):
        each.backward()
    for one, other, best in zip(found, expected, exact, strict=True):
        assert one.grad is not None
        assert one.grad.dtype == torch.float32
        torch.testing.assert_close(one.grad, other.grad, rtol=0.02, atol=float(best.grad.abs().max()) / 100)


def test_the_loss_without_logits_holds_no_more_than_a_part_of_them() -> None:
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
            return out

    x, weight = normal(4096, 8, seed=0).requires_grad_(), normal(100, 8, seed=1).requires_grad_()
    with Sizes():
        linear_next_token_loss(x, weight, torch.arange(4096) % 100).backward()
    assert largest == 512 * 100


@given(sequences=st.integers(1, 4), length=st.integers(1, 5), width=st.integers(1, 6), seed=st.integers(0, 1000))
def test_mim_loss_against_the_naive_loop(sequences: int, length: int, width: int, seed: int) -> None:
    student, teacher = normal(2, sequences, length, width, seed=seed).unbind()
    assert mim_loss(student, teacher).item() == pytest.approx(equations.mim_loss(student, teacher), abs=1e-6)


@pytest.mark.parametrize("views", [1, 3])
def test_views_are_more_sequences_to_the_losses_of_eq_2_and_4(views: int) -> None:
    student, teacher, logits = normal(3, 2, views, 4, 5, seed=0).unbind()
    tokens = torch.randint(5, (2, views, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(mim_loss(student, teacher), mim_loss(student.flatten(0, 1), teacher.flatten(0, 1)))
    assert torch.equal(next_token_loss(logits, tokens), next_token_loss(logits.flatten(0, 1), tokens.flatten(0, 1)))


@contrasts
@given(
    images=st.integers(1, 4),
    views=st.integers(2, 3),
    positions=st.integers(2, 4),
    width=st.integers(1, 5),
    temperature=st.sampled_from([0.07, 0.2, 1.0, 3.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    before=st.integers(0, 2),
    after=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_contrast_against_the_naive_loop(
    loss: Contrast,
    images: int,
    views: int,
    positions: int,
    width: int,
    temperature: float,
    reduction: Reduction,
    before: int,
    after: int,
    seed: int,
) -> None:
    z = normal(images, views, positions, width, seed=seed)
    h = normal(before + images + after, views, positions, width, seed=seed + 1)
    ours = loss(z, h, temperature=temperature, reduction=reduction, offset=before).item()
    assert ours == pytest.approx(REFERENCE[loss](z, h, temperature, reduction, before), rel=1e-9, abs=1e-6)


@contrasts
def test_default_is_the_mean_at_temperature_0_2(loss: Contrast) -> None:
    z, h = normal(2, 4, 2, 3, 5, seed=0).unbind()
    assert loss(z, h).item() == pytest.approx(REFERENCE[loss](z, h, 0.2, "mean"), abs=1e-9)


@contrasts
def test_float32_inputs_agree_with_the_equations(loss: Contrast) -> None:
    z, h = normal(2, 4, 2, 3, 16, seed=0, dtype=torch.float32).unbind()
    ours = loss(z, h)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(REFERENCE[loss](z, h, 0.2, "mean"), abs=1e-5)


# Closed forms


def test_equal_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    loss = next_token_loss(torch.full((2, 3, 7), 5.0), torch.zeros(2, 3, dtype=torch.int64))
    assert loss.item() == pytest.approx(math.log(7))


def test_a_certain_and_right_prediction_costs_nothing() -> None:
    tokens = torch.tensor([[0, 2], [1, 1]])
    assert next_token_loss(1000 * torch.nn.functional.one_hot(tokens, 3).float(), tokens).item() == 0


def test_mim_loss_is_0_for_equal_1_for_orthogonal_and_2_for_opposite_directions() -> None:
    features = normal(2, 3, 4, seed=0)
    assert mim_loss(features, 7 * features).item() == pytest.approx(0, abs=1e-12)
    assert mim_loss(features, -features).item() == pytest.approx(2)
    eye = torch.eye(4)
    assert mim_loss(eye[None, :2], eye[None, 2:]).item() == pytest.approx(1)


def test_mim_loss_weighs_every_position_alike() -> None:
    student, teacher = torch.ones(1, 4, 3), torch.ones(1, 4, 3)
    teacher[0, 2] = -1
    assert mim_loss(student, teacher).item() == pytest.approx(2 / 4)


@contrasts
@pytest.mark.parametrize("images", [2, 5])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_orthogonal_images_cost_their_closed_form(loss: Contrast, images: int, temperature: float) -> None:
    features = orthogonal_images(images, 2, 3)
    expected = math.log(1 + (images - 1) * math.exp(-1 / temperature))
    assert loss(features, 3 * features, temperature=temperature).item() == pytest.approx(expected)


@contrasts
def test_identical_images_cost_the_logarithm_of_their_number(loss: Contrast) -> None:
    features = normal(1, 2, 3, 4, seed=0).expand(6, 2, 3, 4)
    assert loss(features, features).item() == pytest.approx(math.log(6))


@contrasts
def test_a_lone_image_has_no_negatives_and_costs_nothing(loss: Contrast) -> None:
    z, h = normal(2, 1, 2, 3, 4, seed=0).unbind()
    assert loss(z, h).item() == pytest.approx(0, abs=1e-12)


@contrasts
def test_the_offset_names_the_positives(loss: Contrast) -> None:
    features = orthogonal_images(5, 2, 2)
    right = math.log(1 + 4 * math.exp(-5))
    assert loss(features[2:4], features, offset=2).item() == pytest.approx(right)
    assert loss(features[2:4], features, offset=1).item() == pytest.approx(
        right + 5
    )  # another image's: cosine 0, not 1


@contrasts
def test_slices_of_the_batch_average_to_the_batch(loss: Contrast) -> None:
    z, h = normal(2, 6, 2, 3, 4, seed=0).unbind()
    slices = [loss(z[i : i + 2], h, offset=i) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(slices).mean(), loss(z, h))


@pytest.mark.parametrize(("loss", "pairs"), [(step_loss, 24), (view_loss, 8)], ids=["step", "view"])
def test_sum_is_the_mean_times_the_pairs_of_4_positions_and_2_views(loss: Contrast, pairs: int) -> None:
    z, h = normal(2, 3, 2, 4, 5, seed=0).unbind()
    torch.testing.assert_close(loss(z, h, reduction="sum"), pairs * loss(z, h, reduction="mean"))


def test_a_step_is_compared_with_other_steps_of_its_own_view_only() -> None:
    z, h = normal(2, 3, 2, 2, 5, seed=0).unbind()
    loss = step_loss(z, h)
    views_apart = torch.stack([step_loss(z[:, [m]], h[:, [m]]) for m in range(2)]).mean()
    torch.testing.assert_close(loss, views_apart)
    # with 2 steps the anchor at 0 meets step 1 and the other way round: moving both sides together changes nothing
    torch.testing.assert_close(step_loss(z[:, :, [1, 0]], h[:, :, [1, 0]]), loss)
    assert not torch.isclose(step_loss(z, h[:, :, [1, 0]]), loss)


def test_a_view_is_compared_with_other_views_at_its_own_step_only() -> None:
    z, h = normal(2, 3, 2, 2, 5, seed=0).unbind()
    loss = view_loss(z, h)
    steps_apart = torch.stack([view_loss(z[:, :, [k]], h[:, :, [k]]) for k in range(2)]).mean()
    torch.testing.assert_close(loss, steps_apart)
    assert not torch.isclose(view_loss(z, h[:, [1, 0]]), loss)


@contrasts
def test_student_and_teacher_are_not_exchangeable(loss: Contrast) -> None:
    z, h = normal(2, 3, 2, 2, 5, seed=0).unbind()
    assert not torch.isclose(loss(z, h), loss(h, z))


@contrasts
def test_the_length_of_features_does_not_matter(loss: Contrast) -> None:
    z, h = normal(2, 3, 2, 3, 5, seed=0).unbind()
    scale = torch.arange(1, 4, dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(loss(z * scale, h / scale), loss(z, h))


@contrasts
def test_an_unknown_reduction_is_refused(loss: Contrast) -> None:
    z, h = normal(2, 3, 2, 3, 5, seed=0).unbind()
    with pytest.raises((ValueError, AssertionError), match=r"reduction|median"):
        loss(z, h, reduction="median")


# Gradients


def test_gradients_are_right() -> None:
    student, teacher = (x.requires_grad_() for x in normal(2, 2, 3, 4, seed=0).unbind())
    assert torch.autograd.gradcheck(mim_loss, (student, teacher))
    tokens = torch.tensor([[0, 2, 1], [3, 3, 0]])
    assert torch.autograd.gradcheck(lambda logits: next_token_loss(logits, tokens), (student,))


@contrasts
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_contrast_gradients_are_right(loss: Contrast, reduction: Reduction) -> None:
    z = normal(2, 2, 2, 3, seed=0).requires_grad_()
    h = normal(3, 2, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, reduction=reduction, offset=1), (z, h))


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_features_of_huge_norm_are_compared_exactly(dtype: torch.dtype) -> None:
    largest = 6e4 if dtype == torch.float16 else 1e15  # squares overflow float16; float32 holds them
    z, h = normal(2, 3, 2, 3, 8, seed=0).clamp(-2, 2).mul(largest / 2).to(dtype).unbind()
    for loss, reference in REFERENCE.items():
        value = loss(z, h)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(reference(z, h, 0.2, "mean"), abs=1e-5)
    value = mim_loss(z, h)
    assert value.item() == pytest.approx(equations.mim_loss(z.flatten(0, 1), h.flatten(0, 1)), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_give_a_float32_loss(dtype: torch.dtype) -> None:
    logits = (20 * normal(2, 3, 50, seed=0)).to(dtype)
    tokens = torch.randint(50, (2, 3), generator=torch.Generator().manual_seed(0))
    value = next_token_loss(logits, tokens)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(equations.next_token_loss(logits, tokens), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_losses_and_gradients_do_not_depend_on_autocast(dtype: torch.dtype) -> None:
    z, h = normal(2, 4, 2, 3, 16, seed=0, dtype=dtype).unbind()
    tokens = torch.randint(16, (4, 2, 3), generator=torch.Generator().manual_seed(0))
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda x: next_token_loss(x, tokens),
        lambda x: mim_loss(x, h),
        lambda x: step_loss(x, h),
        lambda x: view_loss(x, h),
    ]
    for loss in losses:
        plain, cast = z.clone().requires_grad_(), z.clone().requires_grad_()
        expected = loss(plain)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(cast)
        expected.backward()
        value.backward()
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)
        assert torch.equal(cast.grad, plain.grad)


def test_features_of_0_give_finite_losses_and_gradients() -> None:
    zero = torch.zeros(2, 2, 2, 4, requires_grad=True)
    total = (
        mim_loss(zero, torch.ones(2, 2, 2, 4))
        + step_loss(zero, torch.ones(2, 2, 2, 4))
        + view_loss(zero, zero.detach())
    )
    total.backward()
    assert total.item() == pytest.approx(1 + 2 * math.log(2))
    assert zero.grad is not None
    assert zero.grad.isfinite().all()
