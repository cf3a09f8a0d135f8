"""Folders and tables as people have them: numbered classes, system folders, wrong levels, odd labels, paths inside tables."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from st_ar.cli import main
from st_ar.data.images import open_images, with_num_classes
from st_ar.data.source import Crops
from st_ar.data.store import TokenStore, same_names
from st_ar.errors import UserError
from st_ar.evaluation.probe import require_classes
from st_ar.tokenizer.kmeans import KMeansTokenizer
from st_ar.tokenizer.tokenize import tokenize

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def picture(path: Path, grey: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(path)
    return path


def table(path: Path, labels: Sequence[object], images: Sequence[object] | None = None, column: str = "label") -> Path:
    """A parquet file with an 8 x 8 image, of its row's grey level, for each label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if images is None:
        rows = [picture(path.parent / f".{row}.png", row).read_bytes() for row in range(len(labels))]
        images = [{"bytes": data, "path": None} for data in rows]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    content = {"image": pyarrow.array(images, kind), column: pyarrow.array(labels, pyarrow.int64())}
    parquet.write_table(pyarrow.table(content), path)
    return path


def tokens(source: str, out: Path, max_skipped: float = 0.01, num_classes: int | None = None) -> TokenStore:
    images = open_images(source)
    if num_classes is not None:
        images = with_num_classes(images, num_classes)
    codebook = torch.linspace(-1, 1, 9)[:, None].repeat(1, 48)
    crops = Crops(kind="center", size=8, range=1.0)
    return tokenize(images, KMeansTokenizer(codebook, 4), crops, out, max_skipped=max_skipped)


def noted(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("st-ar: note: ") for line in lines)
    return [line.removeprefix("st-ar: note: ") for line in lines]


# Numbered classes


def test_numbered_folders_are_sorted_as_numbers_and_agree_with_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in range(12):
        picture(tmp_path / "pictures" / str(label) / "a.png", label)
    source = open_images(f"folder:{tmp_path / 'pictures'}")
    assert source.class_names == [str(label) for label in range(12)]
    labels = {example.name: example.label for example in source.examples(0)}
    assert labels == {f"{label}/a.png": label for label in range(12)}
    assert noted(capsys) == [
        f"folder:{tmp_path / 'pictures'}: all classes are numbers and are sorted as numbers, from 0 to 11"
    ]
    other = open_images(f"parquet:{table(tmp_path / 'a.parquet', range(12))}")
    assert same_names(source.class_names, other.class_names)


@pytest.mark.parametrize(
    ("ours", "theirs", "agree"),
    [
        (["0", "1", "10", "2"], ["0", "1", "2", "3"], False),
        (["1", "2", "3"], ["0", "1", "2"], False),
        (["0", "1", "2"], ["0", "1", "2"], True),
        (["cat", "dog"], ["0", "1"], True),
        (["0", "1"], ["n01440764", "n01443537"], True),
        (["cat", "dog"], ["1", "0"], False),
        (["café", "dog"], [unicodedata.normalize("NFD", "café"), "dog"], True),
        (["cat"], ["0", "1"], False),
    ],
)
def test_lists_of_numbers_must_be_equal(ours: list[str], theirs: list[str], agree: bool) -> None:
    assert same_names(ours, theirs) is agree
    assert same_names(theirs, ours) is agree


def test_a_part_without_the_last_classes_takes_their_number(tmp_path: Path) -> None:
    store = tokens(f"parquet:{table(tmp_path / 'a.parquet', [0, 2, 1])}", tmp_path / "out", num_classes=10)
    assert store.meta.class_names == [str(label) for label in range(10)]
    picture(tmp_path / "named/cat/a.png")
    with pytest.raises(UserError, match=r"--num-classes 10 is for classes that are numbers.* are cat: leave"):
        with_num_classes(open_images(f"folder:{tmp_path / 'named'}"), 10)
    with pytest.raises(UserError, match="--num-classes 2 is for classes that are numbers from 0 to at most 1"):
        with_num_classes(open_images(f"parquet:{tmp_path / 'a.parquet'}"), 2)


# Folders that are no classes, and classes at another level


def test_folders_of_the_system_are_skipped_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "pictures"
    for place in (
        "cat/a.png",
        "dog/b.png",
        "__MACOSX/cat/a.png",
        "@eaDir/c.png",
        "dog/@eaDir/b.png",
        "$RECYCLE.BIN/d.png",
    ):
        picture(root / place)
    (root / "lost+found").mkdir(mode=0)
    source = open_images(f"folder:{root}")
    assert source.class_names == ["cat", "dog"]
    assert [(e.name, e.label) for e in source.examples(0)] == [("cat/a.png", 0), ("dog/b.png", 1)]
    (said,) = noted(capsys)
    assert (
        said
        == f"folder:{root}: skipped folders that are not classes: $RECYCLE.BIN, @eaDir, __MACOSX, dog/@eaDir, lost+found"
    )


