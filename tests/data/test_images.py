"""Folders, and the embedded sources, derived again from the photographs and the digits."""

import os
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from sklearn.datasets import load_digits

from st_ar.data.images import PHOTOGRAPHS, open_images
from st_ar.data.source import Crops
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.tokenizer.tokenize import tokenize
from tests.data.pictures import encoded
from tests.disk import refused
from tests.small_line import random_tokenizer

Origins = dict[bytes, list[tuple[np.ndarray, int]]]


def images_and_labels(spec: str) -> tuple[np.ndarray, np.ndarray]:
    examples = list(open_images(spec).examples(0))
    return np.stack([np.asarray(example.image) for example in examples]), np.array([e.label for e in examples])


def photograph(package_and_file: str) -> np.ndarray:
    """A photograph with a short side of 320 pixels."""
    package, _, path = package_and_file.partition("/")
    with files(package).joinpath(path).open("rb") as file:
        photo = Image.open(file).convert("RGB")
    width, height = (round(side * 320 / min(photo.size)) for side in photo.size)
    return np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC))


def blocks(pixels: np.ndarray, *, test: bool) -> list[np.ndarray]:
    """The 80-pixel blocks of one split; every fourth diagonal belongs to the test split."""
    return [
        pixels[80 * row : 80 * row + 80, 80 * column : 80 * column + 80]
        for row in range(pixels.shape[0] // 80)
        for column in range(pixels.shape[1] // 80)
        if ((row + column) % 4 == 3) == test
    ]


def sketch(patch: np.ndarray) -> bytes:
    """Every fifth pixel of a patch [36, 36, 3], as a key to look up its possible origins."""
    return patch.transpose(2, 0, 1)[:, ::5, ::5].tobytes()


def patch_origins(blocks: list[np.ndarray]) -> Origins:
    """Sketch -> the blocks, and the positions of 45 x 45 in them, of patches with this sketch."""
    origins: Origins = {}
    for block in blocks:
        windows = sliding_window_view(block, (36, 36), axis=(0, 1))  # (45, 45, 3, 36, 36)
        for position, key in enumerate(windows[..., ::5, ::5].reshape(45 * 45, -1)):
            origins.setdefault(key.tobytes(), []).append((block, position))
    return origins


def is_cut_from(patch: np.ndarray, origins: Origins) -> bool:
    for block, position in origins.get(sketch(patch), []):
        top, left = divmod(position, 45)
        if np.array_equal(block[top : top + 36, left : left + 36], patch):
            return True
    return False


@pytest.mark.parametrize(("split", "count", "per_block"), [("train", 8208, 36), ("test", 1900, 25)])
def test_every_photo_patch_is_cut_from_one_block_of_its_split(split: str, count: int, per_block: int) -> None:
    patches, labels = images_and_labels(f"photos:{split}")
    assert patches.shape == (count, 36, 36, 3)
    for label, location in enumerate(PHOTOGRAPHS.values()):
        allowed = blocks(photograph(location), test=split == "test")
        cut = patches[labels == label]
        assert len(cut) == per_block * len(allowed)
        if label % 4 == 1:  # one in four: looking up the patches takes a while
            origins = patch_origins(allowed)
            assert all(is_cut_from(patch, origins) for patch in cut), location


def test_no_textured_test_patch_occurs_in_a_training_block() -> None:
    patches, labels = images_and_labels("photos:test")
    for name in ("grass", "gravel", "coffee"):  # others have plain backgrounds, which look the same everywhere
        origins = patch_origins(blocks(photograph(PHOTOGRAPHS[name]), test=False))
        cut = patches[labels == list(PHOTOGRAPHS).index(name)]
        assert len(cut) > 0
        assert not any(is_cut_from(patch, origins) for patch in cut), name


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


def test_sources_have_default_crops() -> None:
    photos, digits = open_images("photos"), open_images("digits")
    assert (photos.size, photos.crop_range, photos.mirror) == (32, 1.125, True)
    assert (digits.size, digits.crop_range, digits.mirror) == (32, 1.125, False)  # a mirrored digit is not a digit
    assert list(digits.class_names) == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("spec", ["photos", "photos:", "photos:train"])
def test_the_training_split_is_the_default(spec: str) -> None:
    source = open_images(spec)
    assert (source.name, source.count) == ("photos:train", 8208)


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown image source 'fotos:train'.*photos.*digits"):
        open_images("fotos:train")


@pytest.mark.parametrize("spec", ["pictures", "pictures/cats"])
def test_a_folder_without_its_prefix_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"unknown image source '{spec}': give folder:PATH"):
        open_images(spec)
    Path(spec).mkdir(parents=True)
    with pytest.raises(
        UserError, match=f"unknown image source '{spec}': did you mean folder:{spec}[?] Give folder:PATH"
    ):
        open_images(spec)


@pytest.mark.parametrize("spec", ["photos:validation", "digits:validation", "digits:Train"])
def test_an_unknown_split_is_refused_with_the_known_ones(spec: str) -> None:
    kind, _, split = spec.partition(":")
    with pytest.raises(UserError, match=rf"{kind} has no split '{split}': give {kind}:train or {kind}:test"):
        open_images(spec)


def plain(colour: str) -> bytes:
    return encoded(Image.new("RGB", (4, 4), colour))


def make_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    names = ["dog/b.PNG", "dog/a.jpeg", "dog/2020/z.png", "Cat/1.webp", "Cat/10.webp", "Cat/9.webp", "eel/x.tif"]
    rest = ["dog/readme.txt", "dog/.hidden.png", ".git/x.png", "Cat/.DS_Store", "LICENSE"]
    return make_folder(tmp_path / "animals", {name: plain("red") for name in [*names, *rest]})


def test_classes_and_images_come_in_the_order_of_their_names(animals: Path) -> None:
    source = open_images(f"folder:{animals}")
    assert source.class_names == ["Cat", "dog", "eel"]
    found = [(example.name, example.label) for example in source.examples(0)]
    assert found == [
        ("Cat/1.webp", 0),
        ("Cat/10.webp", 0),
        ("Cat/9.webp", 0),
        ("dog/a.jpeg", 1),
        ("dog/b.PNG", 1),
        ("dog/2020/z.png", 1),
        ("eel/x.tif", 2),
    ]
    assert source.count == 7
    assert [example.name for example in source.examples(5)] == ["dog/2020/z.png", "eel/x.tif"]


def test_names_that_are_not_utf8_are_escaped_and_their_images_read(tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9")
    make_folder(tmp_path / latin, {f"{latin}/{latin}.png": plain("red"), "été/1.png": plain("blue")})
    source = open_images(f"folder:{tmp_path / latin}")
    assert source.name == f"folder:{tmp_path}/caf\\xe9"
    assert source.class_names == ["été", "caf\\xe9"] or source.class_names == ["caf\\xe9", "été"]
    found = {example.name: np.asarray(example.read())[0, 0].tolist() for example in source.examples(0)}
    assert found == {"caf\\xe9/caf\\xe9.png": [255, 0, 0], "été/1.png": [0, 0, 255]}
    tokenizer = random_tokenizer()
    out = tmp_path / "store"
    tokenize(source, tokenizer, Crops(kind="center", size=6, range=1.0), out)
    assert TokenStore(out).meta.class_names == list(source.class_names)


def test_images_are_read_from_their_files(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a/1.png": plain("red"), "b/1.png": plain("blue")})
    colours = [np.asarray(example.read())[0, 0].tolist() for example in open_images(f"folder:{tmp_path}").examples(0)]
    assert colours == [[255, 0, 0], [0, 0, 255]]


def test_large_images_are_cropped_as_in_llamagen_by_default(animals: Path) -> None:
    source = open_images(f"folder:{animals}")
    assert (source.size, source.range_for("ten"), source.range_for("center"), source.mirror) == (256, 1.1, 1.0, True)
    photos = open_images("photos")
    assert photos.range_for("ten") == photos.range_for("center") == 1.125


def test_a_class_without_images_keeps_its_index(animals: Path) -> None:
    (animals / "cow").mkdir()
    source = open_images(f"folder:{animals}")
    assert source.class_names == ["Cat", "cow", "dog", "eel"]
    assert [example.label for example in source.examples(0)] == [0, 0, 0, 2, 2, 2, 3]


def test_links_are_followed_and_cycles_end(animals: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "elsewhere", {"1.png": plain("red")})
    (animals / "fox").symlink_to(tmp_path / "elsewhere")
    (animals / "dog" / "again").symlink_to(animals / "dog")
    source = open_images(f"folder:{animals}")
    assert source.class_names == ["Cat", "dog", "eel", "fox"]
    assert [example.name for example in source.examples(6)] == ["eel/x.tif", "fox/1.png"]
    assert source.count == 8


def test_a_folder_of_images_without_sub_folders_is_one_class(tmp_path: Path) -> None:
    source = open_images(f"folder:{make_folder(tmp_path / 'faces', {'b.png': plain('red'), 'a.png': plain('red')})}")
    assert source.class_names == ["faces"]
    assert [(example.name, example.label) for example in source.examples(0)] == [("a.png", 0), ("b.png", 0)]


def test_the_content_changes_with_the_names_of_the_images(animals: Path) -> None:
    before = open_images(f"folder:{animals}").content
    assert open_images(f"folder:{animals}").content == before
    (animals / "eel/x.tif").rename(animals / "eel/y.tif")
    assert open_images(f"folder:{animals}").content != before


def test_the_home_folder_is_found(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(animals.parent))
    assert open_images("folder:~/animals").count == 7


def test_mistakes_are_explained(animals: Path, tmp_path: Path) -> None:
    with refused(tmp_path, "nowhere: no such folder; give the one with a sub-folder for each class"):
        open_images(f"folder:{tmp_path / 'nowhere'}")
    with refused(tmp_path, "folder: needs a path"):
        open_images("folder:")
    with refused(tmp_path, "no such folder"):
        open_images(f"folder:{animals / 'LICENSE'}")
    (animals / "stray.png").write_bytes(plain("red"))
    with refused(tmp_path, "has 1 images beside its 3 sub-folders, such as stray.png: move them"):
        open_images(f"folder:{animals}")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with refused(tmp_path, "has no images in 1 sub-folders: looked for .*jpg"):
        open_images(f"folder:{tmp_path / 'empty'}")
