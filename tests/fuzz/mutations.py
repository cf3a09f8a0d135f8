"""Damage of every kind that disks, editors and malice do to files, drawn from a seed."""

import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LONG = "x" * 100_000
DEEP = 100_000


@dataclass(frozen=True)
class Damage:
    """What was done to which file."""

    file: str
    kind: str
    detail: str = ""

    @property
    def is_consistent(self) -> bool:
        """Whether the file is whole by its format's own checksums and says something else: as if another had been written."""
        return self.kind in CONSISTENT or self.kind == "swap"


def damage(folder: Path, rng: random.Random) -> Damage:
    """Damage one file below a folder; what is done depends on `rng` and on the files alone."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    while True:
        path = rng.choice(files)
        kinds = _kinds(path)
        kind = rng.choice(sorted(kinds))
        if kind == "swap":
            other = rng.choice(files)
            detail = _swap(path, other)
        else:
            detail = kinds[kind](path, rng)
        if detail is not None:
            return Damage(str(path.relative_to(folder)), kind, detail)


Change = Callable[[Path, random.Random], str | None]
"""Changes a file and says how; None if that kind of damage cannot be done to it."""


def _kinds(path: Path) -> dict[str, Change]:
    return RAW | {
        kind: change
        for pattern, kinds in FORMATS.items()
        if re.search(pattern, path.name)
        for kind, change in kinds.items()
    }


# Of any file


def _flip(path: Path, rng: random.Random) -> str | None:
    data = bytearray(path.read_bytes())
    if not data:
        return None
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    if rng.random() < 0.3:  # headers come first, and are what hurts
        place %= 256
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place}"


def _overwrite(path: Path, rng: random.Random) -> str | None:
    data = bytearray(path.read_bytes())
    if not data:
        return None
    start, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 64, 1024))
    stop = min(start + length, len(data))
    data[start:stop] = rng.randbytes(stop - start)
    path.write_bytes(data)
    return f"bytes {start} to {stop}"


def _truncate(path: Path, rng: random.Random) -> str | None:
    data = path.read_bytes()
    if not data:
        return None
    left = len(data) - 1 if rng.random() < 0.2 else rng.randrange(len(data))
    path.write_bytes(data[:left])
    return f"to {left} of {len(data)} bytes"


def _extend(path: Path, rng: random.Random) -> str:
    more = rng.choice((b"\0", b"\n", b"}", b"\0" * 4096, rng.randbytes(rng.randrange(1, 512)), path.read_bytes()))
    path.write_bytes(path.read_bytes() + more)
    return f"by {len(more)} bytes"


def _empty(path: Path, rng: random.Random) -> str:
    path.write_bytes(b"")
    return ""


def _noise(path: Path, rng: random.Random) -> str:
    path.write_bytes(rng.randbytes(rng.randrange(1, 4096)))
    return ""


def _delete(path: Path, rng: random.Random) -> str:
    path.unlink()
    return ""


def _folder(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return ""


def _swap(path: Path, other: Path) -> str | None:
    ours, theirs = path.read_bytes(), other.read_bytes()
    if ours == theirs:
        return None
    path.write_bytes(theirs)
    other.write_bytes(ours)
    return f"with {other.name}"


# JSON


def _strange(value: Any, rng: random.Random) -> Any:
    """Another value, near to the old one or far from it."""
    nested: Any = value
    for _ in range(rng.choice((1, 2, 50))):
        nested = [nested]
    strange = [None, True, False, 0, 1, -1, 2, 0.5, -0.5, 10**6, 10**30, 2**63, -(2**63), 1e308, -1e308, 1e-308]
    strange += [float("nan"), float("inf"), float("-inf"), "", "x", "\u0000", "\u202e\u00e9\U0001f980", "\ud800", LONG]
    strange += [
        "../../etc/passwd",
        "/dev/zero",
        "1",
        "NaN",
        [],
        {},
        [[]],
        {"": None},
        nested,
        str(value),
        {"value": value},
    ]
    if isinstance(value, bool):
        strange += [not value]
    elif isinstance(value, int | float):
        strange += [
            value + 1,
            value - 1,
            -value,
            value * 2,
            value * 10,
            float(value),
            value // 2 if value == value else 0,
        ]
    elif isinstance(value, str):
        strange += [value.upper(), value.title(), value + " ", value[:-1], value[::-1]]
    elif isinstance(value, list):
        strange += [value[:-1], value * 2, value[::-1], [*value, None], dict(enumerate(value))]
    elif isinstance(value, dict):
        strange += [list(value), list(value.values())]
    return rng.choice(strange)


Place = tuple[Any, Any]
"""A dict or list, and a key or index in it."""


def _places(value: Any) -> list[Place]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((value, key), *_places(inner))]


def _changed_json(text: str, rng: random.Random) -> tuple[str, str]:
    """Another JSON text, and what is other about it."""
    value = json.loads(text)
    places = _places(value)
    if not places or rng.random() < 0.05:
        return rng.choice(
            [
                ("[" * DEEP, "deep"),
                ("[" * DEEP + "]" * DEEP, "deep"),
                ('{"a":' * DEEP + "1" + "}" * DEEP, "deep"),
                ("1" * 10_000, "a long number"),
                (json.dumps(_strange(value, rng)), "another value"),
                ("\ufeff" + text, "a byte order mark"),
            ]
        )
    where, key = rng.choice(places)
    kind = rng.choice(("replace", "replace", "replace", "delete", "duplicate", "swap", "rename", "long number"))
    if kind == "delete":
        del where[key]
        return json.dumps(value), f"without {key!r}"
    if kind == "duplicate" and isinstance(value, dict):
        name = rng.choice(sorted(value))
        double = json.dumps({name: _strange(value[name], rng)})[1:-1]
        whole = json.dumps(value)
        return rng.choice([f"{{{double}, {whole[1:]}", f"{whole[:-1]}, {double}}}"]), f"{name!r} twice"
    if kind == "swap":
        there, name = rng.choice(places)
        where[key], there[name] = there[name], where[key]
        try:
            return json.dumps(value), f"{key!r} and {name!r} swapped"
        except ValueError:  # one inside the other
            return _changed_json(text, rng)
    if kind == "rename" and isinstance(where, dict):
        where[rng.choice((key.upper(), key.title(), key + " ", key[:-1], LONG))] = where.pop(key)
        return json.dumps(value), f"{key!r} renamed"
    if kind == "long number":
        where[key] = "LONG NUMBER"
        return json.dumps(value).replace('"LONG NUMBER"', "9" * 5000), f"{key!r} of 5000 digits"
    old = where[key]
    where[key] = _strange(old, rng)
    return json.dumps(value), f"{key!r}: {old!r:.60} -> {where[key]!r:.60}"


def _json(path: Path, rng: random.Random) -> str | None:
    try:
        text, detail = _changed_json(path.read_text(), rng)
    except ValueError:
        return None
    path.write_text(text)
    return detail


def _json_line(path: Path, rng: random.Random) -> str | None:
    lines = path.read_text().splitlines()
    if not lines:
        return None
    index = rng.randrange(len(lines))
    lines[index], detail = _changed_json(lines[index], rng)
    path.write_text("\n".join(lines) + "\n")
    return f"line {index}: {detail}"


# NumPy


def _changed_array(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A .npy file with another header."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    body = data[file.tell() :]
    fields: dict[str, Any] = {"descr": dtype.str, "fortran_order": fortran, "shape": shape}
    name = rng.choice(("descr", "fortran_order", "shape", "shape", "text", "version"))
    if name == "descr":
        types = ("|O", "<f8", "<i8", "|u1", ">u2", "<U5", "|V8", "<c16", "<f2", "|b1", "<M8[s]", "zz", "<f999999999999")
        fields["descr"] = rng.choice((*types, [("a", "<f4")], [], None, 3, "|S99999999999", "<U2147483647"))
    elif name == "fortran_order":
        fields["fortran_order"] = rng.choice((not fortran, 1, None, "no"))
    elif name == "shape":
        huge = (10**12, *shape[1:])
        shapes = [huge, (*shape, 10**12), (), (-1,), shape[::-1], (*shape, 1), (2**63,), (10**30,), None, "7", (0,)]
        fields["shape"] = rng.choice([*shapes, tuple(-n for n in shape), (True,), (2**32, 2**32), (1.5,), list(shape)])
    text = repr(fields)
    if name == "text":
        text = rng.choice(
            (text[:-1], text + "}", "{" * 200, "(" * 5000, "1+" * 3000 + "1", "L" + text, "'''", "\x00", "", "9" * 9000)
        )
    if name == "version":
        version = rng.choice(((2, 0), (3, 0), (9, 9), (0, 0)))
    width = "<H" if version == (1, 0) else "<I"
    header = (text + "\n").encode("latin-1")
    start = b"\x93NUMPY" + bytes(version) + struct.pack(width, len(header)) + header
    return start + body, f"{name}: {str(fields.get(name, text))[:60]}"


def _array(path: Path, rng: random.Random) -> str | None:
    try:
        data, detail = _changed_array(path.read_bytes(), rng)
    except ValueError:
        return None
    path.write_bytes(data)
    return detail


def _members(path: Path) -> dict[str, bytes] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError):
        return None


def _write_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)


def _member_header(path: Path, rng: random.Random) -> str | None:
    members = _members(path)
    if not members:
        return None
    name = rng.choice(sorted(members))
    try:
        members[name], detail = _changed_array(members[name], rng)
    except ValueError:
        return None
    _write_members(path, list(members.items()))
    return f"{name}: {detail}"


def _member_names(path: Path, rng: random.Random) -> str | None:
    members = _members(path)
    if not members or len(members) < 2:
        return None
    one, other = rng.sample(sorted(members), 2)
    kind = rng.choice(("swap", "delete", "rename"))
    if kind == "swap":
        members[one], members[other] = members[other], members[one]
    elif kind == "delete":
        del members[one]
    else:
        members[rng.choice(("x.npy", "arr_2.npy", one.upper(), "../" + one, "é.npy"))] = members.pop(one)
    _write_members(path, list(members.items()))
    return f"{kind} {one} {other}"


def _member_json(path: Path, rng: random.Random) -> str | None:
    """The description in a reference: JSON as a NumPy string."""
    members = _members(path)
    if not members or "st_ar.npy" not in members:
        return None
    text, detail = _changed_json(str(np.load(io.BytesIO(members["st_ar.npy"]))), rng)
    file = io.BytesIO()
    np.save(file, np.array(text.encode("utf-8", "replace").decode()))
    members["st_ar.npy"] = file.getvalue()
    _write_members(path, list(members.items()))
    return detail


# Safetensors


def _tensor_header(path: Path, rng: random.Random) -> str | None:
    data = path.read_bytes()
    if len(data) < 8:
        return None
    (length,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.1:
        wrong = rng.choice((0, 1, length + 1, 2**40, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", wrong) + data[8:])
        return f"header of {wrong} bytes"
    try:
        text, detail = _changed_json(data[8 : 8 + length].decode(), rng)
    except ValueError:
        return None
    header = text.encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    return detail


# Pickles


def pickled_call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls module.name(argument) when it is loaded."""
    words = [b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name, argument)]
    return b"\x80\x04" + words[0] + words[1] + b"\x93" + words[2] + b"\x85R."


