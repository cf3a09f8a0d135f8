"""The key-value cache: the logits of the whole forward pass, token by token."""

from collections.abc import Generator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from st_ar.config import ModelConfig
from st_ar.errors import UserError
from st_ar.model import decoder as model_decoder
from st_ar.model.decoder import CachedDecoder, PackedLinear, packed
from st_ar.model.generate import generate
from st_ar.model.transformer import Transformer
from tests.toys import NO_DROPOUT, TINY, TINY_TEXT, random_captions, random_model, random_sequences, recorded_model


def decoded(decoder: CachedDecoder, tokens: Tensor, labels: Tensor) -> Generator[Tensor]:
    """The logits before each token."""
    with torch.no_grad():
        yield decoder.begin(labels)
        for position in range(tokens.shape[1] - 1):
            yield decoder.read(tokens[:, position], decoder.seek(position))


def check(model: Transformer, *, rows: int = 3, bucket: int | None = None, compiled: bool = False) -> None:
    decoder = CachedDecoder(model, rows, bucket=bucket, compiled=compiled)
    for seed in range(2):  # the second begins in the memory of the first
        tokens, labels = random_sequences(model.config, 3, seed)
        with torch.no_grad():
            whole = model(tokens[:, :-1], labels).logits
        tolerance = 1e-5 * whole.abs().max().item()  # float32 rounding grows with the terms that a logit sums
        for position, logits in enumerate(decoded(decoder, tokens, labels)):
            torch.testing.assert_close(logits, whole[:, position], rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("bucket", [None, 1, 4, 32])
@pytest.mark.parametrize("recorded_weights", [True, False])
def test_cached_logits_are_those_of_the_whole_forward(recorded_weights: bool, bucket: int | None) -> None:
    check(recorded_model() if recorded_weights else random_model(), bucket=bucket)


@pytest.mark.parametrize("compiled", [False, True])
def test_widened_heads_give_the_same_logits(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(model_decoder, "fused_width", lambda head_dim, device: head_dim + 3)
    check(random_model(replace(TINY, n_layers=2)), compiled=compiled)


def test_fewer_sequences_than_there_is_room_for() -> None:
    check(random_model(), rows=5)


@pytest.mark.slow
def test_compiled_steps_give_the_same_logits() -> None:
    check(random_model(replace(TINY, n_layers=2)), compiled=True)


def test_decoders_do_not_share_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each would be compiled for every number of sequences, and some steps twice."""
    graphs: list[Any] = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    found: list[int] = []
    model = random_model(replace(TINY, n_layers=2))
    for rows in (2, 4, 8):
        graphs.clear()
        tokens, labels = random_sequences(TINY, rows)
        logits = torch.stack(list(decoded(CachedDecoder(model, rows, bucket=4, compiled=True), tokens, labels)), dim=1)
        torch.testing.assert_close(logits, model(tokens[:, :-1], labels).logits, rtol=1e-5, atol=1e-5)
        found.append(len(graphs))
    assert found == [found[0]] * 3


def test_half_precision_is_as_near_as_the_whole_forward_in_it() -> None:
    model = recorded_model()
    tokens, labels = random_sequences(model.config, 3)
    with torch.no_grad():
        exact = model(tokens[:, :-1], labels).logits
        usual = model.bfloat16()(tokens[:, :-1], labels).logits
    found = torch.stack(list(decoded(CachedDecoder(model, 3, bucket=4), tokens, labels)), dim=1)
    assert (found - exact).norm() < max(1.5 * (usual - exact).norm(), 0.02 * exact.norm())


def test_the_part_read_grows_by_buckets() -> None:
    decoder = CachedDecoder(random_model(), 1, bucket=4)
    assert [decoder.seek(position) for position in range(8)] == [4, 4, 4, 8, 8, 8, 8, 12]
    assert decoder.cache.shape[-2] == 12  # 9 positions in buckets of 4
    exact = CachedDecoder(random_model(), 1)
    assert [exact.seek(position) for position in range(8)] == [2, 3, 4, 5, 6, 7, 8, 9]


def test_fewer_sequences_may_be_read_later() -> None:
    model = random_model()
    tokens, labels = random_sequences(TINY, 4)
    decoder = CachedDecoder(model, 4)
    with torch.no_grad():
        whole = model(tokens[:, :-1], labels).logits
        decoder.begin(labels)
        for position in range(3):
            decoder.read(tokens[:, position], decoder.seek(position))
        for position in range(3, 8):
            logits = decoder.read(tokens[:2, position], decoder.seek(position))
            torch.testing.assert_close(logits, whole[:2, position + 1], rtol=1e-5, atol=1e-5)


def test_nothing_comes_after_the_last_token() -> None:
    with pytest.raises(UserError, match=r"all 9 tokens .*no next one"):
        CachedDecoder(random_model(), 1).seek(8)


def test_an_image_of_one_token_has_nothing_to_read() -> None:
    config = ModelConfig(dim=8, n_layers=1, n_heads=1, vocab_size=5, grid=1, num_classes=2, **NO_DROPOUT)
    with pytest.raises(UserError, match="all 1 tokens"):
        CachedDecoder(random_model(config), 1).seek(0)


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
def test_dtypes_without_packed_products_are_not_packed(dtype: torch.dtype) -> None:
    model = random_model().to(dtype)
    assert packed(model, 4) is model


def test_without_onednn_the_model_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
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
