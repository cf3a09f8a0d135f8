"""Text files are UTF-8 in every locale, and names that are not UTF-8 are escaped."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import st_ar
from st_ar.cli.understand import choose_names
from st_ar.files import write_csv, write_text
from st_ar.model.weights import name_models
from tests.data.pictures import noise

ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
"""A locale whose encoding is ASCII, without the UTF-8 mode that Python otherwise switches on for it."""


def text_calls(source: Path) -> list[ast.Call]:
    """The calls that open text files in a module."""
    calls = [node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    methods = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr in ("read_text", "write_text")]
    files = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "open"]
    binary = [c for c in files if any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in c.args[1:])]
    metadata = [c for c in methods if c.args]  # importlib.metadata's read_text(name) is always UTF-8
    return [call for call in methods + files if call not in binary + metadata]


def test_no_text_file_takes_its_encoding_from_the_locale() -> None:
    sources = sorted(Path(st_ar.__file__).parent.rglob("*.py"))
    found = {(source.name, call.lineno): call for source in sources for call in text_calls(source)}
    assert len(found) > 5
    assert [where for where, call in found.items() if "encoding" not in {k.arg for k in call.keywords}] == []


def test_text_files_escape_what_is_not_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", os.fsdecode("é ".encode() + b"caf\xe9 \xf0\x9f\xa6\x80"))
    assert (tmp_path / "a.txt").read_bytes() == "é caf\\xe9 🦀".encode()
    write_csv(tmp_path / "a.csv", ["Ärger", "b"], [["caf\udce9", None]])
    assert (tmp_path / "a.csv").read_bytes() == "Ärger,b\ncaf\\xe9,\n".encode()


@pytest.mark.parametrize("choose", [choose_names, name_models])
def test_names_that_are_not_utf_8_can_be_drawn(choose: Callable[[list[Path], list[str]], list[str]]) -> None:
    folder = Path(os.fsdecode(b"caf\xe9"))
    assert choose([folder, Path("été")], []) == ["caf\\xe9", "été"]
    assert choose([folder], [os.fsdecode("é".encode() + b"\xff")]) == ["é\\xff"]


@pytest.mark.slow
def test_a_locale_of_ascii(tmp_path: Path) -> None:
    for label in ("été", "Ärger"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(6):
            noise(32, 32, seed=number).save(tmp_path / "pictures" / label / f"ß{number}.png")
    script = """
from st_ar.cli import main
main("train-tokenizer kmeans --images folder:pictures --size 32 --vocab-size 8 --out tok".split())
main("tokenize --images folder:pictures --tokenizer tok --size 32 --out tokens".split())
main("invariance --tokenizer tok --names café --images folder:pictures --num 4 --out inv --page page.html".split())
"""
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env={**os.environ, **ASCII}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "caf\\xe9" in done.stdout.decode("ascii")
    assert json.loads((tmp_path / "tokens/meta.json").read_bytes())["class_names"] == ["Ärger", "été"]
    assert "café" in (tmp_path / "page.html").read_bytes().decode("utf-8")