def _call(rng: random.Random, path: Path) -> bytes:
    """A pickle that leaves a file SPRUNG beside `path` when it is run."""
    trace = path.parent / SPRUNG
    return rng.choice(
        (
            pickled_call("os", "system", f"touch {trace}"),
            pickled_call("posix", "system", f"touch {trace}"),
            pickled_call("builtins", "eval", f"open({str(trace)!r}, 'w').close()"),
            pickled_call("torch.distributed.checkpoint.metadata", "os.system", f"touch {trace}"),
            pickled_call("torch", "os.system", f"touch {trace}"),
        )
    )


SPRUNG = "sprung"


def _trap(path: Path, rng: random.Random) -> str:
    path.write_bytes(_call(rng, path))
    return "a pickle that calls"


def _inner_trap(path: Path, rng: random.Random) -> str | None:
    """The same inside torch's zip, which is otherwise whole."""
    members = _members(path)
    pickles = [name for name in members or () if name.endswith("data.pkl")]
    if not members or not pickles:
        return None
    members[pickles[0]] = _call(rng, path)
    _write_members(path, list(members.items()))
    return "a pickle that calls, in the zip"


def _inner_pickle(path: Path, rng: random.Random) -> str | None:
    """The pickle of torch's zip garbled, with a right checksum."""
    members = _members(path)
    pickles = [name for name in members or () if name.endswith("data.pkl")]
    if not members or not pickles:
        return None
    data = bytearray(members[pickles[0]])
    place = rng.randrange(len(data))
    data[place] = rng.randrange(256)
    members[pickles[0]] = bytes(data)
    _write_members(path, list(members.items()))
    return f"byte {place} of the pickle"


