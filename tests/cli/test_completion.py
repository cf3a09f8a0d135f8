"""Completion: what the scripts offer is what the parsers take, as the shells themselves complete it."""

import subprocess
from pathlib import Path
from typing import get_args

import pytest

from st_ar.cli import COMMANDS
from st_ar.cli.completion import Shell, completion, read_commands
from st_ar.presets import PRESETS
from tests.programs import find_program

LINES = [
    (["st-ar", "tok"], {"tokenize"}),
    (["st-ar", "train", "st-ar-x"], {"st-ar-xl", "st-ar-xl-every2", "st-ar-xl-t2i", "st-ar-xl-view"}),
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


def test_every_command_with_every_option_is_there() -> None:
    commands = read_commands()
    assert list(commands) == list(COMMANDS)
    assert commands["train"].first == list(PRESETS)
    assert {"--tokens", "--selfguided.alpha", "--model.dim", "--selfguided.no-ema-warmup"} <= set(
        commands["train"].options
    )
    assert commands["sample"].options["--cfg-schedule"].choices == ["constant", "linear", "power-cosine"]
    assert not commands["sample"].options["--ema"].takes_value
    assert (
        commands["sample"].options["--num"].help
        == commands["sample"].options["--num-images"].help
        == "Number of images"
    )


def said_by(command: list[str]) -> list[str]:
    """Lines of a shell that has nothing to complain of."""
    done = subprocess.run([find_program(command[0]), *command[1:]], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def offered(shell: Shell, words: list[str], folder: Path) -> set[str]:
    """What a shell offers for the last word after it has read the script; zsh's line editor has stand-ins."""
    script = folder / "st-ar"
    script.write_text(completion(shell))
    typed = " ".join(f"'{word}'" for word in words)
    if shell == "bash":
        state = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}"
        lines = said_by(["bash", "-uc", f"source {script}; {state}; _st_ar; printf '%s\\n' \"${{COMPREPLY[@]}}\""])
    elif shell == "zsh":
        state = f"words=({typed}); CURRENT={len(words)}"
        editor = 'compadd() { shift; print -l -- "$@" }; _files() { print FILES }'
        lines = said_by(["zsh", "-fc", f"{editor}; {state}; source {script}"])
    else:
        lines = said_by(["fish", "-N", "-c", f"source {script}; complete -C '{' '.join(words)}'"])
    return {word for line in lines if (word := line.split("\t")[0]).startswith(words[-1])}


@pytest.mark.parametrize("shell", get_args(Shell))
@pytest.mark.parametrize(("words", "wanted"), LINES, ids=[" ".join(words) for words, _ in LINES])
def test_shells_complete(shell: Shell, words: list[str], wanted: set[str], tmp_path: Path) -> None:
    if shell == "fish" and "--metrics" in words:
        wanted = set()  # fish offers choices for the first word after an option alone
    assert offered(shell, words, tmp_path) == wanted
