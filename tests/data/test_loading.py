"""Batches of crops: a function of (seed, step), with every image once an epoch."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from st_ar.data import loading as module
from st_ar.data.images import open_images
from st_ar.data.loading import CropLoader
from st_ar.data.source import Example, ImageSource, center_crop
from st_ar.distributed import Ranks
from st_ar.errors import UserError
from tests.data.pictures import encoded, noise

SIZE, SIDE, COUNT = 4, 6, 30
ONE_IMAGE = SIDE**2 * 3
WHOLE, WINDOWED = 1 << 20, 8 * ONE_IMAGE  # with spans of 4 images, a window has two


def picture(index: int) -> np.ndarray:
    """An image whose pixels encode their row in red, their column in green and the image's index in blue."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return np.stack([rows, columns, np.full_like(rows, index)], axis=-1).astype(np.uint8)


def pictures(count: int = COUNT, **changes: Any) -> ImageSource:
    def examples(start: int) -> Iterator[Example]:
        for index in range(start, count):
            yield Example(Image.fromarray(picture(index)), 0, f"no. {index}")

    source = ImageSource(
        name="pictures", class_names=["a"], count=count, examples=examples, size=SIZE, crop_range=1.5, mirror=True
    )
    return replace(source, **changes)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPAN", 4)
    monkeypatch.setattr(module, "CHUNK", 3)


def opened(source: ImageSource | None = None, **settings: Any) -> CropLoader:
    settings = {"size": SIZE, "crop_range": 1.5, "mirror": True, "batch_size": 6, "seed": 0, "workers": 0} | settings
    return CropLoader(source or pictures(), **settings)


def batches(steps: range, source: ImageSource | None = None, **settings: Any) -> list[Tensor]:
    with opened(source, **settings) as pixels:
        return [pixels.batch(step) for step in steps]


def numbers(images: Tensor) -> list[int]:
    """The indices of the cropped images."""
    return images[:, 0, 0, 2].tolist()


