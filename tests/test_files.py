"""Files that others have written, or disks have damaged: what cannot be taken as it stands is refused in one line."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from st_ar.errors import LONGEST, UserError
from st_ar.files import open_array, parse_json, read_json
from tests.disk import refused


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
def test_an_array_that_is_damaged_is_a_value_error_in_one_short_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"\w") as raised:
        open_array(tmp_path / "x.npy")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200


def test_a_missing_array_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_array(tmp_path / "x.npy")


def test_an_error_for_users_is_one_line_and_keeps_cause_and_remedy() -> None:
    said = str(UserError("the cause\nis this: " + "x" * 100_000 + "; the remedy"))
    assert said.startswith("the cause is this: xxx")
    assert said.endswith("xxx; the remedy")
    assert len(said) < LONGEST + 10
    assert str(UserError("short")) == "short"


def test_headers_that_two_threads_read_at_once_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
