"""Token invariance: the correspondence against loops, tokens that are a known function of pixels, files and mistakes."""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from st_ar.cli import main
from st_ar.config import InvarianceSettings
from st_ar.data.source import Example, ImageSource
from st_ar.errors import UserError
from st_ar.evaluation import invariance
from st_ar.evaluation.generation.image_sets import Pictures, open_pictures
from st_ar.evaluation.invariance import (
    DIRECTIONS,
    IDENTITY,
    Agreement,
    Change,
    Geometry,
    chance_level,
    choose_shifts,
    compare,
    list_changes,
    mark_differences,
    measure,
    measure_invariance,
    resized,
    summarise,
    whole_tokens,
)
from st_ar.tokenizer.kmeans import KMeansTokenizer
from tests.cli.test_main import refused
from tests.disk import contents
from tests.disk import refused as refused_call
from tests.small_line import random_source, random_tokenizer

Capture = pytest.CaptureFixture[str]


def noise(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def mean_tokenizer(patch: int, levels: int = 9) -> KMeansTokenizer:
    """Codes are the level that is nearest to a patch's mean: the codebook's patches are plain greys."""
    greys = torch.linspace(-0.4, 0.37, levels)
    return KMeansTokenizer(greys[:, None].expand(levels, 3 * patch**2), patch)


def mean_codes(image: np.ndarray, patch: int, levels: int = 9) -> list[list[int]]:
    """The same by loops."""
    greys = np.linspace(-0.4, 0.37, levels)
    grid = len(image) // patch
    means = [
        [image[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].mean() for c in range(grid)]
        for r in range(grid)
    ]
    return [[int(np.abs(greys - (mean / 127.5 - 1)).argmin()) for mean in row] for row in means]


def measured(
    tokenizer: KMeansTokenizer, pictures: np.ndarray, changes: list[Change], geometry: Geometry, batch: int = 64
) -> np.ndarray:
    """Shares of equal tokens [N, changes]."""
    some = (pictures[start : start + batch] for start in range(0, len(pictures), batch))
    return measure({"t": tokenizer}, some, changes, geometry)["t"].shares


# Which tokens correspond


@given(st.integers(0, 60), st.integers(1, 16))
def test_a_shift_counts_as_the_nearest_number_of_tokens_but_as_none_below_one(shift: int, patch: int) -> None:
    nearest = min(range(70), key=lambda k: (abs(k * patch - shift), k))
    assert whole_tokens(shift, patch) == (0 if shift < patch else nearest)


@given(st.integers(1, 12), st.integers(50, 200))
def test_a_resized_token_goes_with_the_one_whose_centre_is_nearest(grid: int, percent: int) -> None:
    factor = percent / 100
    expected: dict[int, set[int]] = {}
    for place in range(grid):
        centre = grid / 2 + factor * (place + 0.5 - grid / 2)
        if -1e-9 < centre < grid + 1e-9:
            distances = [abs(other + 0.5 - centre) for other in range(grid)]
            expected[place] = {other for other in range(grid) if distances[other] < min(distances) + 1e-9}
    found = dict(zip(*(side.tolist() for side in resized(grid, factor)), strict=True))
    assert all(found[place] in expected[place] for place in found)
    at_the_edge = {p for p in expected if abs(abs(factor * (p + 0.5 - grid / 2)) - grid / 2) < 1e-9}
    assert set(expected) - at_the_edge <= set(found) <= set(expected)


@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 30),
    st.sampled_from([*DIRECTIONS, "flip"]),
    st.integers(0, 1000),
)
def test_agreement_is_that_of_loops_over_tokens(patch: int, grid: int, shift: int, way: str, seed: int) -> None:
    size = patch * grid
    shift = min(shift, size - patch)
    picture = noise(2, size + shift, seed)
    change = Change(kind="flip") if way == "flip" else Change(kind="shift", direction=way, amount=shift)
    geometry = Geometry.around(size, [shift], [])
    assert geometry == Geometry(size=size, origin=0, side=size + shift)
    (found, _) = measured(mean_tokenizer(patch), picture, [change], geometry)[:, 0]
    down, right = (0, 0) if way == "flip" else (shift * (way != "horizontal"), shift * (way != "vertical"))
    moved = picture[0, down : down + size, right : right + size]
    a = mean_codes(picture[0, :size, :size], patch)
    b = mean_codes(moved[:, ::-1] if way == "flip" else moved, patch)
    equal: list[bool] = []
    for row in range(grid):
        for column in range(grid):
            other_row, other_column = row - whole_tokens(down, patch), column - whole_tokens(right, patch)
            if way == "flip":
                other_column = grid - 1 - column
            if other_row >= 0 and other_column >= 0:
                equal.append(a[row][column] == b[other_row][other_column])
    assert found == pytest.approx(sum(equal) / len(equal), abs=1e-12)


