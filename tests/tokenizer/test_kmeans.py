"""The k-means tokenizer: encoding, training, and its folder."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from st_ar import load_tokenizer
from st_ar.data.source import MAX_PIXELS, Example, ImageSource
from st_ar.errors import UserError
from st_ar.tokenizer import kmeans, to_pixels, to_uint8
from st_ar.tokenizer.kmeans import KMeansTokenizer, train_kmeans
from tests.disk import contents, flip_byte, full_disk, refused


def random_tokenizer(vocab_size: int = 16, patch: int = 3, seed: int = 0) -> KMeansTokenizer:
    codebook = torch.rand(vocab_size, 3 * patch**2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return KMeansTokenizer(codebook, patch)


def patch_at(images: Tensor, image: int, row: int, column: int, patch: int) -> Tensor:
    """One patch, flattened channels first."""
    rows, columns = slice(row * patch, row * patch + patch), slice(column * patch, column * patch + patch)
    return images[image, :, rows, columns].flatten()


@given(patch=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 1 << 20))
def test_encode_finds_the_nearest_patch(patch: int, rows: int, columns: int, seed: int) -> None:
    tokenizer = random_tokenizer(patch=patch, seed=seed)
    images = torch.rand(2, 3, rows * patch, columns * patch, generator=torch.Generator().manual_seed(~seed)) * 2 - 1
    codes = tokenizer.encode(images)
    assert (codes.dtype, codes.shape) == (torch.int64, (2, rows, columns))
    for image, row, column in np.ndindex(2, rows, columns):
        wanted = patch_at(images, image, row, column, patch).double()
        distances = (tokenizer.codebook.double() - wanted).square().sum(1)
        assert distances[codes[image, row, column]] <= distances.min() + 1e-5  # float32 may tie


@given(patch=st.integers(1, 4), seed=st.integers(0, 1 << 20))
def test_decode_puts_the_codebooks_patches_in_raster_order(patch: int, seed: int) -> None:
    tokenizer = random_tokenizer(patch=patch, seed=seed)
    codes = torch.randint(16, (2, 3, 2), generator=torch.Generator().manual_seed(seed))
    images = tokenizer.decode(codes)
    assert images.shape == (2, 3, 3 * patch, 2 * patch)
    for image, row, column in np.ndindex(2, 3, 2):
        expected = tokenizer.codebook[codes[image, row, column]]
        assert torch.equal(patch_at(images, image, row, column, patch), expected)


@given(patch=st.integers(1, 4), seed=st.integers(0, 1 << 20))
def test_images_made_of_codebook_patches_come_back_unchanged(patch: int, seed: int) -> None:
    tokenizer = random_tokenizer(patch=patch, seed=seed)
    codes = torch.randint(16, (3, 4, 4), generator=torch.Generator().manual_seed(seed))
    images = tokenizer.decode(codes)
    assert torch.equal(tokenizer.encode(images), codes)
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), images)


def test_the_fingerprint_depends_on_codebook_and_patch() -> None:
    tokenizer = random_tokenizer()
    changed = tokenizer.codebook.clone()
    changed[3, 5] = torch.nextafter(changed[3, 5], torch.tensor(2.0))
    others = [KMeansTokenizer(changed, 3), KMeansTokenizer(tokenizer.codebook[:-1], 3), random_tokenizer(seed=1)]
    assert KMeansTokenizer(tokenizer.codebook.clone(), 3).fingerprint == tokenizer.fingerprint
    assert len({other.fingerprint for other in [tokenizer, *others]}) == 4


def test_a_grid_is_counted_in_whole_patches() -> None:
    assert random_tokenizer().grid(12) == 4
    with pytest.raises(
        UserError, match="images of 32 pixels cannot be cut into 3-pixel patches: choose another --size"
    ):
        random_tokenizer().grid(32)
    with pytest.raises(UserError, match="images of 10 pixels"):
        random_tokenizer().encode(torch.zeros(1, 3, 12, 10))


def test_a_saved_tokenizer_is_loaded_the_same(tmp_path: Path) -> None:
    tokenizer = random_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    images = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(5)) * 2 - 1
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == 16
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert torch.equal(loaded.decode(tokenizer.encode(images)), tokenizer.decode(tokenizer.encode(images)))
    assert sorted(contents(tmp_path / "tokenizer")) == ["codebook.safetensors", "tokenizer.json"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    random_tokenizer().save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def edit(saved: Path, **changes: object) -> None:
    config = json.loads((saved / "tokenizer.json").read_text())
    (saved / "tokenizer.json").write_text(json.dumps(config | changes))


def test_a_flipped_byte_of_the_codebook_is_found(saved: Path) -> None:
    flip_byte(saved / "codebook.safetensors")
    with refused(saved, r"codebook.safetensors is damaged \(its content does not match its checksum\)"):
        load_tokenizer(saved)


def test_another_codebook_is_found(saved: Path) -> None:
    save_file({"codebook": load_file(saved / "codebook.safetensors")["codebook"] / 2}, saved / "codebook.safetensors")
    with refused(saved, r"is damaged \(its weights do not match its fingerprint\): copy or train the tokenizer again"):
        load_tokenizer(saved)


@pytest.mark.parametrize("left", [0, 5, 40, -1])
def test_a_truncated_codebook_is_refused(saved: Path, left: int) -> None:
    file = saved / "codebook.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with refused(saved, "codebook.safetensors is damaged .*copy it again"):
        load_tokenizer(saved)


def test_a_missing_codebook_is_refused(saved: Path) -> None:
    (saved / "codebook.safetensors").unlink()
    with refused(saved, "codebook.safetensors does not exist or is not a file: copy it again"):
        load_tokenizer(saved)


@pytest.mark.parametrize(
    "tensors", [{"other": torch.zeros(4, 27)}, {"codebook": torch.zeros(4, 26)}, {"codebook": torch.zeros(27)}]
)
def test_a_codebook_of_another_shape_or_name_is_refused(saved: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, saved / "codebook.safetensors")
    with refused(saved, "is damaged .*its codebook does not match its tokenizer.json.*train the tokenizer again"):
        load_tokenizer(saved)


@pytest.mark.parametrize("changes", [{"patch": 1}, {"patch": "3"}, {"patch": None}])
def test_a_config_that_does_not_fit_its_codebook_is_refused(saved: Path, changes: dict[str, object]) -> None:
    edit(saved, **changes)
    with refused(saved, "damaged"):
        load_tokenizer(saved)


def test_an_unknown_kind_is_refused(saved: Path) -> None:
    edit(saved, kind="vae")
    with refused(saved, "tokenizer.json is of kind 'vae'; this st-ar knows 'kmeans'"):
        load_tokenizer(saved)


def test_another_format_is_refused(saved: Path) -> None:
    edit(saved, format_version=9)
    with refused(saved, "has format 9; this st-ar reads 1"):
        load_tokenizer(saved)


def test_a_missing_folder_says_how_to_make_one(tmp_path: Path) -> None:
    with refused(tmp_path, "nowhere is not a tokenizer: no such folder or file; `st-ar train-tokenizer` makes one"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with refused(tmp_path, r"tokenizer.json is missing: .* is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_saving_never_overwrites(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for taken in (saved, tmp_path, tmp_path / "file"):
        with refused(tmp_path, "exists already and is not empty: .*never overwritten"):
            random_tokenizer(seed=1).save(taken)


def test_a_full_disk_while_saving_is_reported(tmp_path: Path) -> None:
    with full_disk(600), pytest.raises(UserError, match=r"cannot write .*codebook.safetensors"):
        random_tokenizer().save(tmp_path / "tokenizer")  # its codebook has 1,728 bytes
    assert contents(tmp_path) == {}


def source_of(images: np.ndarray) -> ImageSource:
    def examples(start: int) -> Iterator[Example]:
        for pixels in images[start:]:
            yield Example(Image.fromarray(pixels), 0)

    return ImageSource(
        name="tiles:train",
        class_names=["tile"],
        count=len(images),
        examples=examples,
        size=images.shape[1],
        crop_range=1.0,
        mirror=True,
    )


def tiles(kinds: int, count: int = 40) -> np.ndarray:
    """Images of 3 x 3 patches in `kinds` plain colours."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (kinds, 3))
    chosen = np.resize(np.arange(kinds), (count, 2, 2))
    return colours[chosen].repeat(3, axis=1).repeat(3, axis=2).astype(np.uint8)


