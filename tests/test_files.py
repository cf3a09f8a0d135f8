"""Reading and writing files; damaged and foreign ones are refused in one line."""

import errno
import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from st_ar.errors import LONGEST, UserError
from st_ar.files import (
    OURS,
    atomic_folder,
    claim,
    in_pieces,
    open_array,
    parse_json,
    read_json,
    read_safetensors,
    read_tensors,
    save_array,
    save_tensors,
    unwritable,
)
from tests.disk import flip_byte, read_only, refused


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" * 100_000, id="nested and cut short"),
        pytest.param('{"a":' * 100_000 + "1" + "}" * 100_000, id="nested without end"),
        pytest.param('{"a": ' + "9" * 5000 + "}", id="a number that Python does not read"),
        pytest.param('{"a": 1, "b": {"c": 1, "c": 2}}', id="a name twice"),
        pytest.param('{"a": "\\ud800"}', id="half a character"),
        pytest.param('{"a": 1} {"a": 2}', id="two values"),
        pytest.param("", id="nothing"),
    ],
)
def test_json_that_is_not_plain_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)
    (tmp_path / "x.json").write_text(text)
    with refused(tmp_path, r"x\.json is unreadable .* is not a toy, or it is damaged: copy or make it again"):
        read_json(tmp_path / "x.json", "a toy")


def test_plain_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": [1, 2.5, null, "é\\ud83e\\udd80"], "b": {"a": NaN}}')
    found = read_json(tmp_path / "x.json", "a toy")
    assert found["a"] == [1, 2.5, None, "é\U0001f980"]
    assert np.isnan(found["b"]["a"])


