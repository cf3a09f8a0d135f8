"""Parquet files, and data sets of the hub (from a folder in its layout, without a network)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from st_ar.data.images import open_images
from st_ar.data.tables import find_columns
from st_ar.errors import UserError
from tests.data.pictures import encoded, noise
from tests.disk import refused

NAMES = ["ant", "bee", "cow"]


def pictures(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": encoded(noise(seed=seed + i)), "path": f"{seed + i}.png"} for i in range(count)]


def table(count: int, label: Any = None, seed: int = 0) -> pyarrow.Table:
    """Images of noise, classes in turn, with the features that `datasets` writes into the schema."""
    label = label or datasets.ClassLabel(names=NAMES)
    features = datasets.Features({"img": datasets.Image(), "label": label, "note": datasets.Value("string")})
    rows = {"img": pictures(count, seed), "label": [i % 3 for i in range(count)], "note": ["x"] * count}
    return pyarrow.table(rows, schema=features.arrow_schema)


def write(path: Path, rows: pyarrow.Table, group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(rows, path, row_group_size=group)
    return path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two files, of 11 and 3 images."""
    write(tmp_path / "train-00000.parquet", table(11))
    write(tmp_path / "train-00001.parquet", table(3, seed=100))
    return tmp_path


def test_rows_of_all_files_come_in_order_with_the_names_of_the_schema(files: Path) -> None:
    source = open_images(f"parquet:{files}/train-*.parquet")
    assert (source.count, list(source.class_names)) == (14, NAMES)
    examples = list(source.examples(0))
    assert [example.label for example in examples] == [i % 3 for i in range(11)] + [0, 1, 2]
    assert (examples[0].name, examples[13].name) == ("train-00000.parquet:0", "train-00001.parquet:2")
    for example, seed in zip(examples, [*range(11), 100, 101, 102], strict=True):
        np.testing.assert_array_equal(np.asarray(example.read()), np.asarray(noise(seed=seed)))


@pytest.mark.parametrize("start", range(15))
def test_examples_from_an_index_are_the_rest_of_all_examples(files: Path, start: int) -> None:
    source = open_images(f"parquet:{files}/train-*.parquet")
    assert list(source.examples(start)) == list(source.examples(0))[start:]


