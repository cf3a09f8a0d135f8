"""Completion: what the scripts offer is what the parsers take, as the shells themselves complete it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from st_ar.completion import completion, read_verbs
from st_ar.presets import PRESETS
from st_ar.verbs import VERBS

LINES = [
    (["st-ar", "tok"], {"tokenize"}),
    (["st-ar", "train", "st-ar-x"], {"st-ar-xl", "st-ar-xl-t2i"}),
    (["st-ar", "train", "st-ar-b", "--optim.sch"], {"--optim.schedule"}),
    (["st-ar", "train", "st-ar-b", "--optim.schedule", "co"], {"constant", "cosine"}),
    (["st-ar", "train-tokenizer", "kmeans", "--vocab-s"], {"--vocab-size"}),
    (["st-ar", "evaluate", "a.npz", "--metrics", "fid", "pre"], {"precision"}),
    (["st-ar", "convert", "a", "b", "--to", "l"], {"llamagen"}),
    (["st-ar", "reproduce", "table"], {f"table{n}" for n in range(1, 7)}),
    (["st-ar", "completion", "z"], {"zsh"}),
    (["st-ar", "likelihood", "--js"], {"--json"}),
]
"""Words, the last one begun -> what it may become."""


def test_every_verb_with_every_option_is_there() -> None:
    verbs = read_verbs()
    assert list(verbs) == ["train", "train-tokenizer", *VERBS]
    assert verbs["train"].presets == list(PRESETS)
    assert {"--tokens", "--selfguided.alpha", "--model.dim", "--selfguided.no-ema-warmup"} <= set(
        verbs["train"].options
    )
    assert verbs["sample"].options["--cfg-schedule"].choices == ["constant", "linear", "power-cosine"]
    assert not verbs["sample"].options["--ema"].takes_value
    assert (
        verbs["sample"].options["--num"].help == "Images to draw: 64 by default; of a text model one for each caption"
    )


@pytest.mark.parametrize(
    ("words", "wanted"), LINES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bash_completes(words: list[str], wanted: set[str], tmp_path: Path) -> None:
    script = tmp_path / "st-ar"
    script.write_text(completion("bash"))
    typed = " ".join(f"'{word}'" for word in words)
    call = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _st_ar; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-uc", call], capture_output=True, text=True, check=True)
    assert (set(done.stdout.split()), done.stderr) == (wanted, "")


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish here")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        line for line in LINES if "--metrics" not in line[0]
    ],  # fish offers choices for the first word after an option alone
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_fish_completes(words: list[str], wanted: set[str], tmp_path: Path) -> None:
    script = tmp_path / "st-ar.fish"
    script.write_text(completion("fish"))
    call = f"source {script}; complete -C '{' '.join(words)}'"
    done = subprocess.run(["fish", "-N", "-c", call], capture_output=True, text=True, check=True, cwd=tmp_path)
    offered = {line.split("\t")[0] for line in done.stdout.splitlines()}
    assert (wanted <= offered, done.stderr) == (True, "")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
@pytest.mark.parametrize(
    ("words", "wanted"), LINES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_zsh_completes(words: list[str], wanted: set[str], tmp_path: Path) -> None:
    """Its function is called with stand-ins for what zsh's line editor provides."""
    script = tmp_path / "_st-ar"
    script.write_text(completion("zsh"))
    typed = " ".join(f"'{word}'" for word in words)
    call = (
        f'compadd() {{ shift; print -l -- "$@" }}; _files() {{ print FILES }}; words=({typed}); CURRENT={len(words)}; '
        f"source {script}"
    )
    done = subprocess.run(["zsh", "-fc", call], capture_output=True, text=True, check=True)
    offered = {word for word in done.stdout.split() if word.startswith(words[-1])}
    assert (offered, done.stderr) == (wanted, "")


def test_help_lists_the_verbs_that_complete(capsys: pytest.CaptureFixture[str]) -> None:
    from st_ar.cli import main

    main(["--help"])
    listed = re.findall(r"(?m)^  ([a-z-]+)  ", capsys.readouterr().out)
    assert sorted(listed) == sorted(read_verbs())
