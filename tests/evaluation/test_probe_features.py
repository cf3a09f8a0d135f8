"""What probes read: the states of the right steps, without the label, whatever the batches, layers and devices."""

import copy
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation import probe_features
from st_ar.evaluation.probe_features import (
    ENTRY,
    FEATURES,
    Entry,
    FeatureCache,
    FeatureSpec,
    ProbeFeatures,
    describe_features,
    extract_features,
    uniform_steps,
)
from st_ar.model.transformer import Transformer
from tests.data.random_store import random_store, write_store
from tests.disk import contents, flip_byte, full_disk
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
    with pytest.raises(UserError, match=f"{count} steps are not possible: an image of this model has 9; give 1 to 9"):
        uniform_steps(9, count)


# ProbeFeatures


@torch.no_grad()
def test_a_steps_features_have_read_the_null_class_and_the_tokens_before_it(tmp_path: Path) -> None:
    folder, codes, labels = store_for_tiny(tmp_path / "tokens")
    model, reading = random_model(), FeatureSpec(layers=[3, 1], steps=[1, 4, 9])
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
    reading = FeatureSpec(layers=[2], steps=[1, 9])
    same, changed = (extract_features(random_model(), TokenStore(f), reading) for f in (folder, tmp_path / "others"))
    np.testing.assert_array_equal(same.layers[2], changed.layers[2])
    assert changed.labels.tolist() == others.tolist()


def test_neither_the_batch_size_nor_the_other_layers_change_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, model = TokenStore(store_for_tiny(tmp_path / "tokens")[0]), random_model()
    expected = extract_features(model, store, FeatureSpec(layers=[4], steps=[3, 9]), crops=[0, 1]).layers[4]
    readings = [FeatureSpec(layers=[4], steps=[3, 9], batch_size=size) for size in (1, 4, 9)]
    for reading in (*readings, FeatureSpec(layers=[1, 4, 2], steps=[3, 9])):
        found = extract_features(model, store, reading, crops=[0, 1]).layers[4]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(probe_features, "MAX_BATCH_BYTES", 4 * 9 * 16 * 3)  # three images of one layer
    sizes = [len(states[4]) for states in probe_features.hidden_states(model, store, readings[2], [0])]
    assert sizes == [3, 3, 3]