def test_a_class_without_images_is_named_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "pictures/ant/a.png")
    picture(tmp_path / "pictures/cat/a.png")
    (tmp_path / "pictures/bee").mkdir()
    store = tokens(f"folder:{tmp_path / 'pictures'}", tmp_path / "out")
    said = f"folder:{tmp_path / 'pictures'}: 1 of 3 classes have no images: bee"
    assert noted(capsys) == [said]
    assert store.meta.class_names == ["ant", "bee", "cat"]
    assert json.loads((tmp_path / "out/meta.json").read_text())["notes"] == [said]


@pytest.mark.parametrize(
    ("places", "meant"),
    [
        (("train/cat/a.png", "train/dog/b.png", "test/cat/c.png"), "train"),
        (("imagenet/n01/a.png", "imagenet/n02/b.png"), "imagenet"),
        (("val/cat/a.png", "extra/cat/b.png", "empty"), "extra"),
    ],
)
def test_one_level_too_high_names_the_path_that_was_meant(tmp_path: Path, places: Sequence[str], meant: str) -> None:
    for place in places:
        if "." in place:
            picture(tmp_path / place)
        else:
            (tmp_path / place).mkdir()
    with pytest.raises(
        UserError, match=rf"no images directly in its sub-folders .*: give folder:{tmp_path / meant} if"
    ):
        open_images(f"folder:{tmp_path}")


def test_images_may_lie_deeper_where_some_class_has_images_of_its_own(tmp_path: Path) -> None:
    picture(tmp_path / "cat/2020/a.png")
    picture(tmp_path / "dog/a.png")
    assert [e.name for e in open_images(f"folder:{tmp_path}").examples(0)] == ["cat/2020/a.png", "dog/a.png"]


def test_names_in_two_unicode_forms_are_one_name(tmp_path: Path) -> None:
    composed, decomposed = "café", unicodedata.normalize("NFD", "café")
    picture(tmp_path / "one" / decomposed / "a.png")
    picture(tmp_path / "one" / "cab" / "a.png")
    picture(tmp_path / "one" / "cafz" / "a.png")
    assert open_images(f"folder:{tmp_path / 'one'}").class_names == ["cab", "cafz", composed]
    for name in (composed, decomposed):
        picture(tmp_path / "two" / name / "a.png")
    with pytest.raises(UserError, match=f"two folders called '{composed}'"):
        open_images(f"folder:{tmp_path / 'two'}")


# Tables


@pytest.mark.parametrize("odd", [-1, None, 7])
def test_an_image_with_an_odd_label_is_skipped_and_counted(tmp_path: Path, odd: int | None) -> None:
    features: Mapping[str, object] = {
        "label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"},
        "image": {"_type": "Image"},
    }
    path = table(tmp_path / "a.parquet", [0, 1, odd, 2])
    schema = parquet.read_table(path)
    described = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    parquet.write_table(schema.replace_schema_metadata(described), path)
    store = tokens(f"parquet:{path}", tmp_path / "out", max_skipped=0.25)
    assert store.labels.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(store.center_codes(np.arange(3)).shape[:1], (3,))
    (line,) = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    label = "no label" if odd in (-1, None) else f"label {odd}"
    assert json.loads(line) == {
        "index": 2,
        "name": "a.parquet:2",
        "reason": f"{label}, outside the 3 classes (a split without labels? #label=none takes all as one class)",
    }
    with pytest.raises(
        UserError, match=r"1 of 4 images cannot be used, more than --max-skipped 0.01; .*a split without labels"
    ):
        tokens(f"parquet:{path}", tmp_path / "strict")


@pytest.mark.parametrize("name", ["run[1]/a.parquet", "what?.parquet", "all*.parquet"])
def test_a_path_that_exists_is_no_pattern(tmp_path: Path, name: str) -> None:
    path = table(tmp_path / name, [0, 1, 2])
    table(tmp_path / "run1/a.parquet", [0, 1])
    table(tmp_path / "whatx.parquet", [0, 1])
    table(tmp_path / "allx.parquet", [0, 1])
    assert open_images(f"parquet:{path}").count == 3


