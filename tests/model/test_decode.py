"""The key-value cache: the logits of the whole forward pass, token by token."""

from collections.abc import Generator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.errors import UserError
from st_ar.model.decoder import Decoder
from st_ar.model.transformer import Transformer
from tests.toys import NO_DROPOUT, TINY, random_model, random_sequences, recorded_model


def decoded(decoder: Decoder, tokens: Tensor, labels: Tensor) -> Generator[Tensor]:
    """The logits before each token."""
    with torch.no_grad():
        yield decoder.begin(labels)
        for position in range(tokens.shape[1] - 1):
            yield decoder.read(tokens[:, position], decoder.seek(position))


def check(model: Transformer, *, rows: int = 3, bucket: int | None = None, compiled: bool = False) -> None:
    decoder = Decoder(model, rows, bucket=bucket, compiled=compiled)
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


def test_fewer_sequences_than_there_is_room_for() -> None:
    check(random_model(), rows=5)


@pytest.mark.parametrize("bucket", [1, 4])
def test_compiled_steps_give_the_same_logits(bucket: int) -> None:
    check(random_model(), bucket=bucket, compiled=True)


def test_what_one_decoder_was_compiled_for_is_no_matter_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each would be compiled for every number of sequences, and some steps twice."""
    graphs: list[Any] = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    found: list[int] = []
    for rows in (2, 4, 8):
        graphs.clear()
        tokens, labels = random_sequences(TINY, rows)
        list(decoded(Decoder(random_model(), rows, bucket=4, compiled=True), tokens, labels))
        found.append(len(graphs))
    assert found == [found[0]] * 3


def test_half_precision_is_as_near_as_the_whole_forward_in_it() -> None:
    model = recorded_model()
    tokens, labels = random_sequences(model.config, 3)
    with torch.no_grad():
        exact = model(tokens[:, :-1], labels).logits
        usual = model.bfloat16()(tokens[:, :-1], labels).logits
    found = torch.stack(list(decoded(Decoder(model, 3, bucket=4), tokens, labels)), dim=1)
    assert (found - exact).norm() < max(1.5 * (usual - exact).norm(), 0.02 * exact.norm())


def test_the_part_read_grows_by_buckets() -> None:
    decoder = Decoder(random_model(), 1, bucket=4)
    assert [decoder.seek(position) for position in range(8)] == [4, 4, 4, 8, 8, 8, 8, 12]
    assert decoder.cache.shape[-2] == 12  # 9 positions in buckets of 4
    exact = Decoder(random_model(), 1)
    assert [exact.seek(position) for position in range(8)] == [2, 3, 4, 5, 6, 7, 8, 9]


def test_sequences_left_out_leave_the_others_alone() -> None:
    model = random_model()
    tokens, labels = random_sequences(TINY, 4)
    decoder = Decoder(model, 4)
    with torch.no_grad():
        whole = model(tokens[:, :-1], labels).logits
        decoder.begin(labels)
        for position in range(3):
            decoder.read(tokens[:, position], decoder.seek(position))
        for position in range(3, 8):
            logits = decoder.read(tokens[:2, position], decoder.seek(position))
            torch.testing.assert_close(logits, whole[:2, position + 1], rtol=1e-5, atol=1e-5)


def test_nothing_comes_after_the_last_token() -> None:
    with pytest.raises(UserError, match=r"all 9 tokens .*nothing comes after"):
        Decoder(random_model(), 1).seek(8)


def test_an_image_of_one_token_has_nothing_to_read() -> None:
    config = ModelConfig(dim=8, n_layers=1, n_heads=1, vocab_size=5, grid=1, num_classes=2, **NO_DROPOUT)
    with pytest.raises(UserError, match="all 1 tokens"):
        Decoder(random_model(config), 1).seek(0)