def test_in_bfloat16_the_products_are_rounded_and_the_features_are_not_lost(tmp_path: Path) -> None:
    store, model = TokenStore(store_for_tiny(tmp_path / "tokens")[0]), random_model()
    exact, rounded = (
        extract_features(model, store, FeatureSpec(layers=[4], steps=[3, 9], dtype=dtype)).layers[4]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == np.float32
    assert 1e-4 < np.abs(rounded - exact).max() / np.abs(exact).max() < 0.05


@pytest.mark.parametrize(
    ("reading", "crops", "match"),
    [
        (FeatureSpec(layers=[2, 2], steps=[9]), [0], "--layers 2 2 repeats a value"),
        (FeatureSpec(layers=[2], steps=[9, 1, 9]), [0], "--steps 9 1 9 repeats a value"),
        (FeatureSpec(layers=[2], steps=[9]), [1, 1], "--train-crops 1 1 repeats a value"),
        (FeatureSpec(layers=[], steps=[9]), [0], "--layers is empty: give at least one"),
        (FeatureSpec(layers=[2], steps=[]), [0], "--steps is empty: give at least one"),
        (FeatureSpec(layers=[2], steps=[9]), [], "--train-crops is empty: give at least one"),
    ],
)
def test_empty_and_repeated_choices_are_refused(
    tmp_path: Path, reading: FeatureSpec, crops: list[int], match: str
) -> None:
    store = TokenStore(store_for_tiny(tmp_path / "tokens")[0])
    with pytest.raises(UserError, match=match):
        extract_features(random_model(), store, reading, crops=crops)


READING = FeatureSpec(layers=[2, 4], steps=[3, 9])
SIZE = 128 + 18 * 2 * 16 * 4
"""Bytes of an entry: 9 images x 2 crops, 2 steps, 16 features."""


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return TokenStore(random_store(tmp_path / "tokens", images=9, crops=3, grid=3, vocab_size=11)[0])


@pytest.fixture
def model() -> Transformer:
    return random_model()


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def extract(
    model: Transformer, store: TokenStore, cache: FeatureCache | None, reading: FeatureSpec = READING
) -> ProbeFeatures:
    return extract_features(model, store, reading, crops=[0, 2], cache=cache, weights="abc")


def describe(
    model: Transformer, store: TokenStore, weights: str = "abc", reading: FeatureSpec = READING
) -> list[Entry]:
    return list(describe_features(model.config, weights, store, [0, 2], reading).values())


def test_features_from_the_cache_are_those_extracted_and_lie_in_files(
    tmp_path: Path, model: Transformer, store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = extract(model, store, None)
    caches = [FeatureCache(tmp_path / "cache", 1e6) for _ in range(2)]
    found = [extract(model, store, caches[0])]
    monkeypatch.setattr(probe_features, "hidden_states", None)  # the second call does without the network
    found.append(extract(model, store, caches[1]))
    assert [(cache.reused, cache.written) for cache in caches] == [(0, 2), (2, 0)]
    for features in found:
        assert features.labels.tolist() == expected.labels.tolist()
        assert list(features.layers) == [2, 4]
        for layer, array in features.layers.items():
            assert isinstance(array, np.memmap)
            assert not array.flags.writeable
            np.testing.assert_array_equal(array, expected.layers[layer])
    assert (
        sum((tmp_path / "cache" / name / FEATURES).stat().st_size for name in entries(tmp_path / "cache")) == 2 * SIZE
    )


def test_all_missing_layers_are_read_in_one_forward_and_the_others_not_again(
    tmp_path: Path, model: Transformer, store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    features = model.features

    def counted(*arguments: Any, **named: Any) -> Any:
        asked.append(list(named["layers"]))
        return features(*arguments, **named)

    monkeypatch.setattr(model, "features", counted)
    extract(model, store, FeatureCache(tmp_path / "cache", 1e6), FeatureSpec(layers=[2], steps=[3, 9]))
    cache = FeatureCache(tmp_path / "cache", 1e6)
    found = extract(model, store, cache, FeatureSpec(layers=[1, 2, 3], steps=[3, 9]))
    assert asked == [[2], [2], [1, 3], [1, 3]]  # two crops each
    assert (cache.reused, cache.written) == (1, 2)
    assert list(found.layers) == [1, 2, 3]


def test_what_features_depend_on_is_their_key(tmp_path: Path, model: Transformer, store: TokenStore) -> None:
    cache = FeatureCache(tmp_path / "cache", 1e6)
    codes = store.codes(np.arange(9), np.tile(np.arange(3), (9, 1)))
    changed = TokenStore(write_store(tmp_path / "other", (codes + 1) % 11, store.labels, vocab_size=11, num_classes=3))
    copied = TokenStore(shutil.copytree(store.folder, tmp_path / "copy"))
    name = cache.name(describe(model, store)[0])
    assert cache.name(describe(model, copied)[0]) == name
    half = FeatureCache(tmp_path / "cache", 1e6, "float16")
    other = FeatureSpec(layers=[2], steps=[9, 3])
    names = {
        name,
        cache.name(describe(model, store)[1]),
        cache.name(describe(model, store, "abd")[0]),
        cache.name(describe(model, changed)[0]),
        cache.name(describe(model, store, reading=other)[0]),
        cache.name(describe_features(model.config, "abc", store, [0], READING)[2]),
        half.name(describe(model, store)[0]),
    }
    assert len(names) == 7


def test_float16_takes_half_the_room_and_rounds(tmp_path: Path, model: Transformer, store: TokenStore) -> None:
    exact = extract(model, store, None).layers[2]
    found = extract(model, store, FeatureCache(tmp_path / "cache", 2 * SIZE, "float16")).layers[2]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, exact.astype(np.float16))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("value", "match"),
    [(np.nan, "hold NaN or infinity"), (-np.inf, "hold NaN or infinity"), (1e20, r"reach 1e\+20, above 100000")],
)
def test_features_that_a_probe_cannot_learn_from_are_refused(
    tmp_path: Path, model: Transformer, store: TokenStore, value: float, match: str, cached: bool
) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.tok_embeddings.weight.fill_(value)
    cache = FeatureCache(tmp_path / "cache", 1e6) if cached else None
    with pytest.raises(UserError, match=rf"the features of image 0 of .* in layer \d {match}: check the model, or"):
        extract(broken, store, cache)


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path, model: Transformer, store: TokenStore) -> None:
    cache = FeatureCache(tmp_path / "cache", 1e6, "float16")
    match = r"features reach 1e\+06, too large for --cache-dtype float16: give float32"
    with pytest.raises(UserError, match=match), cache.writing(describe(model, store)[:1]) as (file,):
        file.write(np.full((18, 2, 16), 1e6, np.float32))
    assert contents(tmp_path / "cache") == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_call_that_is_stopped_in_the_middle_leaves_nothing(
    tmp_path: Path,
    model: Transformer,
    store: TokenStore,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    states = probe_features.hidden_states

    def stopped(*arguments: Any) -> Iterator[dict[int, np.ndarray]]:
        yield next(states(*arguments))
        raise error

    monkeypatch.setattr(probe_features, "hidden_states", stopped)
    with pytest.raises(error):
        extract(model, store, FeatureCache(tmp_path / "cache", 1e6))
    assert entries(tmp_path / "cache") == []


def test_partial_files_of_a_killed_call_are_ignored_and_removed(
    tmp_path: Path, model: Transformer, store: TokenStore
) -> None:
    script = f"""
import os
from pathlib import Path
import numpy as np
from st_ar.evaluation.probe_features import FeatureCache
cache = FeatureCache(Path({str(tmp_path / "cache")!r}), 1e6)
with cache.writing({describe(model, store)!r}) as files:
    for file in files:
        file.write(np.zeros((17, 2, 16), np.float32))
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    left = entries(tmp_path / "cache")
    assert len(left) == 2
    assert all(name.endswith(".partial") for name in left)
    cache = FeatureCache(tmp_path / "cache", 1e6)
    found = extract(model, store, cache)
    assert (cache.reused, cache.written) == (0, 2)
    np.testing.assert_array_equal(found.layers[2], extract(model, store, None).layers[2])
    assert not any(name.endswith(".partial") for name in entries(tmp_path / "cache"))


def test_partial_files_of_a_running_call_are_kept(tmp_path: Path, model: Transformer, store: TokenStore) -> None:
    first, second = describe(model, store)
    cache = FeatureCache(tmp_path / "cache", 1e6)
    with cache.writing([first]) as (file,):
        FeatureCache(tmp_path / "cache", 1e6).reserve([second])
        file.write(np.ones((18, 2, 16), np.float32))
    assert np.all(cache.find(first) == 1)


@pytest.mark.parametrize("damage", ["cut", "gone", "other shape", "other type", "no array"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, model: Transformer, store: TokenStore, damage: str) -> None:
    extract(model, store, FeatureCache(tmp_path / "cache", 1e6))
    cache = FeatureCache(tmp_path / "cache", 1e6)
    file = tmp_path / "cache" / cache.name(describe(model, store)[0]) / FEATURES
    if damage == "cut":
        os.truncate(file, SIZE - 1)
    elif damage == "gone":
        file.unlink()
    elif damage == "no array":
        file.write_bytes(b"")
    else:
        np.save(
            file, np.zeros((18, 2, 16 + (damage == "other shape")), np.float32 if "shape" in damage else np.float64)
        )
    found = extract(model, store, cache)
    assert (cache.reused, cache.written) == (1, 1)
    np.testing.assert_array_equal(found.layers[2], extract(model, store, None).layers[2])


def test_the_longest_unused_make_room(tmp_path: Path, model: Transformer, store: TokenStore) -> None:
    folder, limit = tmp_path / "cache", 3 * SIZE
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "notes.txt").write_text("no entry")
    readings = [FeatureSpec(layers=[layer], steps=[3, 9]) for layer in (1, 2, 3, 4)]
    names: list[str] = []
    for age, reading in zip((30, 10, 20), readings, strict=False):
        extract(model, store, FeatureCache(folder, limit), reading)
        names.append(FeatureCache(folder, limit).name(describe(model, store, reading=reading)[0]))
        os.utime(folder / names[-1] / ENTRY, (1e9 - age, 1e9 - age))
    assert entries(folder) == sorted(["mine", *names])
    extract(model, store, FeatureCache(folder, limit), readings[0])  # the oldest is used again
    extract(model, store, FeatureCache(folder, limit), readings[3])
    newest = FeatureCache(folder, limit).name(describe(model, store, reading=readings[3])[0])
    assert entries(folder) == sorted(["mine", names[0], names[1], newest])  # layer 3 was used longest ago
    assert (folder / "mine" / "notes.txt").read_text() == "no entry"


def test_what_one_call_needs_is_not_removed_for_the_rest_of_it(
    tmp_path: Path, model: Transformer, store: TokenStore
) -> None:
    cache = FeatureCache(tmp_path / "cache", 2 * SIZE)
    cache.reserve(describe(model, store))
    found = [extract(model, store, cache, FeatureSpec(layers=[layer], steps=[3, 9])) for layer in (2, 4)]
    assert len(entries(tmp_path / "cache")) == 2
    assert len(found) == 2
    with pytest.raises(UserError, match="more than --cache-limit"):
        extract(model, store, cache, FeatureSpec(layers=[1], steps=[3, 9]))


@pytest.mark.parametrize("limit", [0, -1e9, float("nan")])
def test_a_limit_of_nothing_is_refused(tmp_path: Path, limit: float) -> None:
    with pytest.raises(UserError, match="--cache-limit must be above 0 GB"):
        FeatureCache(tmp_path, limit)


def test_features_that_exceed_the_limit_are_refused_before_anything_is_removed(
    tmp_path: Path, model: Transformer, store: TokenStore
) -> None:
    extract(model, store, FeatureCache(tmp_path / "cache", 1e6), FeatureSpec(layers=[1], steps=[3, 9]))
    before = contents(tmp_path / "cache")
    match = r"take 4.86e-06 GB, more than --cache-limit 4.8e-06 GB: raise it; fewer --layers.*float16 half as much"
    with pytest.raises(UserError, match=match):
        extract(model, store, FeatureCache(tmp_path / "cache", 4800))
    assert contents(tmp_path / "cache") == before


def test_a_disk_that_is_too_small_is_refused_before_anything_is_removed(
    tmp_path: Path, model: Transformer, store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(model, store, FeatureCache(tmp_path / "cache", 1e6), FeatureSpec(layers=[1], steps=[3, 9]))
    usage = namedtuple("usage", ["free"])
    before = contents(tmp_path / "cache")
    there = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*/features.npy"))
    monkeypatch.setattr(probe_features.shutil, "disk_usage", lambda _: usage(2 * SIZE - 1 - there))
    with pytest.raises(UserError, match=r"take 4.86e-06 GB more, and the disk of .*cache has \S+ GB left: free"):
        extract(model, store, FeatureCache(tmp_path / "cache", 1e6))
    assert contents(tmp_path / "cache") == before
    monkeypatch.setattr(probe_features.shutil, "disk_usage", lambda _: usage(2 * SIZE - there))
    extract(model, store, FeatureCache(tmp_path / "cache", 1e6))
    assert len(entries(tmp_path / "cache")) == 2


def test_a_disk_that_fills_up_is_an_error_that_leaves_nothing_unfinished(
    tmp_path: Path, model: Transformer, store: TokenStore
) -> None:
    with full_disk(SIZE - 1), pytest.raises(UserError, match=r"cannot write features to .*cache .*free some space"):
        extract(model, store, FeatureCache(tmp_path / "cache", 1e6))
    assert entries(tmp_path / "cache") == []


def test_a_cache_below_a_file_is_refused(tmp_path: Path, model: Transformer, store: TokenStore) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write features to .*another --cache"):
        extract(model, store, FeatureCache(tmp_path / "file" / "cache", 1e6))


def test_a_flipped_bit_is_found_and_the_entry_made_again(tmp_path: Path, model: Transformer, store: TokenStore) -> None:
    cache = FeatureCache(tmp_path / "cache", 1e6)
    expected = np.array(extract(model, store, cache).layers[4])
    name = cache.name(describe(model, store)[1])
    flip_byte(tmp_path / "cache" / name / FEATURES, -5)
    again = FeatureCache(tmp_path / "cache", 1e6)
    found = extract(model, store, again)
    assert (again.reused, again.written) == (1, 1)
    np.testing.assert_array_equal(found.layers[4], expected)
    flip_byte(tmp_path / "cache" / name / ENTRY, 5)
    extract(model, store, third := FeatureCache(tmp_path / "cache", 1e6))
    assert (third.reused, third.written) == (1, 1)
