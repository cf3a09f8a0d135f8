"""Importing LlamaGen's folders of .npy files, also after an interruption."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from st_ar.data.llamagen import import_tokens
from st_ar.data.source import Crops
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from tests.disk import contents, refused

COUNT, VOCAB = 13, 50
ROOT = Path(__file__).parents[2]
TEN = Crops(kind="ten", size=1, range=1).names


def write_llamagen(root: Path, *, name: str = "codes", crops: int = 10, tokens: int = 9, seed: int = 0) -> np.ndarray:
    """Write as LlamaGen's extract_codes_c2i.py does; codes [n, crops, T]."""
    codes = np.random.default_rng(seed).integers(0, VOCAB, (COUNT, crops, tokens))
    for folder in (root / name, root / "labels"):
        folder.mkdir(parents=True, exist_ok=True)
    for index in range(COUNT):
        np.save(root / name / f"{index}.npy", codes[index][None])
        np.save(root / "labels" / f"{index}.npy", np.array([index % 4]))
    return codes


def imported(root: Path, **settings: Any) -> TokenStore:
    folders = {"codes": root / "codes", "labels": root / "labels", "out": root / "store", "images_per_shard": 5}
    return import_tokens(**(folders | {"vocab_size": VOCAB} | settings))


def all_codes(store: TokenStore) -> np.ndarray:
    crops = np.arange(len(store.meta.crops))[None].repeat(len(store), 0)
    return store.codes(np.arange(len(store)), crops)


def test_codes_and_labels_are_imported_in_order(tmp_path: Path) -> None:
    codes = write_llamagen(tmp_path)
    store = imported(tmp_path)
    store.verify()
    np.testing.assert_array_equal(all_codes(store), codes)
    assert store.labels.tolist() == [i % 4 for i in range(COUNT)]
    meta = store.meta
    assert (meta.grid, meta.vocab_size, meta.crops, meta.tokenizer) == (3, VOCAB, TEN, "")
    assert meta.class_names == ["0", "1", "2", "3"]
    assert [shard["images"] for shard in meta.shards] == [5, 5, 3]


def test_a_second_set_becomes_ten_more_crops(tmp_path: Path) -> None:
    first, second = write_llamagen(tmp_path), write_llamagen(tmp_path, name="codes_105", seed=1)
    store = imported(tmp_path, more_codes=tmp_path / "codes_105", num_classes=1000, tokenizer="abc")
    np.testing.assert_array_equal(all_codes(store), np.concatenate([first, second], axis=1))
    assert store.meta.crops == TEN + [f"second-{name}" for name in TEN]
    assert (len(store.meta.class_names), store.meta.tokenizer) == (1000, "abc")


def test_two_crops_are_the_centre_and_its_mirror_image(tmp_path: Path) -> None:
    codes = write_llamagen(tmp_path, crops=2)
    store = imported(tmp_path)
    assert store.meta.crops == ["center", "mirrored-center"]
    np.testing.assert_array_equal(all_codes(store), codes)


def test_truncated_files_are_left_out_and_listed(tmp_path: Path) -> None:
    codes = write_llamagen(tmp_path)
    whole = (tmp_path / "codes" / "7.npy").read_bytes()
    (tmp_path / "codes" / "7.npy").write_bytes(whole[:-10])
    (tmp_path / "codes" / "0.npy").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"1 of 13 images cannot be used, more than --max-skipped 0.01; the first is 0.npy"
    ):
        imported(tmp_path)
    store = imported(tmp_path, max_skipped=0.2)
    kept = [i for i in range(COUNT) if i not in (0, 7)]
    np.testing.assert_array_equal(all_codes(store), codes[kept])
    assert store.labels.tolist() == [i % 4 for i in kept]
    lines = [json.loads(line) for line in (tmp_path / "store" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["index"], line["name"]) for line in lines] == [(0, "0.npy"), (7, "7.npy")]


