"""A folder of class sub-folders: which images, in which order, of which class."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from st_ar.data.images import open_images
from st_ar.data.source import Crops
from st_ar.data.store import TokenStore
from st_ar.tokenizer.tokenize import tokenize
from tests.data.pictures import encoded
from tests.disk import refused
from tests.small_line import random_tokenizer


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


def test_names_that_are_no_text_are_escaped_and_their_images_read(tmp_path: Path) -> None:
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


def test_large_images_are_cropped_as_llamagen_does_unless_told(animals: Path) -> None:
    source = open_images(f"folder:{animals}")
    assert (source.size, source.range_for("ten"), source.range_for("center"), source.mirror) == (256, 1.1, 1.0, True)
    photos = open_images("photos")
    assert photos.range_for("ten") == photos.range_for("center") == 1.125


def test_a_class_without_images_keeps_its_index(animals: Path) -> None:
    (animals / "cow").mkdir()
    source = open_images(f"folder:{animals}")
    assert source.class_names == ["Cat", "cow", "dog", "eel"]
    assert [example.label for example in source.examples(0)] == [0, 0, 0, 2, 2, 2, 3]


def test_links_are_followed_and_circles_end(animals: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "elsewhere", {"1.png": plain("red")})
    (animals / "fox").symlink_to(tmp_path / "elsewhere")
    (animals / "dog" / "again").symlink_to(animals / "dog")
    source = open_images(f"folder:{animals}")
    assert source.class_names == ["Cat", "dog", "eel", "fox"]
    assert [example.name for example in source.examples(6)] == ["eel/x.tif", "fox/1.png"]
    assert source.count == 8


def test_a_folder_of_images_alone_is_one_class(tmp_path: Path) -> None:
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
    with refused(tmp_path, "nowhere: no such folder; give the one that holds a sub-folder for each class"):
        open_images(f"folder:{tmp_path / 'nowhere'}")
    with refused(tmp_path, "folder: needs a path"):
        open_images("folder:")
    with refused(tmp_path, "no such folder"):
        open_images(f"folder:{animals / 'LICENSE'}")
    (animals / "stray.png").write_bytes(plain("red"))
    with refused(tmp_path, "has 1 images beside its 3 sub-folders, such as stray.png: move them"):
        open_images(f"folder:{animals}")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with refused(tmp_path, "holds no images in 1 sub-folders: looked for .*jpg"):
        open_images(f"folder:{tmp_path / 'empty'}")
