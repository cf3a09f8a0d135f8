"""Tokenizing a source, also with broken images, workers, streams and interruptions."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from st_ar.data.images import open_images
from st_ar.data.source import Crops, Example, ImageSource
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.tokenizer import to_pixels
from st_ar.tokenizer.kmeans import KMeansTokenizer
from st_ar.tokenizer.tokenize import tokenize
from tests.data.pictures import encoded
from tests.disk import contents, full_disk, refused

COUNT, PER_SHARD = 11, 4
TEN = Crops(kind="ten", size=8, range=1.25)
ROOT = Path(__file__).parents[2]


def tiny_tokenizer(seed: int = 0, vocab_size: int = 32) -> KMeansTokenizer:
    codebook = torch.rand(vocab_size, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return KMeansTokenizer(codebook, patch=4)


def tiny_source(*, killed_after: int = COUNT, name: str = "noise:train") -> ImageSource:
    """Images of noise. Reading the image `killed_after` kills the process."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 12, 10, 3), np.uint8)
    labels = rng.integers(0, 3, COUNT)

    def examples(start: int) -> Iterator[Example]:
        for index in range(start, COUNT):
            if index == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield Example(Image.fromarray(images[index]), int(labels[index]))

    return ImageSource(
        name=name, class_names=["a", "b", "c"], count=COUNT, examples=examples, size=8, crop_range=1.25, mirror=True
    )


def tokenize_tiny(out: Path, *, killed_after: int = COUNT, crops: Crops = TEN, batch_size: int = 16) -> TokenStore:
    source = tiny_source(killed_after=killed_after)
    return tokenize(source, tiny_tokenizer(), crops, out, batch_size=batch_size, images_per_shard=PER_SHARD)