def npy(header: str) -> bytes:
    """A .npy file of eight bytes with a header of any text."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (8,)})
    text = (header + "\n").encode()
    return file.getvalue()[:8] + len(text).to_bytes(2, "little") + text + bytes(8)


def described(shape: Any, dtype: str = "|u1") -> bytes:
    return npy(repr({"descr": dtype, "fortran_order": False, "shape": shape}))


def test_an_array_is_mapped_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(described((2, 4)))
    found = open_array(tmp_path / "x.npy")
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, np.zeros((2, 4), np.uint8))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(described((10**12,)), id="terabytes"),
        pytest.param(described((1 << 32, 1 << 32)), id="a product that overflows"),
        pytest.param(described((10**30,)), id="a side that overflows"),
        pytest.param(described((-8,)), id="a negative side"),
        pytest.param(described((True,)), id="no number"),
        pytest.param(described((8,), "|O"), id="objects"),
        pytest.param(described((8,), "<f99999999999"), id="no type"),
        pytest.param(npy("{'descr': '|u1', 'shape': (8,"), id="cut short"),
        pytest.param(npy("(" * 5000), id="nested"),
        pytest.param(npy("1+" * 3000 + "1"), id="a sum"),
        pytest.param(npy("x" * 12_000), id="long"),
        pytest.param(b"", id="empty"),
    ],
)
def test_a_damaged_array_is_a_value_error_in_one_short_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"\w") as raised:
        open_array(tmp_path / "x.npy")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200


def test_a_missing_array_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_array(tmp_path / "x.npy")


def test_an_error_for_users_is_one_line_and_keeps_cause_and_remedy() -> None:
    message = str(UserError("the cause\nis this: " + "x" * 100_000 + "; the remedy"))
    assert message.startswith("the cause is this: xxx")
    assert message.endswith("xxx; the remedy")
    assert len(message) < LONGEST + 10
    assert str(UserError("short")) == "short"


def test_a_header_is_parsed_again_after_a_collision_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    load, failures = np.load, [SystemError("AST constructor recursion depth mismatch")] * 4

    def failing(*given: Any, **settings: Any) -> Any:
        if failures:
            raise failures.pop()
        return load(*given, **settings)

    monkeypatch.setattr(np, "load", failing)
    np.testing.assert_array_equal(open_array(tmp_path / "a.npy"), [0, 1, 2])
    failures += [SystemError("mismatch")] * 5
    with pytest.raises(ValueError, match="mismatch"):
        open_array(tmp_path / "a.npy")


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


def test_tensors_and_metadata_come_back(file: Path) -> None:
    found, metadata = read_safetensors(file)
    assert metadata == {"kind": "toy", "sizes": [1, 2]}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())
    assert load_file(file).keys() == TENSORS.keys()  # any program reads it


def test_equal_tensors_are_equal_files(file: Path) -> None:
    for number in range(8):  # safetensors' metadata has no fixed order
        save_tensors(file.with_name(f"{number}"), dict(reversed(TENSORS.items())), sizes=[1, 2], kind="toy")
        assert file.with_name(f"{number}").read_bytes() == file.read_bytes()


def test_a_file_says_that_its_tensors_are_pytorchs_and_its_header_is_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"größe": torch.arange(3), "a": torch.ones(2, 2)}, note='two "words"\n')
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert header["__metadata__"]["format"] == "pt"
    tensors, said = read_safetensors(path)
    assert said == {"note": 'two "words"\n'}
    assert torch.equal(tensors["größe"], torch.arange(3))
    assert load_file(path).keys() == tensors.keys()


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
    with refused(tmp_path, r"x\.safetensors is damaged \(its content does not match its checksum\): copy it again"):
        read_tensors(tmp_path / "x.safetensors")


def test_metadata_is_checked_too(file: Path) -> None:
    def lie(header: dict[str, Any]) -> None:
        header["__metadata__"][OURS] = header["__metadata__"][OURS].replace("toy", "boy")

    edit_header(file, lie)
    with refused(file.parent, "does not match its checksum"):
        read_safetensors(file)


def test_permissions_follow_the_umask(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_file_that_may_not_be_read_is_not_called_damaged(file: Path) -> None:
    file.unlink()
    file.mkdir()
    with refused(file.parent, "x.safetensors cannot be read: Is a directory"):
        read_safetensors(file)


def test_a_folder_that_is_read_only_is_refused_with_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path / "samples" / "job.json", {"seed": 1}, "samples")
    monkeypatch.setenv("ST_AR_CACHE", str(tmp_path / "cache"))
    elsewhere = "give a folder that you can write to, and copy this one there to continue its job$"
    with read_only(tmp_path):
        assert claim(tmp_path / "samples" / "job.json", {"seed": 1}, "samples")  # what is there can still be read
        for file, remedy in (
            ("samples/part.npy", elsewhere),
            ("new/part.npy", elsewhere),
            ("cache/a.npy", "set ST_AR_CACHE to"),
        ):
            with refused(
                tmp_path, f"cannot write .*{file}: Read-only file system; nothing there was changed; {remedy}"
            ):
                save_array(tmp_path / file, np.zeros(3))
        with refused(tmp_path, f"cannot write .*store: Read-only .*; {elsewhere}"), atomic_folder(tmp_path / "store"):
            pass
    for number in (errno.EACCES, errno.EPERM):
        assert re.search(elsewhere, str(unwritable(tmp_path, OSError(number, "denied"))))
    assert str(unwritable(tmp_path, OSError(errno.ENOSPC, "full"))).endswith("full; nothing there was changed")


def test_files_of_other_programs_have_no_checksum_and_are_read(file: Path) -> None:
    save_file(TENSORS, file, metadata={"format": "pt"})
    assert read_safetensors(file)[1] == {}
    flip_byte(file)
    assert read_tensors(file).keys() == TENSORS.keys()


@pytest.mark.parametrize("metadata", ["{", "[]", '{"sha256": 3}', "[" * 100_000])
def test_a_garbled_description_is_refused(file: Path, metadata: str) -> None:
    save_file(TENSORS, file, metadata={OURS: metadata})
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
def test_a_flipped_byte_in_a_torch_file_is_found_although_torch_would_load_it(tmp_path: Path, share: float) -> None:
    whole = {"weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}
    torch.save({"model": whole}, tmp_path / "x.pt")
    flip_byte(tmp_path / "x.pt", round(share * (tmp_path / "x.pt").stat().st_size))
    careless = torch.load(tmp_path / "x.pt", weights_only=True)["model"]
    assert not torch.equal(careless["weight"], whole["weight"])
    with refused(tmp_path, r"x\.pt is damaged \(.*data/0 does not match its checksum\): copy or download"):
        read_tensors(tmp_path / "x.pt")


def test_a_torch_file_from_before_zips_is_read(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert read_tensors(tmp_path / "x.pt").keys() == TENSORS.keys()


@pytest.mark.parametrize("data", [b"\x80\x02.", b"\x80\x02]q\x00e.", b"(lp0\n.", b"\x80\x04N.", bytes(range(256))])
def test_noise_is_refused_whatever_torch_raises(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    with refused(tmp_path, r"x\.pt (is damaged|was refused)"):
        read_tensors(tmp_path / "x.pt")
