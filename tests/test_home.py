"""~ is the home folder in every option and function that takes a path."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import st_ar
from st_ar.cli import expand_home, main, spell_out
from st_ar.data.images import open_images
from st_ar.data.store import TokenStore
from st_ar.data.text import TextStore, write_text
from st_ar.training.loop import train
from tests.data.random_store import random_store
from tests.training.toy_runs import PLAIN_RUN


@pytest.mark.parametrize(
    ("argument", "expanded"),
    [
        ("--out=~/S", "--out=/home/me/S"),
        ("~/S", "/home/me/S"),
        ("~", "/home/me"),
        ("--out=S~", "--out=S~"),
        ("S/~", "S/~"),
        ("--steps=3", "--steps=3"),
    ],
)
def test_arguments(monkeypatch: pytest.MonkeyPatch, argument: str, expanded: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home(argument) == expanded


def test_functions_and_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    random_store(tmp_path / "tokens", images=20, crops=4)
    assert len(TokenStore("~/tokens")) == 20
    train(replace(PLAIN_RUN, steps=1), Path("~/tokens"), Path("~/run"))
    assert (tmp_path / "run/export/model.safetensors").exists()
    assert st_ar.load_model("~/run").config == PLAIN_RUN.model
    write_text("~/text.safetensors", [np.ones((1, 3), np.float32)])
    assert TextStore("~/text.safetensors").dim == 3
    main(["train-tokenizer", "kmeans", "--images=digits", "--vocab-size=4", "--size=8", "--patch=4", "--out=~/km"])
    assert st_ar.load_tokenizer("~/km").vocab_size == 4
    with pytest.raises(st_ar.UserError, match="no such folder"):
        open_images("folder:~/pictures")
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("arguments", "spelled"),
    [
        ("--compile --steps 3", "--compile True --steps 3"),
        ("--steps 3 --compile", "--steps 3 --compile True"),
        ("--no-compile --steps 3", "--compile False --steps 3"),
        ("--compile auto --steps 3", "--compile auto --steps 3"),
        ("--compile False", "--compile False"),
        ("--compile=auto", "--compile=auto"),
    ],
)
def test_a_setting_that_may_be_auto_is_also_a_flag(arguments: str, spelled: str) -> None:
    assert spell_out(arguments.split()) == spelled.split()