def taken(count: int, source: ImageSource | None = None, *, batch_size: int = 6, **settings: Any) -> list[int]:
    """The indices of the first `count` training images."""
    steps = range(-(-count // batch_size))
    return numbers(torch.cat(batches(steps, source, batch_size=batch_size, **settings)))[:count]


def places(images: Tensor) -> list[tuple[int, int, bool]]:
    """(top, left, mirrored) of crops of `picture`, each of which is checked to be that crop, pixel for pixel."""
    found: list[tuple[int, int, bool]] = []
    for crop in images.numpy():
        mirrored = bool(crop[0, 0, 1] > crop[0, -1, 1])
        top, left = int(crop[0, 0, 0]), int(crop[..., 1].min())
        cut = picture(crop[0, 0, 2])[top : top + SIZE, left : left + SIZE]
        np.testing.assert_array_equal(crop, cut[:, ::-1] if mirrored else cut)
        found.append((top, left, mirrored))
    return found


READINGS = {
    "whole": {"memory": WHOLE},
    "windows": {"memory": WINDOWED},
    "stream": {"memory": WINDOWED, "source": pictures(streaming=True)},
}


# A function of (seed, step)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("first", [1, 4, 5, 7, 13])
def test_a_resumed_run_gets_the_same_batches(reading: str, first: int) -> None:
    straight = batches(range(16), **READINGS[reading])
    later = batches(range(first, 16), **READINGS[reading])
    for expected, found in zip(straight[first:], later, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("reading", READINGS)
def test_batches_can_be_read_in_any_order(reading: str) -> None:
    straight = batches(range(12), **READINGS[reading])
    with opened(**READINGS[reading]) as pixels:
        for step in (11, 0, 6, 5, 5, 10):
            assert torch.equal(pixels.batch(step), straight[step])


def test_preparing_changes_no_batch() -> None:
    for settings in READINGS.values():
        straight = batches(range(8), **settings)
        with opened(**settings) as pixels:
            pixels.prepare(3)
            assert torch.equal(pixels.batch(3), straight[3])
            assert torch.equal(pixels.batch(4), straight[4])


@pytest.mark.parametrize("reading", READINGS)
def test_another_seed_gives_other_images_and_other_crops(reading: str) -> None:
    first, other = (torch.cat(batches(range(5), **READINGS[reading], seed=seed)) for seed in (0, 1))
    assert numbers(first) != numbers(other)
    assert places(first) != places(other)


# Every image once an epoch


@pytest.mark.parametrize("reading", READINGS)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 9), spans=st.integers(1, 3))
def test_every_image_comes_once_an_epoch(reading: str, count: int, batch_size: int, seed: int, spans: int) -> None:
    memory = WHOLE if reading == "whole" else spans * 4 * ONE_IMAGE
    source = pictures(count, streaming=reading == "stream")
    found = taken(3 * count, source, batch_size=batch_size, seed=seed, memory=memory)
    for epoch in range(3):
        assert sorted(found[epoch * count : (epoch + 1) * count]) == list(range(count))


@pytest.mark.parametrize("reading", READINGS)
def test_each_epoch_has_another_order(reading: str) -> None:
    found = taken(4 * COUNT, **READINGS[reading])
    orders = {tuple(found[epoch * COUNT : (epoch + 1) * COUNT]) for epoch in range(4)}
    assert len(orders) == 4
    assert tuple(range(COUNT)) not in orders


def windows(found: list[int]) -> list[list[int]]:
    """An epoch's images by windows of 8."""
    return [found[start : start + 8] for start in range(0, len(found), 8)]


def test_a_window_mixes_spans_from_all_over_the_source() -> None:
    found = windows(taken(32, pictures(32), memory=WINDOWED))
    for window in found:
        spans = [number // 4 for number in window]
        assert sorted(Counter(spans).values()) == [4, 4]
        assert sum(a != b for a, b in pairwise(spans)) > 1  # mixed, not one after the other
    assert any(max(window) - min(window) > 8 for window in found)


def test_the_spans_of_a_window_differ_from_epoch_to_epoch() -> None:
    found = taken(64, pictures(32), memory=WINDOWED)
    first, second = (
        {frozenset(number // 4 for number in window) for window in windows(epoch)} for epoch in (found[:32], found[32:])
    )
    assert first != second


def test_a_streams_windows_follow_one_another() -> None:
    found = taken(2 * COUNT, **READINGS["stream"])
    for epoch in (found[:COUNT], found[COUNT:]):
        assert [sorted(window) for window in windows(epoch)] == windows(list(range(COUNT)))


def test_a_stream_is_read_once_an_epoch() -> None:
    asked: list[int] = []
    read: list[int] = []

    def examples(start: int) -> Iterator[Example]:
        asked.append(start)
        for index in range(start, COUNT):
            read.append(index)
            yield Example(Image.fromarray(picture(index)), 0)

    taken(2 * COUNT, pictures(streaming=True, examples=examples), memory=WINDOWED)
    assert read[: 2 * COUNT] == [*range(COUNT), *range(COUNT)]
    assert asked in ([0, 0], [0, 0, 0])  # the third epoch's first window may be under way already


def test_a_source_that_fits_is_read_once() -> None:
    asked: list[int] = []

    def examples(start: int) -> Iterator[Example]:
        asked.append(start)
        return pictures().examples(start)

    taken(3 * COUNT, pictures(examples=examples), memory=COUNT * ONE_IMAGE)
    assert asked == [0]


# Crops


def test_all_crops_are_equally_likely_and_half_are_mirrored() -> None:
    found = places(torch.cat(batches(range(150))))
    assert len(found) == 900
    counts = Counter((top, left) for top, left, _ in found)
    assert sorted(counts) == [(top, left) for top in range(3) for left in range(3)]
    assert all(abs(count - 100) < 38 for count in counts.values())  # four standard deviations
    assert abs(sum(mirrored for *_, mirrored in found) - 450) < 60


@pytest.mark.parametrize(("setting", "source"), [(False, True), (True, False), (False, False)])
def test_without_mirroring_the_crops_are_the_same_but_unmirrored(setting: bool, source: bool) -> None:
    plain = places(torch.cat(batches(range(10), pictures(mirror=source), mirror=setting)))
    mirrored = places(torch.cat(batches(range(10))))
    assert [place[:2] for place in plain] == [place[:2] for place in mirrored]
    assert not any(place[2] for place in plain)
    assert any(place[2] for place in mirrored)


def test_a_crop_range_of_1_is_the_centre_crop() -> None:
    (found,) = batches(range(1), crop_range=1.0, mirror=False, batch_size=COUNT)
    for crop in found:
        np.testing.assert_array_equal(crop[..., :2], center_crop(Image.fromarray(picture(0)), SIZE)[..., :2])


def test_crops_are_cut_from_the_resized_image() -> None:
    images = [noise(31, 19, seed) for seed in range(5)]
    source = pictures(count=5, examples=lambda start: (Example(image, 0) for image in images[start:]), mirror=False)
    (found,) = batches(range(1), source, size=8, crop_range=1.25, batch_size=5)
    resized = [center_crop(image, 10) for image in images]
    cuts = {p[top:, left:][:8, :8].tobytes(): i for i, p in enumerate(resized) for top in range(3) for left in range(3)}
    assert sorted(cuts[crop.numpy().tobytes()] for crop in found) == list(range(5))


@pytest.mark.parametrize(("size", "crop_range", "side"), [(256, 1.1, 281), (32, 1.125, 36), (10, 1.1, 11), (8, 1, 8)])
def test_the_side_before_cropping(size: int, crop_range: float, side: int) -> None:
    assert opened(size=size, crop_range=crop_range).side == side


# Ranks and workers


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_ranks_batches_joined_are_those_of_one(reading: str, world: int) -> None:
    alone = batches(range(11), **READINGS[reading])
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(opened(**READINGS[reading], ranks=Ranks(rank=rank, world=world)))
            for rank in range(world)
        ]
        for step, expected in enumerate(alone):
            parts = [rank.batch(step) for rank in ranks]
            assert {len(part) for part in parts} == {6 // world}
            assert torch.equal(torch.cat(parts), expected)


def test_a_rank_decodes_only_its_own_images_of_a_window() -> None:
    decoded: list[int] = []

    def examples(start: int) -> Iterator[Example]:
        for index in range(start, COUNT):
            yield Example(encoded(Image.fromarray(picture(index))), 0, str(index))

    with opened(pictures(examples=examples), memory=WINDOWED, ranks=Ranks(rank=1, world=2)) as pixels:
        decode = pixels._decoder.decode

        def watched(chunks: Any) -> Iterator[Any]:
            for chunk, result in decode(chunks):
                decoded.extend(int(example.name) for example in chunk)
                yield chunk, result

        pixels._decoder.decode = watched
        mine = numbers(torch.cat([pixels.batch(step) for step in range(5)]))
    assert len(mine) == COUNT // 2
    assert sorted(decoded[: COUNT // 2]) == sorted(mine)  # what follows is the second epoch's


def in_files(broken: tuple[int, ...] = (), **changes: Any) -> ImageSource:
    """The pictures as PNG files in memory; those in `broken` are truncated."""

    def examples(start: int) -> Iterator[Example]:
        for index in range(start, COUNT):
            data = encoded(Image.fromarray(picture(index)))
            yield Example(data[:50] if index in broken else data, 0, f"{index}.png")

    return pictures(examples=examples, **changes)


def test_workers_change_no_batch_and_no_list_of_broken_images() -> None:
    found: list[tuple[list[Tensor], dict[int, str]]] = []
    for workers in (0, 2):
        with opened(in_files(broken=(3, 17)), memory=WINDOWED, workers=workers) as pixels:
            found.append(([pixels.batch(step) for step in range(5)], pixels.broken))
    (alone, listed), (helped, also_listed) = found
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert sorted(listed) == [3, 17]
    assert {index: also_listed[index] for index in listed} == listed


# Broken images


@pytest.mark.parametrize("memory", [WHOLE, WINDOWED])
@pytest.mark.parametrize("streaming", [False, True])
def test_broken_images_are_listed_and_replaced(memory: int, streaming: bool) -> None:
    broken = (2, 5, 6, 21)
    with opened(in_files(broken, streaming=streaming), memory=memory) as pixels:
        found = torch.cat([pixels.batch(step) for step in range(5)])
        assert sorted(pixels.broken) == list(broken)
        assert all(reason.startswith(f"{index}.png: ") for index, reason in pixels.broken.items())
    places(found)  # all are intact pictures
    counts = Counter(numbers(found))
    assert set(counts) == set(range(COUNT)) - set(broken)
    assert sum(counts.values()) == COUNT


@pytest.mark.parametrize(("broken", "fine"), [(15, True), (16, False)])
def test_more_broken_images_than_whole_ones_are_refused(broken: int, fine: bool) -> None:
    with opened(in_files(tuple(range(broken)))) as pixels:
        if fine:
            assert min(numbers(pixels.batch(0))) >= 15
        else:
            with pytest.raises(
                UserError, match=r"pictures: 16 of 30 images cannot be read, such as 0\.png: .*; repair"
            ):
                pixels.batch(0)


@pytest.mark.parametrize(("reading", "missed"), [("whole", "24"), ("windows", "(24|29)"), ("stream", "24")])
def test_a_source_that_ends_early_is_refused(reading: str, missed: str) -> None:
    short = pictures(streaming=reading == "stream", examples=pictures(23).examples)  # 30 announced, 23 there
    message = rf"pictures ended before image {missed} of 30: it has changed or is damaged"
    with pytest.raises(UserError, match=message):
        taken(COUNT, short, memory=READINGS[reading]["memory"])


def test_the_number_of_images_must_be_known() -> None:
    with pytest.raises(UserError, match="pictures has an unknown number of images: give a folder"):
        opened(pictures(count=None))
    assert opened(pictures(count=None, expected=20)).images == 20
    assert sorted(taken(20, replace(pictures(), count=None, expected=20))) == list(range(20))


def test_a_real_folder(tmp_path: Path) -> None:
    for index in range(6):
        path = tmp_path / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(Image.fromarray(picture(index))))
    source = open_images(f"folder:{tmp_path}")
    assert sorted(taken(6, source, batch_size=3)) == list(range(6))