# Images


def _png_header(path: Path, rng: random.Random) -> str | None:
    """Other dimensions or another mode in a PNG whose checksums are right."""
    data = bytearray(path.read_bytes())
    if data[12:16] != b"IHDR":
        return None
    width, height = rng.choice(((2**31 - 1, 2**31 - 1), (60_000, 60_000), (1, 10**9), (0, 5), (7, 3), (2**32 - 1, 1)))
    mode = rng.choice((data[25], 0, 3, 4, 6, 9))
    data[16:26] = struct.pack(">IIBB", width, height, data[24], mode)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    return f"{width} x {height}, mode {mode}"


def _jpeg_header(path: Path, rng: random.Random) -> str | None:
    """Other dimensions in a JPEG."""
    data = bytearray(path.read_bytes())
    start = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    if start < 0:
        return None
    height, width = rng.choice(((65535, 65535), (0, 0), (1, 65535), (30_000, 30_000)))
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    path.write_bytes(data)
    return f"{width} x {height}"


def _other_suffix(path: Path, rng: random.Random) -> str:
    path.rename(path.with_suffix(rng.choice((".png", ".jpg", ".webp", ".txt", ".gif", ""))))
    return "another suffix"


RAW: dict[str, Change] = {
    "flip": _flip,
    "overwrite": _overwrite,
    "truncate": _truncate,
    "extend": _extend,
    "empty": _empty,
    "noise": _noise,
    "delete": _delete,
    "folder": _folder,
    "swap": lambda path, rng: None,  # needs another file: see `damage`
}
JSON: dict[str, Change] = {f"json {number}": _json for number in range(12)}  # as likely as all the others
FORMATS: dict[str, dict[str, Change]] = {
    r"\.json$": JSON,
    r"\.jsonl$": {f"json line {number}": _json_line for number in range(8)},
    r"\.npy$": {"array 1": _array, "array 2": _array, "array 3": _array},
    r"\.npz$": {"member header": _member_header, "member names": _member_names, "member json": _member_json},
    r"\.safetensors$": {"tensors 1": _tensor_header, "tensors 2": _tensor_header, "tensors 3": _tensor_header},
    r"\.metadata$": {"trap": _trap},
    r"\.pt$": {"trap": _trap, "inner trap": _inner_trap, "inner pickle": _inner_pickle},
    r"\.distcp$": {"trap": _trap},
    r"\.png$": {"png header": _png_header, "suffix": _other_suffix},
    r"\.(jpe?g|webp)$": {"jpeg header": _jpeg_header, "suffix": _other_suffix},
}
CONSISTENT = ("member header", "member names", "member json", "inner pickle", "png header", "jpeg header", "suffix")
