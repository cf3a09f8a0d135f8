"""The tokenizing job: what it writes, and that a job which was killed ends with the same bytes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from st_ar.data.crops import Crops
from st_ar.data.images import Example, ImageSource, open_images
from st_ar.data.store import TokenStore
from st_ar.data.tokenize import tokenize
from st_ar.errors import UserError
from st_ar.tokenizer import to_pixels
from st_ar.tokenizer.kmeans import KMeansTokenizer
from tests.disk import contents, full_disk, refused

COUNT, PER_SHARD = 11, 4
TEN = Crops(kind="ten", size=8, range=1.25)
ROOT = Path(__file__).parents[2]


def tiny_tokenizer(seed: int = 0, vocab_size: int = 32) -> KMeansTokenizer:
    codebook = torch.rand(vocab_size, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return KMeansTokenizer(codebook, patch=4)


def tiny_source(*, killed_after: int = COUNT, name: str = "noise:train") -> ImageSource:
    """Images of noise. The process kills itself when it asks for the image after `killed_after`."""
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
    """The same job in another process, which is killed by signal 9."""
    code = f"from tests.data.test_tokenize import *; tokenize_tiny(Path({str(out)!r}), killed_after={killed_after})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job killed in its second shard of three."""
    out = tmp_path_factory.mktemp("killed") / "store"
    tokenize_and_be_killed(out, killed_after=PER_SHARD + 2)
    return out


@pytest.fixture
def unfinished(half_done: Path, tmp_path: Path) -> Path:
    """A copy of the killed job."""
    out = tmp_path / "store"
    out.mkdir()
    for name, data in contents(half_done).items():
        (out / name).write_bytes(data)
    return out


def test_codes_are_the_tokenizers_of_every_crop_of_every_image(tmp_path: Path) -> None:
    store = tokenize_tiny(tmp_path / "store")
    for index, example in enumerate(tiny_source().examples(0)):
        cut = TEN.cut(example.image)
        expected = tiny_tokenizer().encode(to_pixels(torch.from_numpy(cut.copy()))).flatten(1)
        found = store.codes(np.array([index]), np.arange(10)[None])[0]
        np.testing.assert_array_equal(found, expected.numpy())
        assert store.labels[index] == example.label


def test_the_store_says_what_it_is(tmp_path: Path) -> None:
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


def test_digits_with_the_center_crop_alone(tmp_path: Path) -> None:
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


def test_a_killed_job_goes_on_to_the_same_bytes(unfinished: Path, tmp_path: Path) -> None:
    tokenize_tiny(tmp_path / "straight")
    tokenize_tiny(unfinished)
    assert contents(unfinished) == contents(tmp_path / "straight")


def test_a_killed_job_never_rewrites_a_finished_shard(unfinished: Path) -> None:
    finished = [unfinished / f"{what}-00000-of-00003.npy" for what in ("codes", "labels")]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in finished]
    tokenize_tiny(unfinished)
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in finished] == before


def test_a_job_killed_between_codes_and_labels_of_a_shard_goes_on(unfinished: Path, tmp_path: Path) -> None:
    tokenize_tiny(tmp_path / "straight")
    (unfinished / "labels-00000-of-00003.npy").unlink()  # the labels are written last
    tokenize_tiny(unfinished)
    assert contents(unfinished) == contents(tmp_path / "straight")


def test_what_a_kill_left_half_written_is_cleared_away(unfinished: Path, tmp_path: Path) -> None:
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
    with refused(unfinished, rf"unfinished store of other {what.strip()} \(.*, now .*\): give the same settings"):
        tokenize(out=unfinished, **(settings | OTHERS[what]))


def test_a_finished_store_is_not_written_over(tmp_path: Path) -> None:
    tokenize_tiny(tmp_path / "store")
    with refused(tmp_path, "is a finished token store already: choose another --out or remove it"):
        tokenize_tiny(tmp_path / "store")


def test_a_folder_of_other_things_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with refused(tmp_path, "exists already and is not a token store: choose another --out"):
        tokenize_tiny(tmp_path)


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("precious")
    with refused(tmp_path, "choose another --out"):
        tokenize_tiny(tmp_path / "store")


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    assert len(tokenize_tiny(tmp_path)) == COUNT


def test_crops_that_are_no_whole_number_of_patches_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with refused(tmp_path, "images of 10 pixels are no whole number of 4-pixel patches: choose another --size"):
        tokenize_tiny(tmp_path / "store", crops=Crops(kind="ten", size=10, range=1.2))
    assert not (tmp_path / "store").exists()


def test_a_codebook_too_large_for_16_bits_is_refused(tmp_path: Path) -> None:
    large = KMeansTokenizer(torch.zeros((1 << 16) + 1, 3), patch=1)
    with refused(tmp_path, "a codebook of 65537 does not fit the store's 16-bit codes"):
        tokenize(tiny_source(), large, TEN, tmp_path / "store")


# The shards have 1,008 and 14,208 bytes. C's buffered writes lose the end of a small one without NumPy's noticing.
@pytest.mark.parametrize(("size", "free"), [(8, 900), (32, 6000), (32, 14000)])
def test_a_full_disk_is_said_plainly_and_leaves_a_job_to_finish(tmp_path: Path, size: int, free: int) -> None:
    job = (tiny_source(), tiny_tokenizer(), Crops(kind="ten", size=size, range=1.25), tmp_path / "store")
    with full_disk(free), pytest.raises(UserError, match=r"cannot write .*codes-00000-of-00001.npy") as raised:
        tokenize(*job)
    assert "None" not in str(raised.value)  # where the cause should be
    store = tokenize(*job)
    store.verify()
    assert sorted(contents(tmp_path / "store")) == [
        "codes-00000-of-00001.npy",
        "labels-00000-of-00001.npy",
        "meta.json",
    ]
