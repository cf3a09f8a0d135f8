"""The text store: what is read, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.data.store import TokenStore
from st_ar.data.text import TextStore, open_text, write_text
from st_ar.errors import UserError
from tests.data.random_store import checksum, random_store
from tests.disk import contents, flip_byte, full_disk, refused
from tests.toys import TINY, TINY_TEXT

DIM = 6


def random_rows(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random features [length, DIM] of each caption."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, DIM, generator=generator).to(dtype) for length in lengths]


def padded(caption: Tensor, rows: int) -> list[list[float]]:
    """A model's input, row by row: zeros, then the caption's first rows."""
    kept = caption.float().tolist()[:rows]
    return [[0.0] * DIM for _ in range(rows - len(kept))] + kept


@given(
    files=st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=5), min_size=1, max_size=3),
    rows=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    data=st.data(),
)
def test_captions_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int]], rows: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("text")
    captions: list[Tensor] = []
    for index, lengths in enumerate(files):
        captions += random_rows(lengths, index, dtype)
        write_text(folder / f"part-{index}.safetensors", captions[-len(lengths) :], encoder="toy")
    store = TextStore(folder)
    assert (len(store), store.dim, store.encoder) == (len(captions), DIM, "toy")
    assert store.lengths.tolist() == [len(caption) for caption in captions]
    asked = data.draw(st.lists(st.integers(0, len(captions) - 1), min_size=1, max_size=6))
    found = store.features(np.array(asked), rows)
    assert found.dtype == torch.float32
    assert found.tolist() == [padded(captions[image], rows) for image in asked]


def test_the_file_has_the_documented_format(tmp_path: Path) -> None:
    captions = random_rows([2, 3])
    write_text(tmp_path / "deep" / "text.safetensors", [captions[0].numpy(), captions[1]])
    saved = load_file(tmp_path / "deep" / "text.safetensors")
    assert set(saved) == {"features", "lengths"}
    assert torch.equal(saved["features"], torch.cat(captions))
    assert torch.equal(saved["lengths"], torch.tensor([2, 3]))
    assert list(contents(tmp_path)) == ["deep/text.safetensors"]


def test_a_file_of_another_writer_without_an_encoder_is_read(tmp_path: Path) -> None:
    rows = random_rows([3, 1])
    save_file({"features": torch.cat(rows), "lengths": torch.tensor([3, 1])}, tmp_path / "theirs.safetensors")
    store = TextStore(tmp_path / "theirs.safetensors")
    assert store.encoder == ""
    assert store.features(np.array([1, 0]), 3).tolist() == [padded(rows[1], 3), padded(rows[0], 3)]


def test_the_fingerprint_is_of_every_byte(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        rows = random_rows([2, 3])
        if name == "c":
            rows[1][2, 5] += 1e-6
        write_text(tmp_path / name / "0.safetensors", rows)
    a, b, c = (TextStore(tmp_path / name).fingerprint for name in ("a", "b", "c"))
    assert a == b != c
    assert TextStore(tmp_path / "a" / "0.safetensors").fingerprint == a
    assert a != checksum(tmp_path / "a" / "0.safetensors")  # of the checksums, for a folder may hold several files


def test_hidden_and_half_written_files_of_a_folder_are_not_read(tmp_path: Path) -> None:
    write_text(tmp_path / "0.safetensors", random_rows([2]))
    (tmp_path / ".1.safetensors").write_bytes(b"")
    (tmp_path / ".2.safetensors.partial").write_bytes(b"")
    (tmp_path / "captions.txt").write_text("a dog")
    assert len(TextStore(tmp_path)) == 1


@pytest.mark.parametrize("images", [[-1, 0], [0, 2]])
def test_an_index_out_of_range_is_refused(tmp_path: Path, images: list[int]) -> None:
    write_text(tmp_path / "0.safetensors", random_rows([2, 1]))
    with pytest.raises(UserError, match="captions 0 to 1, not"):
        TextStore(tmp_path).features(np.array(images), 3)


# Writing


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], "no captions were given"),
        ([np.zeros(3, np.float32)], r"caption 0 is torch.float32 \[3\]"),
        ([np.ones((2, 3), np.float32), np.ones((0, 3), np.float32)], r"caption 1 is torch.float32 \[0, 3\]"),
        ([np.ones((2, 3))], "caption 0 is torch.float64"),
        (
            [np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)],
            "caption 1 has rows of 4 torch.float32, the first of 3",
        ),
        ([np.ones((2, 3), np.float32), np.ones((2, 3), np.float16)], "caption 1 has rows of 3 torch.float16"),
        ([np.full((1, 3), np.inf, np.float16)], "caption 0 has features that are not finite"),
        ([np.array([[1, 1], [0, 0]], np.float32)], "caption 0 has a row of zeros"),
    ],
)
def test_invalid_captions_are_refused(tmp_path: Path, captions: list[np.ndarray], message: str) -> None:
    with refused(tmp_path, message):
        write_text(tmp_path / "text.safetensors", captions)


def test_existing_files_and_other_suffixes_are_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "text.safetensors", random_rows([1]))
    with refused(tmp_path, "exists already"):
        write_text(tmp_path / "text.safetensors", random_rows([2]))
    with refused(tmp_path, "is not a .safetensors file"):
        write_text(tmp_path / "text.npz", random_rows([2]))


def test_a_full_disk_leaves_no_half_written_file(tmp_path: Path) -> None:
    with refused(tmp_path, "cannot write .*text.safetensors"), full_disk(200):
        write_text(tmp_path / "text.safetensors", random_rows([200]))


# Reading unusable files


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"features": torch.ones(3, 2)}, "has features: a text store has features and lengths"),
        (
            {"features": torch.ones(3, 2), "lengths": torch.tensor([3]), "mask": torch.ones(1)},
            "has features, lengths, mask",
        ),
        ({"features": torch.ones(3, 2), "lengths": torch.tensor([1, 1])}, "the lengths sum to 2, but there are 3 rows"),
        ({"features": torch.ones(3, 2), "lengths": torch.tensor([3, 0])}, "each 1 or more"),
        ({"features": torch.ones(3, 2), "lengths": torch.tensor([3.0])}, "lengths must be int64"),
        ({"features": torch.ones(0, 2), "lengths": torch.zeros(0, dtype=torch.int64)}, "at least one caption"),
        ({"features": torch.ones(3), "lengths": torch.tensor([3])}, r"features are F32 \[3\]"),
        ({"features": torch.ones(3, 2).double(), "lengths": torch.tensor([3])}, r"features are F64 \[3, 2\]"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "text.safetensors")
    with refused(tmp_path, message):
        TextStore(tmp_path / "text.safetensors")


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with refused(tmp_path, "nowhere does not exist"):
        TextStore(tmp_path / "nowhere")
    with refused(tmp_path, "has no .safetensors file"):
        TextStore(tmp_path)
    write_text(tmp_path / "text.safetensors", random_rows([4]))
    whole = (tmp_path / "text.safetensors").read_bytes()
    (tmp_path / "text.safetensors").write_bytes(whole[:-1])
    with refused(tmp_path, "text.safetensors is damaged .*copy it again"):
        TextStore(tmp_path)
    (tmp_path / "text.safetensors").write_bytes(whole)
    flip_byte(tmp_path / "text.safetensors", 0)
    with refused(tmp_path, "text.safetensors is damaged .*copy it again"):
        TextStore(tmp_path)


def test_a_folder_of_several_encoders_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "0.safetensors", random_rows([1]), encoder="a")
    write_text(tmp_path / "1.safetensors", random_rows([1]), encoder="b")
    with refused(tmp_path, "1.safetensors has features of width 6 by encoder 'b', 0.safetensors of 6 by 'a'"):
        TextStore(tmp_path)


# Models and token stores


def test_captions_are_for_text_models_and_text_models_for_captions(tmp_path: Path) -> None:
    write_text(tmp_path / "text.safetensors", random_rows([1]), encoder="a")
    path = tmp_path / "text.safetensors"
    assert open_text(None, TINY) is None
    opened = open_text(path, TINY_TEXT, "a")
    assert opened is not None
    assert len(opened) == 1
    assert open_text(path, TINY_TEXT) is not None
    with pytest.raises(UserError, match="this one is for 3 classes: leave it out"):
        open_text(path, TINY)
    with pytest.raises(UserError, match="needs captions: give their features with --text"):
        open_text(None, TINY_TEXT)
    with pytest.raises(UserError, match=r"width 6, the model reads 2048: train with --model.text-dim 6"):
        open_text(path, ModelConfig(dim=8, n_layers=1, n_heads=1, condition="text"))
    with pytest.raises(UserError, match="encoded by 'a', the model was trained on captions by 'b'"):
        open_text(path, TINY_TEXT, "b")


def test_there_is_a_caption_for_each_image(tmp_path: Path) -> None:
    store = TokenStore(random_store(tmp_path / "tokens", images=3)[0])
    for count in (2, 3, 4):
        write_text(tmp_path / f"{count}.safetensors", random_rows([1] * count))
    TextStore(tmp_path / "3.safetensors").check_tokens(store)
    for count in (2, 4):
        with pytest.raises(
            UserError, match=f"has {count} captions, .*tokens 3 images: give one caption for each image"
        ):
            TextStore(tmp_path / f"{count}.safetensors").check_tokens(store)


def test_verifying_finds_a_flipped_bit(tmp_path: Path) -> None:
    for number in range(2):
        write_text(tmp_path / f"{number}.safetensors", random_rows([4, 5000]), encoder="a")
    text = TextStore(tmp_path)
    text.verify()
    assert text.encoder == "a"
    flip_byte(tmp_path / "1.safetensors")
    with refused(tmp_path, r"1\.safetensors is damaged \(its content does not match its checksum\)"):
        TextStore(tmp_path).verify()


def test_a_file_of_another_program_has_its_encoder_and_no_checksum(tmp_path: Path) -> None:
    tensors = {"features": torch.ones(3, 2), "lengths": torch.tensor([1, 2])}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"encoder": "theirs"})
    text = TextStore(tmp_path)
    text.verify()
    assert (text.encoder, text.dim, len(text)) == ("theirs", 2, 2)