def test_paths_in_a_table_begin_where_the_table_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "data/imgs/0.png", 200)
    picture(tmp_path / "imgs/0.png", 0)  # of this name in the working directory: not the one that is meant
    far = picture(tmp_path / "far away.png", 100)
    paths = ["imgs/0.png", str(far), far.as_uri(), "imgs/missing.png"]
    path = table(tmp_path / "data/a.parquet", [0, 1, 0, 1], [{"bytes": None, "path": place} for place in paths])
    monkeypatch.chdir(tmp_path)
    store = tokens(f"parquet:{path}", tmp_path / "out", max_skipped=0.5)
    codes = store.center_codes(np.arange(3))[:, 0].tolist()
    assert codes == [round(200 / 255 * 8), round(100 / 255 * 8), round(100 / 255 * 8)]
    (line,) = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"index": 3, "name": "a.parquet:3", "reason": "No such file or directory"}


def test_a_table_that_points_to_the_network_is_refused(tmp_path: Path) -> None:
    rows = [{"bytes": None, "path": "https://example.org/a.png"}]
    path = table(tmp_path / "a.parquet", [0], rows)
    with pytest.raises(
        UserError, match=r"a.parquet:0 refers to https://example.org/a.png, which is not on this disk: download"
    ):
        list(open_images(f"parquet:{path}").examples(0))


@pytest.mark.parametrize("labels", [[0, 11, 3, 4, 2, 1], [999, 0]])
def test_a_small_table_of_a_set_with_many_classes_is_taken(tmp_path: Path, labels: list[int]) -> None:
    source = open_images(f"parquet:{table(tmp_path / 'a.parquet', labels)}")
    assert len(source.class_names) == max(labels) + 1
    with pytest.raises(UserError, match="these are not class indices"):
        open_images(f"parquet:{table(tmp_path / 'ids.parquet', labels, column='id')}")


def test_tokenizing_shows_how_many_images_the_classes_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path / "a.parquet", [0, 1, 1, 1])
    main(f"train-tokenizer kmeans --images parquet:{path} --vocab-size 4 --size 8 --out {tmp_path / 'km'}".split())
    capsys.readouterr()
    common = f"--images parquet:{path} --tokenizer {tmp_path / 'km'} --crops center --size 8 --workers 0"
    main(f"tokenize {common} --num-classes 3 --out {tmp_path / 'out'}".split())
    assert (
        capsys.readouterr().out.strip()
        == f"{tmp_path / 'out'}: 4 images x 1 crop x 2 x 2 tokens; 3 classes of 0 to 3 images, none of 2"
    )


def test_images_that_were_mended_are_in_the_store_that_is_finished_later(tmp_path: Path) -> None:
    for label in range(6):
        picture(tmp_path / f"pictures/{'ab'[label % 2]}/{label}.png", 40 * label)
    whole = (tmp_path / "pictures/a/2.png").read_bytes()
    (tmp_path / "pictures/a/2.png").write_bytes(whole[:50])
    (tmp_path / "pictures/b/5.png").write_bytes(b"")
    source = open_images(f"folder:{tmp_path / 'pictures'}")
    crops = Crops(kind="center", size=8, range=1.0)
    codebook = KMeansTokenizer(torch.linspace(-1, 1, 9)[:, None].repeat(1, 48), 4)

    def run(max_skipped: float) -> TokenStore:
        return tokenize(source, codebook, crops, tmp_path / "out", images_per_shard=2, max_skipped=max_skipped)

    with pytest.raises(UserError, match=r"2 of 6 images cannot be used"):
        run(0.2)
    made = {path.name for path in (tmp_path / "out").glob("sums-*")}
    assert len(made) == 2  # the first lacks a/2.png
    (tmp_path / "pictures/a/2.png").write_bytes(whole)
    with pytest.raises(UserError, match=r"1 of 6 images cannot be used.* is b/5.png: empty"):
        run(0.0)
    store = run(0.2)
    assert store.labels.tolist() == [0, 0, 0, 1, 1]
    assert store.meta.skipped == 1
    (line,) = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "b/5.png"


def test_testing_on_the_training_images_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path / "a.parquet", [0, 1, 0, 1])
    ten = tokenize(
        open_images(f"parquet:{path}"),
        KMeansTokenizer(torch.linspace(-1, 1, 9)[:, None].repeat(1, 48), 4),
        Crops(kind="ten", size=8, range=1.0),
        tmp_path / "ten",
    )
    center = tokens(f"parquet:{path}", tmp_path / "center")
    other = tokens(f"parquet:{table(tmp_path / 'b.parquet', [0, 1, 1, 1])}", tmp_path / "other")
    require_classes(ten, other)
    assert noted(capsys) == []
    require_classes(ten, center)
    said = f"{center.folder} has the images of {ten.folder}: results on it are results on training images"
    assert noted(capsys) == [said]
