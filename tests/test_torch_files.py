"""Tensors on disk: what was written is what is read, or nothing is."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from st_ar.files import OURS, in_pieces, read_safetensors, read_tensors, save_tensors
from tests.disk import flip_byte, refused

TENSORS = {
    "weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(6).bfloat16(),
    "count": torch.tensor(5),
    "empty": torch.zeros(0, 2),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "x.safetensors", TENSORS, kind="toy", sizes=[1, 2])
    return tmp_path / "x.safetensors"


def edit_header(file: Path, change: Any) -> None:
    """Rewrite the header of a .safetensors file by a function of its JSON."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_tensors_and_what_is_said_of_them_come_back(file: Path) -> None:
    found, said = read_safetensors(file)
    assert said == {"kind": "toy", "sizes": [1, 2]}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())
    assert load_file(file).keys() == TENSORS.keys()  # any program reads it


def test_equal_tensors_are_equal_files(file: Path) -> None:
    for number in range(8):  # safetensors' metadata has no fixed order
        save_tensors(file.with_name(f"{number}"), dict(reversed(TENSORS.items())), sizes=[1, 2], kind="toy")
        assert file.with_name(f"{number}").read_bytes() == file.read_bytes()


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found_or_does_no_harm(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    path = tmp_path_factory.mktemp("flipped") / "x.safetensors"
    save_tensors(path, TENSORS, kind="toy")
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = read_tensors(path)
    except ValueError as error:
        assert "x.safetensors is damaged" in str(error)  # noqa: PT017 (either is right)
    else:
        assert all(torch.equal(found[name], value) for name, value in TENSORS.items())


def _swap_names(header: dict[str, Any]) -> None:
    header["twin"], header["weight"] = header["weight"], header["twin"]


def test_swapped_names_are_found(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"weight": TENSORS["weight"], "twin": TENSORS["weight"] + 1})
    edit_header(tmp_path / "x.safetensors", _swap_names)
    with refused(tmp_path, r"x\.safetensors is damaged: its content does not match its checksum; copy it again"):
        read_tensors(tmp_path / "x.safetensors")


def test_what_is_said_is_checked_too(file: Path) -> None:
    def lie(header: dict[str, Any]) -> None:
        header["__metadata__"][OURS] = header["__metadata__"][OURS].replace("toy", "boy")

    edit_header(file, lie)
    with refused(file.parent, "does not match its checksum"):
        read_safetensors(file)


def test_who_may_read_other_files_may_read_ours(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_file_that_may_not_be_read_is_not_called_damaged(file: Path) -> None:
    file.unlink()
    file.mkdir()
    with refused(file.parent, "x.safetensors cannot be read: Is a directory"):
        read_safetensors(file)


def test_files_of_other_programs_carry_no_checksum_and_are_read(file: Path) -> None:
    save_file(TENSORS, file, metadata={"format": "pt"})
    assert read_safetensors(file)[1] == {}
    flip_byte(file)
    assert read_tensors(file).keys() == TENSORS.keys()


@pytest.mark.parametrize("said", ["{", "[]", '{"sha256": 3}', "[" * 100_000])
def test_a_garbled_description_is_refused(file: Path, said: str) -> None:
    save_file(TENSORS, file, metadata={OURS: said})
    with refused(file.parent, r"x\.safetensors is damaged"):
        read_safetensors(file)


def test_pieces_are_the_tensors_in_the_order_of_their_names() -> None:
    large = {"b": torch.arange(10_000), "a": torch.tensor(1.0)}
    pieces: dict[str, list[Tensor]] = {}
    for name, piece in in_pieces(large):
        pieces.setdefault(name, []).append(piece)
    assert list(pieces) == ["a", "b"]
    assert [len(piece) for piece in pieces["b"]] == [4096, 4096, 1808]
    assert torch.equal(torch.cat(pieces["b"]), large["b"])


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_flipped_byte_in_a_file_of_torchs_is_found_though_torch_would_load_it(tmp_path: Path, share: float) -> None:
    whole = {"weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}
    torch.save({"model": whole}, tmp_path / "x.pt")
    flip_byte(tmp_path / "x.pt", round(share * (tmp_path / "x.pt").stat().st_size))
    careless = torch.load(tmp_path / "x.pt", weights_only=True)["model"]
    assert not torch.equal(careless["weight"], whole["weight"])
    with refused(
        tmp_path, r"x\.pt is damaged or incomplete \(.*data/0 does not match its checksum\): copy or download"
    ):
        read_tensors(tmp_path / "x.pt")


def test_a_file_of_torchs_from_before_it_wrote_zips_is_read(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert read_tensors(tmp_path / "x.pt").keys() == TENSORS.keys()


@pytest.mark.parametrize("data", [b"\x80\x02.", b"\x80\x02]q\x00e.", b"(lp0\n.", b"\x80\x04N.", bytes(range(256))])
def test_noise_is_refused_whatever_torchs_reader_raises(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    with refused(tmp_path, r"x\.pt (is damaged or incomplete|was refused)"):
        read_tensors(tmp_path / "x.pt")