def test_bare_numbers_are_named_by_themselves(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", table(5, datasets.Value("int64")))
    source = open_images(f"parquet:{path}")
    assert list(source.class_names) == ["0", "1", "2"]
    assert [example.label for example in source.examples(0)] == [0, 1, 2, 0, 1]


def test_plain_binary_columns_without_the_librarys_features(tmp_path: Path) -> None:
    rows = pyarrow.table({"jpg": [p["bytes"] for p in pictures(3)], "cls": [0, 2, 1], "json": ["{}"] * 3})
    source = open_images(f"parquet:{write(tmp_path / 'a.parquet', rows)}")
    assert [example.label for example in source.examples(0)] == [0, 2, 1]
    np.testing.assert_array_equal(np.asarray(next(source.examples(2)).read()), np.asarray(noise(seed=2)))


def test_a_row_without_an_image_becomes_empty(tmp_path: Path) -> None:
    rows = pyarrow.table({"image": [b"", None, pictures(1)[0]["bytes"]], "label": [0, 1, 2]})
    examples = list(open_images(f"parquet:{write(tmp_path / 'a.parquet', rows)}").examples(0))
    assert [example.image for example in examples[:2]] == [b"", b""]


IMAGE, LABEL = datasets.Image(), datasets.ClassLabel(names=NAMES)


@pytest.mark.parametrize(
    ("features", "options", "expected"),
    [
        ({"picture": IMAGE, "kind": LABEL}, {}, ("picture", "kind", NAMES)),
        ({"mask": IMAGE, "image": IMAGE, "label": LABEL}, {}, ("image", "label", NAMES)),
        ({"img": IMAGE, "id": datasets.Value("int64"), "class": LABEL}, {}, ("img", "class", NAMES)),
        ({"img": IMAGE, "id": datasets.Value("int64"), "labels": datasets.Value("int32")}, {}, ("img", "labels", [])),
        ({"img": IMAGE, "coarse_label": LABEL, "fine_label": LABEL}, {}, ("img", "fine_label", NAMES)),
        ({"img": IMAGE, "fine_label": LABEL, "coarse": LABEL}, {"label": "coarse"}, ("img", "coarse", NAMES)),
        ({"a": IMAGE, "b": IMAGE, "label": LABEL}, {"image": "b"}, ("b", "label", NAMES)),
        ({"img": IMAGE}, {"label": "none"}, ("img", None, ["all"])),
    ],
)
def test_columns_are_found_by_type_then_by_name(features: Any, options: dict[str, str], expected: Any) -> None:
    found = find_columns(datasets.Features(features), options, "x")
    assert (found.image, found.label, list(found.class_names)) == expected


@pytest.mark.parametrize(
    ("features", "options", "match"),
    [
        ({"label": LABEL}, {}, r"has no columns that could be its image: name one by x#image=COLUMN; it has label"),
        ({"img": IMAGE, "text": datasets.Value("string")}, {}, r"no columns that could be its label.*text \(string\)"),
        ({"a": IMAGE, "b": IMAGE, "label": LABEL}, {}, "has 2 columns that could be its image"),
        ({"img": IMAGE}, {}, r"no columns that could be its label: .*or #label=none to take all images as one class"),
        ({"img": IMAGE, "label": LABEL}, {"label": "lable"}, r"has no column 'lable': name one by .*; it has img"),
        (
            {"img": IMAGE, "label": datasets.Value("string")},
            {"label": "label"},
            r"column 'label' is string, but a label column holds whole numbers \(a ClassLabel or int\): .*#label=none",
        ),
        ({"img": IMAGE, "label": LABEL}, {"image": "label"}, "but an? image column holds images or the bytes of files"),
    ],
)
def test_ambiguous_columns_are_refused(features: Any, options: dict[str, str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        find_columns(datasets.Features(features), options, "x")


def test_options_follow_a_hash(files: Path) -> None:
    source = open_images(f"parquet:{files}/train-00000.parquet#image=img,label=none")
    assert (list(source.class_names), {example.label for example in source.examples(0)}) == (["all"], {0})
    with pytest.raises(UserError, match=r"unknown option 'size' after the # of .*: give image, label"):
        open_images(f"parquet:{files}/train-00000.parquet#size=3")


def test_unusable_parquet_files_are_refused(files: Path) -> None:
    with refused(files, r"\S+ is a folder; give its files in quotes: 'parquet:.*/\*.parquet'"):
        open_images(f"parquet:{files}")
    with refused(files, "matches no file here"):
        open_images(f"parquet:{files}/test-*.parquet")
    write(files / "other" / "b.parquet", table(3, datasets.ClassLabel(names=["x", "y", "z"])))
    with refused(files, r"train-00000.parquet and .*b.parquet have different columns or class names"):
        open_images(f"parquet:{files}/**/*.parquet")
    (files / "text.parquet").write_text("no table")
    with refused(files, "text.parquet is not a parquet file, or damaged"):
        open_images(f"parquet:{files}/text.parquet")
    whole = (files / "train-00000.parquet").read_bytes()
    (files / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with refused(files, "cut.parquet is not a parquet file, or damaged"):
        open_images(f"parquet:{files}/cut.parquet")
    ids = pyarrow.table({"image": [b"x"] * 3, "id": [100, 200, 300]})
    write(files / "ids.parquet", ids)
    with refused(files, "has numbers up to 300 in 'id' for 3 rows: these are not class indices"):
        open_images(f"parquet:{files}/ids.parquet")


def test_a_damaged_file_is_named(files: Path) -> None:
    source = open_images(f"parquet:{files}/train-*.parquet")
    path = files / "train-00000.parquet"
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4)
    path.write_bytes(data)
    with refused(files, "train-00000.parquet is damaged .*give the same command to continue"):
        list(source.examples(0))


def test_a_data_set_in_the_hubs_layout_is_streamed(tmp_path: Path) -> None:
    write(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", table(11))
    write(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", table(3, seed=100))
    source = open_images(f"hub:{tmp_path}/set")
    assert (source.count, source.streaming, list(source.class_names)) == (None, True, NAMES)
    assert [example.label for example in source.examples(0)] == [i % 3 for i in range(11)]
    assert list(source.examples(8)) == list(source.examples(0))[8:]
    test = list(open_images(f"hub:{tmp_path}/set:test").examples(0))
    np.testing.assert_array_equal(np.asarray(test[2].read()), np.asarray(noise(seed=102)))
    with pytest.raises(UserError, match=r"cannot open split 'validation': .*Check the name, the split"):
        open_images(f"hub:{tmp_path}/set:validation")


def test_the_hub_needs_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"hub:nobody/nothing: cannot open split 'train': .*network") as raised:
        open_images("hub:nobody/nothing")
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="needs the name of a data set"):
        open_images("hub:")


@pytest.mark.parametrize("spec", ["parquet:x.parquet", "hub:x"])
def test_without_the_library_its_extra_is_named(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'st-ar\[data\]'"):
        open_images(spec)


def test_the_library_is_not_imported_before_it_is_needed() -> None:
    code = "import sys; import st_ar.tokenizer.tokenize, st_ar.cli.train; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
