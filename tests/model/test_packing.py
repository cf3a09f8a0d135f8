"""Packed matrices: the same model, faster."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from st_ar.config import ModelConfig
from st_ar.model.decoder import PackedLinear, packed
from st_ar.model.generate import generate
from st_ar.model.transformer import Transformer
from tests.toys import NO_DROPOUT, TINY, TINY_TEXT, random_captions, random_model, random_sequences

ODD = ModelConfig(dim=20, n_layers=3, n_heads=1, vocab_size=13, grid=3, num_classes=3, **NO_DROPOUT)
MEDIUM = replace(TINY, dim=96, n_heads=3, vocab_size=1003)
HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def logits(model: Transformer, config: ModelConfig, count: int) -> Tensor:
    tokens, labels = random_sequences(config, count)
    labels = random_captions(config, [1 + n % 5 for n in range(count)]) if config.condition == "text" else labels
    with torch.no_grad():
        return model(tokens[:, :-1], labels).logits.float()


@pytest.mark.parametrize("config", [TINY, ODD, MEDIUM, TINY_TEXT], ids=["tiny", "odd", "medium", "text"])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_packed_model_is_the_model(config: ModelConfig, count: int) -> None:
    model = random_model(config)
    expected = logits(model, config, count)
    for rows in (1, count, 64):  # a layout for other batches serves too
        assert (logits(packed(model, rows), config, count) - expected).norm() <= 4e-6 * expected.norm()


@pytest.mark.parametrize("config", [ODD, MEDIUM], ids=["odd", "medium"])
def test_a_packed_bfloat16_model_is_as_near_as_the_model(config: ModelConfig) -> None:
    exact = logits(random_model(config), config, 3)
    model = random_model(config).bfloat16()
    twin = packed(model, 3)
    assert (twin is not model) == HAS_BF16  # without such products there is nothing to gain
    error, usual = ((logits(m, config, 3) - exact).norm() / exact.norm() for m in (twin, model))
    assert error < max(1.5 * usual, 0.02)


def test_packing_leaves_the_model_as_it_was() -> None:
    model = random_model()
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = packed(model, 4)
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [name for name, module in twin.named_modules() if isinstance(module, PackedLinear)] == linear
    assert not any(isinstance(module, nn.Linear) for module in twin.modules())


def test_all_but_the_matrices_is_shared() -> None:
    model = random_model()
    twin = packed(model, 4)
    own = dict(model.named_parameters())
    shared = dict(twin.named_parameters())
    assert shared.keys() == {name for name in own if "norm" in name or "embedding" in name}
    assert all(value is own[name] for name, value in shared.items())
    assert twin.rope is model.rope
    assert (twin.config, twin.training) == (model.config, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_types_without_packed_products_are_left_alone(dtype: torch.dtype) -> None:
    model = random_model().to(dtype)
    assert packed(model, 4) is model


def test_without_onednn_the_model_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = random_model()
    assert packed(model, 4) is model


def test_sampling_on_a_cpu_goes_through_packed_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    calls = {PackedLinear: 0, nn.Linear: 0}

    def count(kind: type[nn.Module]) -> None:
        forward = kind.forward

        def counted(self: nn.Module, x: Tensor) -> Tensor:
            calls[kind] += 1
            return forward(self, x)

        monkeypatch.setattr(kind, "forward", counted)

    count(PackedLinear)
    count(nn.Linear)
    generate(model, torch.tensor([0, 1]), cfg_scale=2.0, seed=0)
    per_token = 5 * TINY.n_layers + 1  # queries, keys and values; output; three of the feed-forward; and the head
    assert calls == {PackedLinear: per_token * TINY.sequence_length, nn.Linear: 0}