def tokenize_and_be_killed(out: Path, *, killed_after: int) -> None:
    """The same job in a process that kills itself."""
    code = (
        f"from tests.tokenizer.test_tokenize import *; tokenize_tiny(Path({str(out)!r}), killed_after={killed_after})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job killed in the second of three shards."""
    out = tmp_path_factory.mktemp("killed") / "store"
    tokenize_and_be_killed(out, killed_after=PER_SHARD + 2)
    return out


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the same job without a kill."""
    out = tmp_path_factory.mktemp("straight") / "store"
    tokenize_tiny(out)
    return contents(out)


@pytest.fixture
def unfinished(half_done: Path, tmp_path: Path) -> Path:
    """A copy of the killed job."""
    out = tmp_path / "store"
    out.mkdir()
    for name, data in contents(half_done).items():
        (out / name).write_bytes(data)
    return out


def test_every_crop_of_every_image_is_encoded(tmp_path: Path) -> None:
    store = tokenize_tiny(tmp_path / "store")
    for index, example in enumerate(tiny_source().examples(0)):
        cut = TEN.cut(example.image)
        expected = tiny_tokenizer().encode(to_pixels(torch.from_numpy(cut.copy()))).flatten(1)
        found = store.codes(np.array([index]), np.arange(10)[None])[0]
        np.testing.assert_array_equal(found, expected.numpy())
        assert store.labels[index] == example.label


def test_the_store_describes_itself(tmp_path: Path) -> None:
    store = tokenize_tiny(tmp_path / "store")
    store.verify()
    meta = store.meta
    assert (meta.source, meta.tokenizer) == ("noise:train", tiny_tokenizer().fingerprint)
    assert (meta.vocab_size, meta.grid, meta.images) == (32, 2, COUNT)
    assert (meta.crops, meta.class_names) == (TEN.names, ["a", "b", "c"])
    assert [shard["images"] for shard in meta.shards] == [4, 4, 3]
    assert sorted(contents(tmp_path / "store")) == sorted(
        ["meta.json", *(f"{what}-{index:05d}-of-00003.npy" for what in ("codes", "labels") for index in range(3))]
    )


def test_the_batch_size_does_not_change_a_byte(tmp_path: Path) -> None:
    tokenize_tiny(tmp_path / "large", batch_size=1000)
    tokenize_tiny(tmp_path / "small", batch_size=1)
    assert contents(tmp_path / "large") == contents(tmp_path / "small")


def test_center_crops_of_digits(tmp_path: Path) -> None:
    digits = open_images("digits:test")
    crops = Crops(kind="center", size=digits.size, range=digits.crop_range, mirror=digits.mirror)
    store = tokenize(digits, tiny_tokenizer(), crops, tmp_path / "store")
    examples = list(digits.examples(0))
    assert store.labels.tolist() == [example.label for example in examples]
    middle = torch.from_numpy(np.stack([np.asarray(example.image)[2:34, 2:34] for example in examples]))
    expected = tiny_tokenizer().encode(to_pixels(middle)).flatten(1).numpy()
    np.testing.assert_array_equal(store.codes(np.arange(500), np.zeros((500, 1), int))[:, 0], expected)


def test_a_killed_job_is_recognised_as_unfinished(unfinished: Path) -> None:
    assert (unfinished / "job.json").exists()
    with refused(unfinished, "is an unfinished token store: run the same `st-ar tokenize` again"):
        TokenStore(unfinished)


def test_a_killed_job_continues_to_the_same_bytes(unfinished: Path, straight: dict[str, bytes]) -> None:
    tokenize_tiny(unfinished)
    assert contents(unfinished) == straight


def test_a_killed_job_never_rewrites_a_finished_shard(unfinished: Path) -> None:
    finished = [unfinished / f"{what}-00000-of-00003.npy" for what in ("codes", "labels")]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in finished]
    tokenize_tiny(unfinished)
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in finished] == before


@pytest.mark.parametrize("lost", [("sums",), ("labels", "sums")], ids=str)
def test_a_job_killed_before_a_shard_was_complete_continues(
    unfinished: Path, tmp_path: Path, lost: tuple[str, ...]
) -> None:
    tokenize_tiny(tmp_path / "straight")
    for what in lost:
        next(unfinished.glob(f"{what}-00000-of-00003.*")).unlink()
    tokenize_tiny(unfinished)
    assert contents(unfinished) == contents(tmp_path / "straight")


def test_a_job_killed_while_it_removed_its_files_is_completed(unfinished: Path, tmp_path: Path) -> None:
    left = {path.name: path.read_bytes() for path in (unfinished / "job.json", *unfinished.glob("sums-*.json"))}
    assert len(left) > 1
    tokenize_tiny(tmp_path / "straight")
    tokenize_tiny(unfinished)
    for name, content in left.items():
        (unfinished / name).write_bytes(content)
    tokenize_tiny(unfinished)
    assert contents(unfinished) == contents(tmp_path / "straight")


def test_half_written_files_of_a_killed_job_are_removed(unfinished: Path, tmp_path: Path) -> None:
    tokenize_tiny(tmp_path / "straight")
    (unfinished / ".codes-00001-of-00003.npy.partial").write_bytes(b"half")
    tokenize_tiny(unfinished)
    assert contents(unfinished) == contents(tmp_path / "straight")


OTHERS = {
    "source": {"source": tiny_source(name="noise:test")},
    "tokenizer": {"tokenizer": tiny_tokenizer(seed=1)},
    "crops": {"crops": Crops(kind="center", size=8, range=1.25)},
    "crops ": {"crops": Crops(kind="ten", size=8, range=1.25, mirror=False)},
    "size": {"crops": Crops(kind="ten", size=4, range=1.25)},
    "range": {"crops": Crops(kind="ten", size=8, range=1.5)},
    "images_per_shard": {"images_per_shard": 5},
}


@pytest.mark.parametrize("what", OTHERS)
def test_an_unfinished_job_is_not_continued_with_other_settings(unfinished: Path, what: str) -> None:
    settings = {"source": tiny_source(), "tokenizer": tiny_tokenizer(), "crops": TEN, "images_per_shard": PER_SHARD}
    with refused(unfinished, rf"begun with other settings: .*{what.strip()} was .*, now .*Give the old ones"):
        tokenize(out=unfinished, **(settings | OTHERS[what]))


def test_a_finished_store_is_not_overwritten(tmp_path: Path) -> None:
    tokenize_tiny(tmp_path / "store")
    with refused(tmp_path, "is a finished token store already: choose another --out or remove it"):
        tokenize_tiny(tmp_path / "store")


@pytest.mark.parametrize(("taken", "out"), [("thesis.tex", "."), ("store", "store")])
def test_other_files_are_not_overwritten(tmp_path: Path, taken: str, out: str) -> None:
    (tmp_path / taken).write_text("precious")
    with refused(tmp_path, "exists already and is not empty: a token store is never overwritten; choose another --out"):
        tokenize_tiny(tmp_path / out)


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    assert len(tokenize_tiny(tmp_path)) == COUNT


def test_crops_that_do_not_fit_the_patches_are_refused(tmp_path: Path) -> None:
    with refused(tmp_path, "images of 10 pixels cannot be cut into 4-pixel patches: choose another --size"):
        tokenize_tiny(tmp_path / "store", crops=Crops(kind="ten", size=10, range=1.2))
    assert not (tmp_path / "store").exists()


def test_a_codebook_too_large_for_16_bits_is_refused(tmp_path: Path) -> None:
    large = KMeansTokenizer(torch.zeros((1 << 16) + 1, 3), patch=1)
    with refused(tmp_path, "a codebook of 65537 does not fit the store's 16-bit codes"):
        tokenize(tiny_source(), large, TEN, tmp_path / "store")


# Broken images, workers, streams


BROKEN = (2, 5, 6)


def mixed_source(**changes: Any) -> ImageSource:
    """The tiny source as files in memory, three of them truncated."""
    whole = list(tiny_source().examples(0))

    def examples(start: int) -> Iterator[Example]:
        for index in range(start, COUNT):
            data = encoded(whole[index].read())
            yield Example(data[:60] if index in BROKEN else data, whole[index].label, f"{index}.png")

    return dataclasses.replace(tiny_source(), **({"examples": examples} | changes))


def tokenize_mixed(out: Path, source: ImageSource | None = None, **settings: Any) -> TokenStore:
    settings = {"batch_size": 16, "images_per_shard": PER_SHARD, "max_skipped": 0.5} | settings
    return tokenize(source or mixed_source(), tiny_tokenizer(), TEN, out, **settings)


def skipped_lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def test_broken_images_are_left_out_and_listed(tmp_path: Path) -> None:
    everything = tokenize_tiny(tmp_path / "whole")
    store = tokenize_mixed(tmp_path / "store")
    store.verify()
    kept = [index for index in range(COUNT) if index not in BROKEN]
    assert store.labels.tolist() == everything.labels[kept].tolist()
    crops = np.arange(10)[None].repeat(len(kept), 0)
    np.testing.assert_array_equal(store.codes(np.arange(len(kept)), crops), everything.codes(np.array(kept), crops))
    assert ([shard["images"] for shard in store.meta.shards], store.meta.skipped) == ([3, 2, 3], 3)
    lines = skipped_lines(tmp_path / "store")
    assert [(line["index"], line["name"]) for line in lines] == [(i, f"{i}.png") for i in BROKEN]
    assert all(line["reason"] for line in lines)
    assert len(contents(tmp_path / "store")) == 2 * 3 + 2  # shards, meta.json and skipped.jsonl


def test_a_shard_of_broken_images_is_empty(tmp_path: Path) -> None:
    store = tokenize_mixed(tmp_path / "store", images_per_shard=1)
    assert [shard["images"] for shard in store.meta.shards] == [int(i not in BROKEN) for i in range(COUNT)]
    assert store.codes(np.arange(8), np.zeros((8, 1), int)).shape == (8, 1, 4)


def test_too_many_broken_images_end_the_job_and_lose_nothing(tmp_path: Path) -> None:
    out = tmp_path / "store"
    with pytest.raises(
        UserError, match=r"2 of 11 images cannot be used, more than --max-skipped 0.1; the first is 2.png"
    ):
        tokenize_mixed(out, max_skipped=0.1)
    assert [line["index"] for line in skipped_lines(out)] == [2, 5]
    finished = out / "codes-00000-of-00003.npy"
    before = finished.stat().st_mtime_ns
    assert len(tokenize_mixed(out, max_skipped=0.3)) == 8  # the same command, with more allowed
    assert finished.stat().st_mtime_ns == before
    tokenize_mixed(tmp_path / "straight")
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_bounds_is_refused(tmp_path: Path, share: float) -> None:
    with refused(tmp_path, f"--max-skipped must lie in .0, 1., not {share}"):
        tokenize_mixed(tmp_path / "store", max_skipped=share)


def test_a_source_without_a_usable_image_is_refused(tmp_path: Path) -> None:
    source = mixed_source(count=1, examples=lambda start: iter([Example(b"", 0, "nothing.png")][start:]))
    with pytest.raises(
        UserError, match=r"noise:train has no usable image; .*skipped.jsonl gives the reasons: repair them"
    ):
        tokenize_mixed(tmp_path / "store", source, max_skipped=1)


def test_an_image_too_narrow_to_be_enlarged_is_skipped(tmp_path: Path) -> None:
    thin = [Example(Image.new("RGB", (1, 1_000_000)), 0, "thin"), Example(Image.new("RGB", (9, 9)), 0, "good")]
    tokenize_mixed(tmp_path / "store", mixed_source(count=2, examples=lambda start: iter(thin[start:])))
    (line,) = skipped_lines(tmp_path / "store")
    assert (line["name"], "10 x 10000000 pixels are more than the limit" in str(line["reason"])) == ("thin", True)


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    tokenize_mixed(tmp_path / "without")
    tokenize_mixed(tmp_path / "with", workers=2, batch_size=10)
    assert contents(tmp_path / "with") == contents(tmp_path / "without")


class Deadly:
    """Ends the process that unpickles it, like a crash of a decoder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_the_death_of_a_worker_is_reported_with_a_remedy(tmp_path: Path) -> None:
    def examples(start: int) -> Iterator[Example]:
        for index in range(start, COUNT):
            yield Example(Deadly() if index == 6 else encoded(Image.new("RGB", (9, 9))), 0, str(index))

    with pytest.raises(UserError, match=r"one of 2 decoding processes died.*fewer --workers"):
        tokenize_mixed(tmp_path / "store", mixed_source(examples=examples), workers=2)
    assert (tmp_path / "store" / "labels-00000-of-00003.npy").exists()


def test_workers_end_when_the_job_is_killed(tmp_path: Path) -> None:
    code = (
        "from tests.tokenizer.test_tokenize import *\n"
        "if __name__ == '__main__':\n"
        f"    source = tiny_source(killed_after={PER_SHARD + 2})\n"
        f"    tokenize(source, tiny_tokenizer(), TEN, Path({str(tmp_path / 'store')!r}), images_per_shard={PER_SHARD}, workers=2)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        output, _ = job.communicate(timeout=60)  # returns when the last worker has closed the pipe
    assert job.returncode == -signal.SIGKILL, output
    tokenize_tiny(tmp_path / "store")
    tokenize_tiny(tmp_path / "straight")
    assert contents(tmp_path / "store") == contents(tmp_path / "straight")


@pytest.mark.parametrize("per_shard", [3, 4, 11, 100])
def test_a_stream_of_unknown_length_gives_the_same_codes(tmp_path: Path, per_shard: int) -> None:
    stream = mixed_source(count=None, streaming=True, class_names=[])
    store = tokenize_mixed(tmp_path / "stream", stream, images_per_shard=per_shard)
    known = tokenize_mixed(tmp_path / "known", images_per_shard=per_shard)
    assert store.fingerprint == known.fingerprint
    assert store.meta.class_names == [str(label) for label in range(int(known.labels.max()) + 1)]
    assert [shard["codes"] for shard in store.meta.shards] == [f"codes-{i:05d}.npy" for i in range(-(-11 // per_shard))]


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_a_stopped_stream_continues(tmp_path: Path, finished: int) -> None:
    stream = mixed_source(count=None, streaming=True)
    tokenize_mixed(tmp_path / "straight", stream)
    job = tmp_path / "store"

    def broken_off(start: int) -> Iterator[Example]:
        yield from islice(stream.examples(start), finished * PER_SHARD)
        raise UserError("the network is gone")

    with pytest.raises(UserError, match="the network is gone"):
        tokenize_mixed(job, dataclasses.replace(stream, examples=broken_off))
    assert len(list(job.glob("labels-*.npy"))) == min(finished, 2)  # the third is complete only at the end
    tokenize_mixed(job, stream)
    assert contents(job) == contents(tmp_path / "straight")


def test_a_source_that_ends_early_is_refused(tmp_path: Path) -> None:
    short = mixed_source(examples=lambda start: islice(tiny_source().examples(start), max(0, 9 - start)))
    with pytest.raises(UserError, match="noise:train ended after 9 of 11 images: it has changed or is damaged"):
        tokenize_mixed(tmp_path / "store", short)


def test_a_disk_too_small_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = COUNT * (10 * 4 * 2 + 4)
    for free, enough in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if enough:
            assert len(tokenize_tiny(tmp_path / "new" / "store")) == COUNT
        else:
            with refused(tmp_path, r"needs 0.000 GB more, but its disk has 0.000 GB free: free some space"):
                tokenize_tiny(tmp_path / "new" / "store")
            assert not (tmp_path / "new").exists()


# The shards have 1,008 and 14,208 bytes. C's buffered writes can lose the end of a small one unnoticed.
@pytest.mark.parametrize(("size", "free"), [(8, 900), (32, 6000), (32, 14000)])
def test_a_full_disk_is_reported_and_the_job_can_be_finished(tmp_path: Path, size: int, free: int) -> None:
    job = (tiny_source(), tiny_tokenizer(), Crops(kind="ten", size=size, range=1.25), tmp_path / "store")
    with full_disk(free), pytest.raises(UserError, match=r"cannot write .*codes-00000-of-00001.npy") as raised:
        tokenize(*job)
    assert "None" not in str(raised.value)  # instead of the cause
    store = tokenize(*job)
    store.verify()
    assert sorted(contents(tmp_path / "store")) == [
        "codes-00000-of-00001.npy",
        "labels-00000-of-00001.npy",
        "meta.json",
    ]


@pytest.mark.parametrize(
    ("what", "damage"),
    [("codes", "gone"), *((what, damage) for what in ("codes", "labels") for damage in ("empty", "fewer", "other"))],
)
def test_a_damaged_shard_is_refused_and_written_again_without_its_labels(
    unfinished: Path, tmp_path: Path, what: str, damage: str
) -> None:
    file = min(unfinished.glob(f"{what}-*.npy"))
    array = np.load(file)
    file.unlink()
    if damage == "empty":
        file.touch()
    if damage == "fewer":
        np.save(file, array[1:])
    if damage == "other":
        np.save(file, array + 1)
    with pytest.raises(
        UserError, match=r"labels-.*\.npy or its codes are damaged .*remove it and give the same command"
    ):
        tokenize_tiny(unfinished)
    min(unfinished.glob("labels-*.npy")).unlink()
    tokenize_tiny(unfinished)
    tokenize_tiny(tmp_path / "whole")
    assert contents(unfinished) == contents(tmp_path / "whole")