def test_training_finds_patches_that_are_far_apart() -> None:
    images = tiles(4)
    tokenizer = train_kmeans(source_of(images), vocab_size=4, patch=3)
    assert tokenizer.codebook.shape == (4, 27)
    seen = to_pixels(torch.from_numpy(images))
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(seen)), seen, rtol=0, atol=1e-5)


def test_training_is_a_function_of_the_seed() -> None:
    source = source_of(np.random.default_rng(1).integers(0, 256, (30, 6, 6, 3), np.uint8))
    first, again, other = (train_kmeans(source, vocab_size=8, patch=3, seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint


def test_too_few_different_patches_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match="tiles:train has 4 different patches, too few for 5 codes: lower --vocab-size"):
        train_kmeans(source_of(tiles(4)), vocab_size=5, patch=3)


def test_an_image_that_would_exceed_the_limit_is_left_out() -> None:
    source = source_of(tiles(6))
    strip = Example(Image.new("L", (MAX_PIXELS // 36 + 1, 1)), 0)  # enlarged 6 times
    longer = replace(source, examples=lambda start: chain([strip], source.examples(start)), count=41)
    expected, found = (train_kmeans(each, vocab_size=4, patch=3, max_patches=10**9) for each in (source, longer))
    assert expected.fingerprint == found.fingerprint


def test_bytes_become_pixels_between_minus_one_and_one() -> None:
    pixels = to_pixels(torch.tensor([0, 51, 204, 255], dtype=torch.uint8).reshape(1, 2, 2, 1).repeat(1, 1, 1, 3))
    assert pixels.shape == (1, 3, 2, 2)
    torch.testing.assert_close(pixels[0, 1], torch.tensor([[-1.0, -0.6], [0.6, 1.0]]))


def test_channels_move_to_the_front_and_back() -> None:
    image = torch.arange(24, dtype=torch.uint8).reshape(1, 2, 4, 3)
    assert torch.equal(to_uint8(to_pixels(image)), image)
    assert torch.equal(to_pixels(image)[0, 2], image[0, :, :, 2] / 127.5 - 1)


def test_every_byte_survives_the_conversion() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    assert torch.equal(to_uint8(to_pixels(every)), every)


@pytest.mark.parametrize(
    ("value", "byte"),
    [(-2.0, 0), (-1.0, 0), (-0.993, 1), (0.0, 128), (0.49 / 127.5, 128), (0.999, 255), (1.0, 255), (3.0, 255)],
)
def test_pixels_become_bytes_as_in_llamagen(value: float, byte: int) -> None:
    # clamp(127.5 x + 128, 0, 255), truncated.
    assert to_uint8(torch.full((1, 3, 1, 1), value)).flatten().tolist() == [byte] * 3


def test_broken_images_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3)).astype(np.uint8)
    files = [Example(b"" if index == 3 else Image.fromarray(pixels[index]), 0, f"{index}.png") for index in range(5)]
    source = ImageSource(name="5 files", class_names=["a"], count=5, examples=lambda start: iter(files[start:]), size=6)
    assert train_kmeans(source, vocab_size=4, patch=3).vocab_size == 4
    assert "note: 5 files: 1 of 5 images cannot be used and are left out: 3.png (empty)\n" in capsys.readouterr().err


def test_evenly_spaced_images_of_a_large_source_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "MAX_IMAGES", 10)
    pixels = np.random.default_rng(0).integers(0, 256, (25, 6, 6, 3)).astype(np.uint8)
    decoded: list[int] = []

    class Watched(Example):
        def read(self) -> Image.Image:
            decoded.append(self.label)
            return super().read()

    def examples(start: int) -> Iterator[Example]:
        for index in range(start, 25):
            yield Watched(Image.fromarray(pixels[index]), index)

    names = [str(index) for index in range(25)]
    source = ImageSource(
        name="noise", class_names=names, count=25, examples=examples, size=6, crop_range=1.0, mirror=True
    )
    assert train_kmeans(source, vocab_size=4, patch=3).vocab_size == 4
    assert decoded == list(range(0, 25, 3))
