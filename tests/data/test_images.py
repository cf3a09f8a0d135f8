"""The embedded image sources, re-derived from the photographs and the digits themselves."""

from importlib.resources import files

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from sklearn.datasets import load_digits

from st_ar.data.images import PHOTOGRAPHS, open_images
from st_ar.errors import UserError

Places = dict[bytes, list[tuple[np.ndarray, int]]]


def images_and_labels(spec: str) -> tuple[np.ndarray, np.ndarray]:
    examples = list(open_images(spec).examples(0))
    return np.stack([np.asarray(example.image) for example in examples]), np.array([e.label for e in examples])


def photograph(package_and_file: str) -> np.ndarray:
    """A photograph with its short side at 320 pixels."""
    package, _, path = package_and_file.partition("/")
    with files(package).joinpath(path).open("rb") as file:
        photo = Image.open(file).convert("RGB")
    width, height = (round(side * 320 / min(photo.size)) for side in photo.size)
    return np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC))


def blocks(pixels: np.ndarray, *, test: bool) -> list[np.ndarray]:
    """The 80-pixel blocks of one split: those on every fourth diagonal are for testing."""
    return [
        pixels[80 * row : 80 * row + 80, 80 * column : 80 * column + 80]
        for row in range(pixels.shape[0] // 80)
        for column in range(pixels.shape[1] // 80)
        if ((row + column) % 4 == 3) == test
    ]


def sketch(patch: np.ndarray) -> bytes:
    """Every fifth pixel of a patch [36, 36, 3]: enough to look up where it may have been cut."""
    return patch.transpose(2, 0, 1)[:, ::5, ::5].tobytes()


def places_inside(some_blocks: list[np.ndarray]) -> Places:
    """Sketch -> the blocks, and the places of 45 x 45 within them, that a patch with this sketch lies wholly inside."""
    places: Places = {}
    for block in some_blocks:
        windows = sliding_window_view(block, (36, 36), axis=(0, 1))  # (45, 45, 3, 36, 36)
        for place, key in enumerate(windows[..., ::5, ::5].reshape(45 * 45, -1)):
            places.setdefault(key.tobytes(), []).append((block, place))
    return places


def is_cut_from(patch: np.ndarray, places: Places) -> bool:
    for block, place in places.get(sketch(patch), []):
        top, left = divmod(place, 45)
        if np.array_equal(block[top : top + 36, left : left + 36], patch):
            return True
    return False


@pytest.mark.parametrize(("split", "count", "per_block"), [("train", 8208, 36), ("test", 1900, 25)])
def test_every_photo_patch_lies_inside_one_block_of_its_split(split: str, count: int, per_block: int) -> None:
    patches, labels = images_and_labels(f"photos:{split}")
    assert patches.shape == (count, 36, 36, 3)
    for label, place in enumerate(PHOTOGRAPHS.values()):
        allowed = blocks(photograph(place), test=split == "test")
        places = places_inside(allowed)
        of_this_photo = patches[labels == label]
        assert len(of_this_photo) == per_block * len(allowed)
        assert all(is_cut_from(patch, places) for patch in of_this_photo), place


def test_no_textured_test_patch_can_be_found_in_a_block_for_training() -> None:
    patches, labels = images_and_labels("photos:test")
    for name in ("grass", "gravel", "coffee"):  # others have plain backgrounds, alike wherever they are cut
        places = places_inside(blocks(photograph(PHOTOGRAPHS[name]), test=False))
        of_this_photo = patches[labels == list(PHOTOGRAPHS).index(name)]
        assert len(of_this_photo) > 0
        assert not any(is_cut_from(patch, places) for patch in of_this_photo), name


@pytest.mark.parametrize("split", ["train", "test"])
def test_photos_are_16_classes_each_with_patches(split: str) -> None:
    source = open_images(f"photos:{split}")
    labels = images_and_labels(f"photos:{split}")[1]
    assert list(source.class_names) == list(PHOTOGRAPHS)
    assert set(labels.tolist()) == set(range(16))
    assert source.count == len(labels)


def test_photos_come_in_an_order_that_never_changes() -> None:
    # Tokens on disk and results in docs/ belong to this order.
    assert images_and_labels("photos:train")[1][:12].tolist() == [9, 3, 7, 9, 1, 6, 10, 6, 3, 1, 3, 0]
    assert images_and_labels("photos:test")[1][:12].tolist() == [8, 12, 3, 4, 7, 9, 8, 13, 8, 3, 15, 7]


@pytest.mark.parametrize("kind", ["photos", "digits"])
def test_examples_from_an_index_are_the_rest_of_all_examples(kind: str) -> None:
    source = open_images(f"{kind}:test")
    everything = [(np.asarray(e.image).tobytes(), e.label) for e in source.examples(0)]
    start = source.count - 7
    assert [(np.asarray(e.image).tobytes(), e.label) for e in source.examples(start)] == everything[start:]


@pytest.mark.parametrize(("split", "chosen"), [("train", slice(0, 1297)), ("test", slice(1297, 1797))])
def test_digits_are_dark_on_white_with_a_border_of_two(split: str, chosen: slice) -> None:
    data = load_digits()
    images, labels = images_and_labels(f"digits:{split}")
    assert labels.tolist() == data.target[chosen].tolist()
    assert images.shape == (open_images(f"digits:{split}").count, 36, 36, 3)
    for image, grey_levels in list(zip(images, data.images[chosen], strict=True))[::50]:
        expected = Image.new("L", (36, 36), 255)
        small = Image.fromarray(np.round(255 - grey_levels * 255 / 16).astype(np.uint8))
        expected.paste(small.resize((32, 32), Image.Resampling.BICUBIC), (2, 2))
        for channel in range(3):
            np.testing.assert_array_equal(image[..., channel], np.asarray(expected))


def test_sources_say_how_they_want_to_be_cropped() -> None:
    photos, digits = open_images("photos"), open_images("digits")
    assert (photos.size, photos.crop_range, photos.mirror) == (32, 1.125, True)
    assert (digits.size, digits.crop_range, digits.mirror) == (32, 1.125, False)  # a mirrored digit is another sign
    assert list(digits.class_names) == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("spec", ["photos", "photos:", "photos:train"])
def test_the_training_split_is_the_default(spec: str) -> None:
    source = open_images(spec)
    assert (source.name, source.count) == ("photos:train", 8208)


def test_an_unknown_source_is_named_with_the_ones_there_are() -> None:
    with pytest.raises(UserError, match=r"unknown image source 'fotos:train'.*photos.*digits"):
        open_images("fotos:train")


@pytest.mark.parametrize("spec", ["photos:validation", "digits:validation", "digits:Train"])
def test_an_unknown_split_is_named_with_the_ones_there_are(spec: str) -> None:
    kind, _, split = spec.partition(":")
    with pytest.raises(UserError, match=rf"{kind} has no split '{split}': give {kind}:train or {kind}:test"):
        open_images(spec)
