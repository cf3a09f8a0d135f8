"""Giving the commands: once each, again where they were stopped, and never over what others have made."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from st_ar.errors import UserError
from st_ar.reproduce.plan import Stage, is_done, run_stages
from tests.disk import contents, refused


def stages_in(work: Path) -> list[Stage]:
    """A store and a run that reads it, as `write` makes them."""
    store, run, result = work / "tokens", work / "runs" / "one", work / "runs" / "one-probe.json"
    return [
        Stage(name="tokens", command=("tokenize", "--out", str(store)), makes=store),
        Stage(name="train one", command=("train", "toy", "--tokens", str(store), "--out", str(run)), makes=run),
        Stage(name="probe one", command=("probe", "--model", str(run), "--out", str(result)), makes=result),
    ]


def write(calls: list[list[str]], stop_at: str = "") -> Callable[[list[str]], None]:
    """Commands that leave what they are asked for; the one `stop_at` is killed half-way."""

    def call(command: list[str]) -> None:
        calls.append(command)
        out = Path(command[command.index("--out") + 1])
        name = command[0]
        if name == "probe":
            if stop_at != "probe":
                out.write_text("{}")
        else:
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text("{}")
            if stop_at != name:
                (out / "meta.json").write_text("{}")
        if stop_at == name:
            raise KeyboardInterrupt

    return call


def test_each_command_is_given_once_and_its_time_kept(tmp_path: Path) -> None:
    calls: list[list[str]] = []
    stages = stages_in(tmp_path)
    run_stages(stages, tmp_path, write(calls))
    assert calls == [list(stage.command) for stage in stages]
    assert all(is_done(stage.makes, tmp_path) for stage in stages)
    before = contents(tmp_path)
    run_stages(stages, tmp_path, write(calls))
    assert len(calls) == 3  # nothing is left to do
    assert contents(tmp_path) == before


@pytest.mark.parametrize("stop_at", ["tokenize", "train", "probe"])
def test_a_stopped_command_is_continued_and_those_before_it_are_not_given_again(tmp_path: Path, stop_at: str) -> None:
    calls: list[list[str]] = []
    stages = stages_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, tmp_path, write(calls, stop_at))
    done = ["tokenize", "train", "probe"].index(stop_at)
    assert len(calls) == done + 1
    calls.clear()
    run_stages(stages, tmp_path, write(calls))
    expected = [list(stage.command) for stage in stages[done:]]
    if stop_at == "train":
        expected[0].append("--resume")
    assert calls == expected


def test_what_was_whole_when_it_was_stopped_is_not_made_again(tmp_path: Path) -> None:
    stages = stages_in(tmp_path)
    run_stages(stages, tmp_path, write([]))
    for name in ("tokens.json", "one-probe.json.json"):  # killed between the command's last file and the mark
        mark = tmp_path / "done" / name
        mark.write_text(json.dumps(json.loads(mark.read_text()) | {"seconds": None}))
    calls: list[list[str]] = []
    run_stages(stages, tmp_path, write(calls))
    assert calls == []


def test_a_codebook_that_was_whole_when_it_was_stopped_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "tokenizer"
    stage = Stage(name="tokenizer", command=("train-tokenizer", "kmeans", "--out", str(out)), makes=out)
    calls: list[list[str]] = []
    with pytest.raises(KeyboardInterrupt):
        run_stages([stage], tmp_path, write(calls, "train-tokenizer"))
    (out / "tokenizer.json").write_text("{}")
    run_stages([stage], tmp_path, write(calls))
    assert len(calls) == 1
    assert is_done(out, tmp_path)


def test_what_another_command_has_made_is_refused(tmp_path: Path) -> None:
    stages = stages_in(tmp_path)
    run_stages(stages, tmp_path, write([]))
    other = Stage(
        name="tokens", command=("tokenize", "--size", "8", "--out", str(stages[0].makes)), makes=stages[0].makes
    )
    with refused(
        tmp_path, r"tokens was made by another command, `st-ar tokenize --out .*not by `st-ar tokenize --size 8"
    ):
        run_stages([other], tmp_path, write([]))


def test_what_was_there_before_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    with refused(tmp_path, "tokens exists already and was not made here: choose another --out"):
        run_stages(stages_in(tmp_path), tmp_path, write([]))


def test_what_is_gone_is_said(tmp_path: Path) -> None:
    stages = stages_in(tmp_path)
    run_stages(stages, tmp_path, write([]))
    (tmp_path / "runs" / "one-probe.json").unlink()
    with pytest.raises(UserError, match=r"one-probe.json is missing, but .* says that it was made: remove "):
        run_stages(stages, tmp_path, write([]))


@pytest.mark.parametrize("mark", [{}, {"command": 3}, {"command": ["a", 1]}, {"command": ["a"], "seconds": "3"}])
def test_a_mark_that_does_not_say_what_was_done_is_refused(tmp_path: Path, mark: dict[str, object]) -> None:
    stage = stages_in(tmp_path)[0]
    path = tmp_path / "done" / f"{stage.makes.name}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(mark))
    for read in (lambda: run_stages([stage], tmp_path, write([])), lambda: is_done(stage.makes, tmp_path)):
        with refused(tmp_path, r"\.json is damaged \(it has no command and seconds\): remove it"):
            read()