# Views whose tokens are known


@pytest.mark.parametrize("way", DIRECTIONS)
def test_patches_keep_their_codes_under_shifts_of_whole_tokens_alone(way: str) -> None:
    changes = [Change(kind="shift", direction=way, amount=pixels) for pixels in range(9)]
    found = measured(random_tokenizer(), noise(5, 24), changes, Geometry.around(16, range(9), []))
    np.testing.assert_array_equal(found[:, ::2], 1)
    assert (found[:, 1::2] < 0.6).all()


def test_a_picture_of_one_repeated_patch_looks_the_same_one_token_further_on() -> None:
    pictures = np.tile(noise(3, 4), (1, 6, 6, 1))
    tokenizer = KMeansTokenizer(torch.rand(50, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1, 4)
    changes = list_changes([0, 4, 8], [])[:-1]
    assert (measured(tokenizer, pictures, changes, Geometry.around(16, [8], [])) == 1).all()


def test_a_mirrored_view_is_compared_with_the_mirrored_grid() -> None:
    flip = [Change(kind="flip")]
    geometry = Geometry.around(16, [], [])
    half = noise(4, 16)[:, :, :8]
    symmetric = np.concatenate([half, half[:, :, ::-1]], axis=2)
    assert (measured(mean_tokenizer(4), symmetric, flip, geometry) == 1).all()
    assert (measured(mean_tokenizer(4), noise(4, 16), flip, geometry) == 1).all()  # a patch's mean has no left or right
    codebook = torch.zeros(2, 48).view(2, 3, 4, 4)
    codebook[0, :, :, :2] = codebook[1, :, :, 2:] = 0.5
    sided = KMeansTokenizer(codebook.flatten(1), 4)  # which half of a patch is brighter
    left = np.random.default_rng(0).integers(0, 2, (4, 4, 4, 1), dtype=np.uint8)
    bright = np.concatenate([left, 1 - left], axis=3).reshape(4, 4, 8).repeat(4, axis=1).repeat(2, axis=2)
    pictures = noise(4, 16) // 4 + 128 * bright[..., None]
    assert (measured(sided, pictures, flip, geometry) == 0).all()


def test_a_resized_view_shows_the_same_place_larger_or_smaller() -> None:
    factors = [0.5, 0.8, 1.25, 2.0]
    geometry = Geometry.around(16, [], factors)
    assert geometry == Geometry(size=16, origin=8, side=32)
    ramp = np.broadcast_to((20 + 6 * np.arange(32))[:, None], (32, 32))
    pictures = np.repeat(ramp[None, :, :, None], 3, axis=3).astype(np.uint8)
    for factor in factors:
        view = Change(kind="resize", amount=factor).view(pictures, 8, 16)[0, :, 3, 0]
        places = 16 + (np.arange(16) + 0.5 - 8) / factor - 0.5
        inner = slice(2, -2)  # at a picture's edge a filter has less to go by
        np.testing.assert_allclose(view[inner], (20 + 6 * places)[inner], atol=1.01)
    halves = np.zeros((2, 32, 32, 3), np.uint8)
    halves[0, :, 16:] = halves[1, 16:] = 255
    changes = [Change(kind="resize", amount=factor) for factor in factors]
    assert (measured(mean_tokenizer(4, 2), halves, changes, geometry) == 1).all()


def test_the_smallest_picture_that_all_views_fit_in() -> None:
    assert Geometry.around(32, [0, 8], [0.9, 1.1]) == Geometry(size=32, origin=2, side=42)
    assert Geometry.around(32, [1], [0.5]) == Geometry(size=32, origin=16, side=64)
    assert Geometry.around(32, [0, 3], [1.1]) == Geometry(size=32, origin=0, side=35)


# Numbers


@given(st.integers(2, 7), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_the_chance_level_is_the_agreement_of_all_pairs_of_different_images(
    images: int, tokens: int, vocab_size: int, seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, vocab_size, (images, tokens))
    pairs = [(codes[i] == codes[j]).mean() for i in range(images) for j in range(images) if i != j]
    assert chance_level(codes) == pytest.approx(float(np.mean(pairs)), abs=1e-12)


def test_means_are_over_images_with_their_standard_error() -> None:
    changes = list_changes([0, 1, 2, 3], [1.1])
    shares = np.random.default_rng(0).random((5, len(changes)))
    agreement = Agreement(patch=2, changes=changes, shares=shares, codes=np.zeros((5, 4), np.int32))
    found = summarise(agreement)
    assert list(found) == [
        "shifts of whole tokens",
        "shifts below a token",
        "shifts between tokens",
        "mirror image",
        "resized by 1.1",
    ]
    for label, places in zip(found, [[2, 6, 10], [1, 5, 9], [3, 7, 11], [12], [13]], strict=True):
        each = [math.fsum(row[places]) / len(places) for row in shares]
        mean = math.fsum(each) / 5
        error = math.sqrt(math.fsum((share - mean) ** 2 for share in each) / 4 / 5)
        assert found[label] == pytest.approx((mean, error), rel=1e-9)
    assert summarise(replace(agreement, patch=4))["shifts of whole tokens"] is None


def test_neither_batches_nor_other_tokenizers_change_a_number() -> None:
    changes, geometry = list_changes([0, 1, 4], [0.9, 1.1]), Geometry.around(16, [4], [0.9, 1.1])
    pictures = noise(7, geometry.side)
    alone = measured(random_tokenizer(), pictures, changes, geometry)
    assert alone.shape == (7, len(changes))
    for batch in (1, 3):
        np.testing.assert_array_equal(measured(random_tokenizer(), pictures, changes, geometry, batch), alone)
    both = measure({"a": mean_tokenizer(4), "b": random_tokenizer()}, [pictures], changes, geometry)
    np.testing.assert_array_equal(both["b"].shares, alone)
    assert both["a"].patch == 4
    assert both["a"].codes[3].reshape(4, 4).tolist() == mean_codes(IDENTITY.view(pictures, 1, 16)[3], 4)


@pytest.mark.parametrize(
    ("patches", "expected"),
    [
        ([4], list(range(9))),
        ([16], list(range(0, 33, 2))),
        ([28], [*range(0, 57, 3), 28, 56]),
        ([8, 16], list(range(33))),
        ([1], [0, 1, 2]),
    ],
)
def test_shifts_reach_over_two_tokens_and_include_every_whole_one(patches: list[int], expected: list[int]) -> None:
    assert choose_shifts(patches) == sorted(set(expected))


# Which images


def shown(source: ImageSource, num: int, seed: int = 0) -> np.ndarray:
    return np.concatenate(list(Pictures(source, num=num, seed=seed).batches(6, 4)))


def test_images_are_drawn_with_the_seed_and_kept_in_order() -> None:
    source = random_source(count=30)
    every = shown(source, 30)
    assert len(every) == 30
    np.testing.assert_array_equal(shown(source, 1000), every)
    places = [
        [int((every == image).all((1, 2, 3)).argmax()) for image in shown(source, 10, seed)] for seed in (0, 0, 1)
    ]
    assert places[0] == places[1] == sorted(set(places[0]))
    assert places[0] != places[2]
    assert len(places[2]) == 10
    stream = replace(source, count=None, streaming=True)
    np.testing.assert_array_equal(shown(stream, 10), every[:10])


def test_broken_images_are_counted_and_left_out() -> None:
    def examples(start: int) -> Iterator[Example]:
        for index in range(start, 6):
            yield Example(b"no image" if index == 2 else Image.fromarray(noise(1, 4 + index, index)[0]), 0)

    source = replace(random_source(), count=6, examples=examples)
    with pytest.raises(
        UserError, match=r"1 of 6 images cannot be used, more than --max-skipped 0.1; .*image 2: not an im"
    ):
        list(Pictures(source, num=10, seed=0, max_skipped=0.1).batches(6, 64))
    pictures = Pictures(source, num=10, seed=0, max_skipped=0.2)
    (batch,) = pictures.batches(6, 64)
    assert batch.shape == (5, 6, 6, 3)
    assert (pictures.used, list(pictures.skipped.found), pictures.enlarged) == (5, [2], 2)
    np.testing.assert_array_equal(batch[2], np.asarray(Image.fromarray(noise(1, 7, 3)[0]).resize((6, 6), 3)))


def test_files_of_images_are_taken_from_their_beginning(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=noise(9, 6))
    source = open_pictures(str(tmp_path / "a.npz"))
    assert (source.count, source.size) == (9, 6)
    np.testing.assert_array_equal(shown(source, 4), noise(9, 6)[:4])


# The job


SMALL = InvarianceSettings(num=12, size=16, shifts=(0, 1, 2, 3), factors=(1.1,), shown=2)


def test_it_writes_all_numbers_the_curve_and_the_pictures(tmp_path: Path) -> None:
    tokenizers = {"random": random_tokenizer(), "means": mean_tokenizer(4)}
    result, found, _ = measure_invariance(tokenizers, "photos:test", tmp_path / "out", SMALL)
    out = tmp_path / "out"
    names = ["curve.json", "curve.png", "curve.svg", "invariance.csv", "invariance.json"]
    assert sorted(contents(out)) == [*names, "views.json", "views.png", "views.svg"]
    saved = json.loads((out / "invariance.json").read_text())
    assert saved == json.loads(json.dumps(result))
    assert saved["images"] == {
        "name": "photos:test",
        "content": "",
        "count": 12,
        "drawn": True,
        "skipped": 0,
        "skipped_images": [],
        "enlarged": 0,
        "sha256": saved["images"]["sha256"],
    }
    assert saved["settings"]["side"] == 19
    changes = list_changes(SMALL.shifts, SMALL.factors)
    for name, described in zip(tokenizers, saved["tokenizers"], strict=True):
        agreement = found[name]
        assert (described["name"], described["fingerprint"]) == (name, tokenizers[name].fingerprint)
        assert described["chance"] == agreement.chance
        assert [row["kind"] for row in described["changes"]] == [change.kind for change in changes]
        np.testing.assert_allclose([row["agreement"] for row in described["changes"]], agreement.shares.mean(0))
        assert described["changes"][0]["agreement"] == 1
    assert [row["tokens"] for row in saved["tokenizers"][0]["changes"][:4]] == [0, 0, 1, 1]
    with open(out / "invariance.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (len(changes) + 1)
    assert float(rows[2]["agreement"]) == saved["tokenizers"][0]["changes"][2]["agreement"]
    assert rows[-1] | {"agreement": ""} == {
        **dict.fromkeys(rows[0], ""),
        "tokenizer": "means",
        "change": "chance",
        "images": "12",
    }
    curves = json.loads((out / "curve.json").read_text())["series"]
    assert [label.split(" ")[0] for label in curves] == ["random", "means"]
    at_two = [found["random"].shares[:, place].mean() for place in (2, 6, 10)]
    assert next(iter(curves.values()))["y"][2] == pytest.approx(100 * np.mean(at_two))
    assert set(json.loads((out / "views.json").read_text())["share of equal tokens by image"]) == set(tokenizers)


def test_one_tokenizer_has_a_curve_for_each_direction_and_one_for_chance(tmp_path: Path) -> None:
    measure_invariance({"a": random_tokenizer()}, "photos:test", tmp_path / "out", replace(SMALL, shown=0))
    curves = json.loads((tmp_path / "out" / "curve.json").read_text())["series"]
    assert [label.split(" (")[0] for label in curves] == [*DIRECTIONS, "different images"]
    assert not (tmp_path / "out" / "views.png").exists()


def test_the_pictures_say_which_tokens_differ_and_which_have_no_counterpart() -> None:
    change = Change(kind="shift", direction="diagonal", amount=5)
    geometry = Geometry.around(16, [5], [])
    pictures = noise(3, geometry.side)
    differ = mark_differences(mean_tokenizer(4), pictures, change, geometry)
    views = [each.view(pictures, geometry.origin, 16) for each in (IDENTITY, change)]
    np.testing.assert_array_equal(views[0], pictures[:, :16, :16])
    np.testing.assert_array_equal(views[1], pictures[:, 5:, 5:])
    assert np.isnan(differ[0, :, 0]).all()
    assert np.isnan(differ[0, :, :, 0]).all()
    assert np.isnan(differ[1, :, 3]).all()
    for image in range(3):
        a, b = (np.array(mean_codes(view[image], 4)) for view in views)
        np.testing.assert_array_equal(differ[0, image, 1:, 1:], a[1:, 1:] != b[:-1, :-1])
        np.testing.assert_array_equal(differ[1, image, :-1, :-1], a[1:, 1:] != b[:-1, :-1])
    codes = torch.arange(16).view(1, 4, 4)
    assert compare(codes, codes, change.pairs(4, 4)).sum() == 0


# Mistakes


@pytest.mark.parametrize(
    ("images", "changes", "match"),
    [
        ("photos:test", {"size": 15}, "15 pixels cannot be cut into 4-pixel patches: choose another --size"),
        ("photos:test", {"shifts": (0, 15)}, "a shift of 15 pixels leaves nothing to compare .*: shift by at most 12"),
        ("photos:test", {"shown_shift": 15}, "a shift of 15 pixels leaves nothing to compare"),
        ("photo:test", {}, "photo:test does not exist: give a .npz file .* or an image source such as folder:PATH"),
        ("folder:nowhere", {}, "no such folder"),
        ("parquet:nowhere*.parquet", {}, "nowhere"),
    ],
)
def test_what_does_not_suit_is_refused_before_anything_is_written(
    tmp_path: Path, images: str, changes: dict[str, Any], match: str
) -> None:
    with refused_call(tmp_path, match):
        measure_invariance({"a": mean_tokenizer(4)}, images, tmp_path / "out", replace(SMALL, **changes))


def test_a_path_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariance, "measure", lambda *_, **__: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("")
    with refused_call(tmp_path, "cannot write .*file is not a folder"):
        measure_invariance({"a": mean_tokenizer(4)}, "photos:test", tmp_path / "file" / "out", SMALL)


@pytest.mark.parametrize("usable", [0, 1])
def test_fewer_than_two_usable_images_are_refused(tmp_path: Path, usable: int) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for index in range(3):
        (folder / f"{index}.png").write_bytes(b"no image")
    if usable:
        Image.fromarray(noise(1, 20)[0]).save(folder / "0.png")
    settings = replace(SMALL, max_skipped=1)
    with refused_call(tmp_path, "fewer than 2 images are usable: give more images"):
        measure_invariance({"a": mean_tokenizer(4)}, f"folder:{folder.parent}", tmp_path / "out", settings)


def test_images_that_are_left_out_stand_in_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):
        Image.fromarray(noise(1, 20, index)[0]).save(folder / f"{index}.png")
    (folder / "4.png").write_bytes(b"")
    Image.fromarray(noise(1, 20)[0]).save(folder / "x.webp")
    run = [f"folder:{folder}", tmp_path / "out", replace(SMALL, max_skipped=0.2)]
    result, _, _ = measure_invariance({"a": mean_tokenizer(4)}, *run)  # pyright: ignore[reportArgumentType]
    assert (result["images"]["count"], result["images"]["skipped"]) == (6, 1)
    assert result["images"]["skipped_images"] == [{"index": 4, "name": "4.png", "reason": "empty"}]
    assert result["notes"] == [f"folder:{folder}: 1 of 7 images cannot be used and are left out: 4.png (empty)"]
    (folder / "4.png").unlink()
    result, _, _ = measure_invariance({"a": mean_tokenizer(4)}, str(folder), tmp_path / "pngs", SMALL)
    assert (result["images"]["count"], result["images"]["skipped"]) == (5, 0)
    (note,) = result["notes"]
    assert note.startswith(
        f"{folder}: only its 5 PNGs are read, not 1 .webp; folder:{folder} reads images of all types"
    )
    assert f"note: {note}\n" in capsys.readouterr().err


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with refused_call(tmp_path, "out exists already .* choose another --out or remove it"):
        measure_invariance({"a": mean_tokenizer(4)}, "photos:test", tmp_path / "out", SMALL)


@pytest.fixture
def command(tmp_path: Path) -> list[str | Path]:
    for name, tokenizer in (("a", random_tokenizer()), ("b", mean_tokenizer(4))):
        tokenizer.save(tmp_path / name / "tokenizer")
    few = ["--images", "photos:test", "--num", "6", "--size", "16", "--factors", "1.1", "--device", "cpu"]
    return ["invariance", *few, "--out", tmp_path / "out"]


def test_two_tokenizers_by_command(tmp_path: Path, command: list[str | Path], capsys: Capture) -> None:
    both = [tmp_path / "a" / "tokenizer", tmp_path / "b" / "tokenizer"]
    main([str(a) for a in [*command, "--tokenizer", *both, "--names", "patches", "means", "--shifts", "0", "2", "4"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["equal", "tokens", "(%)", "patches", "means"]
    assert lines[1].split()[4:7] == ["100.0", "±", "0.0"]
    assert [line.split("  ")[0] for line in lines[2:7]] == [
        "shifts below a token",
        "shifts between tokens",
        "mirror image",
        "resized by 1.1",
        "different images",
    ]
    assert lines[2].split()[4] == "-"
    assert lines[8].startswith("6 images of photos:test (")
    saved = json.loads((tmp_path / "out" / "invariance.json").read_text())
    assert [each["name"] for each in saved["tokenizers"]] == ["patches", "means"]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--tokenizer", "nowhere"), "nowhere is not a tokenizer: no such folder or file"),
        (("--tokenizer", "A", "B", "--names", "x"), "--names x: give each of the 2 tokenizers a different name"),
        (("--tokenizer", "A", "B", "--names", "x", "x"), "--names x x: give each of the 2 tokenizers a different name"),
        (("--tokenizer", "A", "--num", "1"), "--num must be at least 2, not 1"),
        (("--tokenizer", "A", "--size", "0"), "--size must be at least 1, not 0"),
        (("--tokenizer", "A", "--shifts", "-1"), r"--shifts must be 0 or more, not \(-1,\)"),
        (("--tokenizer", "A", "--factors", "3"), r"--factors must lie in \[0.5, 2\], not \(3.0,\)"),
        (("--tokenizer", "A", "--batch-size", "0"), "--batch-size must be at least 1, not 0"),
        (("--tokenizer", "A", "--shown", "-1"), "--shown must be 0 or more, not -1"),
        (("--tokenizer", "A", "--seed", "-1"), r"--seed must lie in \[0, 18446744073709551615\], not -1"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, command: list[str | Path], capsys: Capture, more: tuple[str, ...], match: str
) -> None:
    places = {"A": tmp_path / "a" / "tokenizer", "B": tmp_path / "b" / "tokenizer"}
    refused(capsys, match, *command, *(places.get(word, word) for word in more))
    assert not (tmp_path / "out").exists()


def test_tokenizers_of_one_name_are_called_by_their_paths(
    tmp_path: Path, command: list[str | Path], capsys: Capture
) -> None:
    both = [str(tmp_path / name / "tokenizer") for name in "ab"]
    main([str(a) for a in [*command, "--tokenizer", *both, "--shifts", "0", "--shown", "0"]])
    assert capsys.readouterr().out.splitlines()[0].split()[3:] == both