def test_files_that_were_repaired_are_imported_and_other_finished_shards_are_kept(tmp_path: Path) -> None:
    codes = write_llamagen(tmp_path)
    whole = {i: (tmp_path / "codes" / f"{i}.npy").read_bytes() for i in (1, 5, 9)}
    for i in whole:
        (tmp_path / "codes" / f"{i}.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"3 of 13 images cannot be used"):
        imported(tmp_path, max_skipped=0.2, images_per_shard=4)
    sums = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("codes-*.npy")}
    assert len(sums) == 2
    (tmp_path / "codes" / "5.npy").write_bytes(whole[5])
    store = imported(tmp_path, max_skipped=0.2, images_per_shard=4)
    kept = [i for i in range(COUNT) if i not in (1, 9)]
    np.testing.assert_array_equal(all_codes(store), codes[kept])
    lines = [json.loads(line) for line in (tmp_path / "store" / "skipped.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [1, 9]
    first, second = ((tmp_path / "store" / name).stat().st_mtime_ns == sums[name] for name in sorted(sums))
    assert (first, second) == (True, False)


def test_a_killed_import_continues_to_the_same_bytes(tmp_path: Path) -> None:
    write_llamagen(tmp_path)
    imported(tmp_path, out=tmp_path / "straight")
    code = (
        "import os, signal, st_ar.data.llamagen as l\n"
        "from tests.data.test_llamagen import *\n"
        "read = l._Folders.read\n"
        "l._Folders.read = lambda self, i: os.kill(os.getpid(), signal.SIGKILL) if i == 7 else read(self, i)\n"
        f"imported(Path({str(tmp_path)!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with refused(tmp_path, "unfinished token store: run the same `st-ar import-tokens` again"):
        TokenStore(tmp_path / "store")
    before = (tmp_path / "store" / "codes-00000-of-00003.npy").stat().st_mtime_ns
    with refused(tmp_path, "other settings: vocab_size was"):
        imported(tmp_path, vocab_size=60)
    imported(tmp_path)
    assert contents(tmp_path / "store") == contents(tmp_path / "straight")
    assert (tmp_path / "store" / "codes-00000-of-00003.npy").stat().st_mtime_ns == before


def test_folders_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_llamagen(tmp_path)
    write_llamagen(tmp_path, name="large", tokens=16)
    write_llamagen(tmp_path, name="oblong", tokens=8)
    (tmp_path / "empty").mkdir()
    for settings, match in [
        ({"codes": tmp_path / "nowhere"}, "nowhere: No such file or directory; give LlamaGen's folder"),
        ({"codes": tmp_path / "empty"}, "empty has no files 0.npy"),
        ({"codes": tmp_path / "labels"}, r"0.npy is \[1\], not \[1, crops, tokens\]: give LlamaGen"),
        ({"codes": tmp_path / "oblong"}, "has 8 tokens for each crop, not a square"),
        ({"more_codes": tmp_path / "large"}, "codes has 9 tokens for each crop, .*large has 16"),
        ({"labels": tmp_path / "large"}, r"0.npy is int64 \[1, 10, 16\], not one label"),
        ({"vocab_size": 30}, "has codes from . to .., outside --vocab-size 30"),
        ({"num_classes": 3}, "3.npy has label 3, outside --num-classes 3"),
    ]:
        with pytest.raises(UserError, match=match):
            imported(tmp_path, **({"out": tmp_path / "other" / match} | settings))
    for settings, match in [
        ({"vocab_size": 1 << 17}, "--vocab-size must lie between 1 and 65536"),
        ({"num_classes": 0}, "--num-classes must be 1 or more, not 0"),
    ]:
        with refused(tmp_path, match):
            imported(tmp_path, **settings)


def test_a_missing_file_or_one_of_another_shape_is_named(tmp_path: Path) -> None:
    write_llamagen(tmp_path)
    (tmp_path / "labels" / "5.npy").unlink()
    with refused(tmp_path, r"labels lacks 1 of the images that .*codes has, such as 5.npy"):
        imported(tmp_path)
    np.save(tmp_path / "labels" / "5.npy", np.array([1]))
    np.save(tmp_path / "codes" / "5.npy", np.zeros((1, 10, 16), np.int64))
    with pytest.raises(
        UserError, match=r"5.npy is int64 \[1, 10, 16\], but the folder's first file is integers \[1, 10, 9\]"
    ):
        imported(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    write_llamagen(tmp_path)
    np.save(tmp_path / "codes" / "2.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    store = imported(tmp_path, max_skipped=0.5)
    assert (len(store), store.meta.skipped) == (COUNT - 1, 1)
