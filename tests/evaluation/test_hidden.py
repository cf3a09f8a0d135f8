"""What probes read: the states of the right steps, no label, whatever the batches, layers and devices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation import probe_features as hidden
from st_ar.evaluation.probe_features import Reading, extract_features, uniform_steps
from tests.data.random_store import random_store, write_store
from tests.toys import TINY, random_model


def store_for_tiny(
    folder: Path, *, images: int = 9, crops: int = 3, seed: int = 0
) -> tuple[Path, np.ndarray, np.ndarray]:
    return random_store(folder, images=images, crops=crops, grid=3, vocab_size=11, num_classes=3, seed=seed)


# Steps


def test_eight_steps_of_an_image_of_256_tokens_are_the_multiples_of_32() -> None:
    assert uniform_steps(256) == [32, 64, 96, 128, 160, 192, 224, 256]


@given(st.integers(1, 300), st.data())
def test_steps_rise_to_the_last_and_lie_evenly(length: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, length))
    steps = uniform_steps(length, count)
    assert len(steps) == count
    assert steps[-1] == length
    assert steps == sorted(set(steps))
    assert steps[0] >= 1
    assert all(abs(step - length * (i + 1) / count) <= 0.5 for i, step in enumerate(steps))


@pytest.mark.parametrize("count", [0, 10])
def test_more_steps_than_tokens_or_none_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=f"{count} steps asked for; an image of this model has 9: give 1 to that many"):
        uniform_steps(9, count)


# Features


@torch.no_grad()
def test_a_steps_features_have_read_the_null_class_and_the_tokens_before_it(tmp_path: Path) -> None:
    folder, codes, labels = store_for_tiny(tmp_path / "tokens")
    model, reading = random_model(), Reading(layers=[3, 1], steps=[1, 4, 9])
    found = extract_features(model, TokenStore(folder), reading, crops=[2, 0])
    tokens = torch.from_numpy(codes[:, [2, 0]].astype(np.int64)).transpose(0, 1).flatten(0, 1)  # crop by crop
    null = torch.full((18,), TINY.null_class)
    assert list(found.layers) == [3, 1]
    for layer, states in found.layers.items():
        assert states.dtype == np.float32
        for place, step in enumerate([1, 4, 9]):
            expected = model.features(tokens[:, : step - 1], null, layers={layer})[layer][
                :, -1
            ]  # has seen nothing later
            np.testing.assert_allclose(states[:, place], expected, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == [*labels, *labels]


def test_the_stored_labels_do_not_reach_the_features(tmp_path: Path) -> None:
    folder, codes, labels = store_for_tiny(tmp_path / "tokens")
    others = (labels + 1) % 3
    write_store(tmp_path / "others", codes, others, vocab_size=11, num_classes=3)
    reading = Reading(layers=[2], steps=[1, 9])
    same, changed = (extract_features(random_model(), TokenStore(f), reading) for f in (folder, tmp_path / "others"))
    np.testing.assert_array_equal(same.layers[2], changed.layers[2])
    assert changed.labels.tolist() == others.tolist()


def test_neither_the_batch_size_nor_the_other_layers_change_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, model = TokenStore(store_for_tiny(tmp_path / "tokens")[0]), random_model()
    expected = extract_features(model, store, Reading(layers=[4], steps=[3, 9]), crops=[0, 1]).layers[4]
    readings = [Reading(layers=[4], steps=[3, 9], batch_size=size) for size in (1, 4, 9)]
    for reading in (*readings, Reading(layers=[1, 4, 2], steps=[3, 9])):
        found = extract_features(model, store, reading, crops=[0, 1]).layers[4]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(hidden, "AT_ONCE", 4 * 9 * 16 * 3)  # three images of one layer
    sizes = [len(states[4]) for states in hidden.hidden_states(model, store, readings[2], [0])]
    assert sizes == [3, 3, 3]


def test_in_bfloat16_the_products_are_rounded_and_the_features_are_not_lost(tmp_path: Path) -> None:
    store, model = TokenStore(store_for_tiny(tmp_path / "tokens")[0]), random_model()
    exact, rounded = (
        extract_features(model, store, Reading(layers=[4], steps=[3, 9], dtype=dtype)).layers[4]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == np.float32
    assert 1e-4 < np.abs(rounded - exact).max() / np.abs(exact).max() < 0.05


@pytest.mark.parametrize(
    ("reading", "crops", "match"),
    [
        (Reading(layers=[2, 2], steps=[9]), [0], "--layers 2 2 names one more than once"),
        (Reading(layers=[2], steps=[9, 1, 9]), [0], "--steps 9 1 9 names one more than once"),
        (Reading(layers=[2], steps=[9]), [1, 1], "--train-crops 1 1 names one more than once"),
        (Reading(layers=[], steps=[9]), [0], "there is nothing to probe"),
        (Reading(layers=[2], steps=[]), [0], "there is nothing to probe"),
        (Reading(layers=[2], steps=[9]), [], "there is nothing to probe"),
    ],
)
def test_nothing_and_the_same_twice_are_refused(tmp_path: Path, reading: Reading, crops: list[int], match: str) -> None:
    store = TokenStore(store_for_tiny(tmp_path / "tokens")[0])
    with pytest.raises(UserError, match=match):
        extract_features(random_model(), store, reading, crops=crops)
