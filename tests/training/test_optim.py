"""AdamW's groups, and the learning rate in closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from st_ar.config import ModelConfig, OptimConfig
from st_ar.errors import UserError
from st_ar.model.transformer import Transformer
from st_ar.training.optim import adamw, clip_gradients, learning_rate

TINY = ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=16, grid=4, num_classes=3)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Transformer(TINY)
    optimizer = adamw(model, OptimConfig(weight_decay=0.07))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith("norm.weight") else 0.07), name


def test_every_trainable_parameter_is_in_one_group() -> None:
    model = Transformer(TINY)
    model.tok_embeddings.requires_grad_(False)
    grouped = [id(p) for group in adamw(model, OptimConfig()).param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_one_step_is_adamw_by_hand() -> None:
    layer = nn.Linear(3, 2)
    config = OptimConfig(lr=0.1, betas=(0.8, 0.9), weight_decay=0.5)
    optimizer = adamw(layer, config)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    layer(torch.tensor([1.0, -2.0, 0.5])).square().sum().backward()
    optimizer.step()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        kept = 1 - 0.1 * 0.5 if name == "weight" else 1.0
        # At the first step both moments' corrections cancel the betas: the update is lr * g / (|g| + eps).
        expected = before[name] * kept - 0.1 * parameter.grad / (parameter.grad.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_the_paper_and_llamagen_values_are_the_defaults() -> None:
    group = adamw(nn.Linear(2, 2), OptimConfig()).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.95), 0.05)
    assert OptimConfig().grad_clip == 1.0
    assert [learning_rate(OptimConfig(), step, 100) for step in (1, 50, 100)] == [1e-4] * 3


@pytest.mark.parametrize("schedule", ["constant", "cosine", "trapezoid"])
def test_the_warm_up_rises_linearly_from_zero(schedule: str) -> None:
    config = OptimConfig(lr=3.0, warmup_steps=6, schedule=schedule)
    rates = [learning_rate(config, step, 100) for step in range(1, 7)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])


def test_constant_stays_at_the_peak() -> None:
    config = OptimConfig(lr=3.0, warmup_steps=6)
    assert {learning_rate(config, step, 10) for step in range(6, 11)} == {3.0}


@given(total=st.integers(2, 300), warmup=st.integers(0, 50), final=st.floats(0, 1), step=st.integers(1, 300))
def test_cosine_is_half_a_wave_after_the_warm_up(total: int, warmup: int, final: float, step: int) -> None:
    warmup, step = min(warmup, total - 1), min(step, total)
    config = OptimConfig(lr=2.0, warmup_steps=warmup, schedule="cosine", final_lr=final)
    rate = learning_rate(config, step, total)
    if step > warmup:
        wave = math.cos(math.pi * (step - warmup) / (total - warmup))
        assert rate == pytest.approx((1 + final) + (1 - final) * wave)
    assert learning_rate(config, total, total) == pytest.approx(2.0 * final)


def test_trapezoid_is_flat_then_a_straight_line_to_its_end() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="trapezoid", decay_fraction=0.4, final_lr=0.2)
    rates = [learning_rate(config, step, 10) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


@given(total=st.integers(1, 300), fraction=st.floats(0.01, 1), final=st.floats(0, 1))
def test_trapezoid_never_rises_and_ends_at_its_final_rate(total: int, fraction: float, final: float) -> None:
    config = OptimConfig(lr=2.0, schedule="trapezoid", decay_fraction=fraction, final_lr=final)
    rates = [learning_rate(config, step, total) for step in range(1, total + 1)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(2.0 * final)
    flat = total - max(1, round(fraction * total))
    assert rates[:flat] == [2.0] * flat


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"lr": 0.0}, "--optim.lr"),
        ({"lr": float("nan")}, "--optim.lr"),
        ({"betas": (0.9, 1.0)}, "--optim.betas"),
        ({"weight_decay": -0.1}, "--optim.weight-decay"),
        ({"grad_clip": -1.0}, "--optim.grad-clip"),
        ({"warmup_steps": -1}, "--optim.warmup-steps"),
        ({"decay_fraction": 0.0}, "--optim.decay-fraction"),
        ({"final_lr": 1.5}, "--optim.final-lr"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_flag(changes: dict[str, object], flag: str) -> None:
    value = next(iter(changes.values()))
    with pytest.raises(UserError) as raised:
        OptimConfig(**changes)
    assert str(raised.value).startswith(flag)
    assert str(value) in str(raised.value)


@pytest.mark.parametrize("largest", [0.0, 0.5, 100.0])
def test_gradients_are_clipped_to_their_common_norm(largest: float) -> None:
    layer = nn.Linear(3, 2)
    layer(torch.tensor([1.0, -2.0, 0.5])).square().sum().backward()
    before = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
    norm = clip_gradients(layer.parameters(), largest)
    after = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
    torch.testing.assert_close(norm, before.square().sum().sqrt())
    torch.testing.assert_close(after, before * min(1.0, (largest or math.inf) / float(norm)))
