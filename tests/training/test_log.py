"""log.jsonl: appended, rewound, and readable whatever instant a run was killed at."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_ar.errors import UserError
from st_ar.training.run import append_log, read_log, rewind_log
from tests.disk import contents, full_disk, refused


def entries(steps: range) -> list[dict[str, float]]:
    return [{"step": step, "loss": 1 / step} for step in steps]


def written(folder: Path, steps: range) -> Path:
    for entry in entries(steps):
        append_log(folder / "log.jsonl", entry)
    return folder / "log.jsonl"


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    log = written(tmp_path, range(1, 6))
    assert read_log(log) == entries(range(1, 6))
    assert [json.loads(line) for line in log.read_text().splitlines()] == entries(range(1, 6))


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") == []


def test_rewinding_drops_what_came_after_the_step(tmp_path: Path) -> None:
    log = written(tmp_path, range(1, 8))
    rewind_log(log, 4)
    assert read_log(log) == entries(range(1, 5))
    append_log(log, {"step": 5, "loss": 7.0})
    assert read_log(log)[-1] == {"step": 5, "loss": 7.0}
    assert list(contents(tmp_path)) == ["log.jsonl"]


def test_rewinding_to_the_start_leaves_an_empty_log(tmp_path: Path) -> None:
    log = written(tmp_path, range(1, 4))
    rewind_log(log, 0)
    assert read_log(log) == []


@given(cut=st.integers(0, 200))
def test_a_log_cut_anywhere_keeps_its_whole_lines_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    log = written(tmp_path_factory.mktemp("log"), range(1, 7))
    data = log.read_bytes()[:cut]
    log.write_bytes(data)
    whole = data.count(b"\n") + (not data.endswith(b"\n") and data.endswith(b"}"))
    assert read_log(log) == entries(range(1, 7))[:whole]
    rewind_log(log, whole)
    append_log(log, {"step": whole + 1, "loss": 0.5})
    assert read_log(log) == [*entries(range(1, 7))[:whole], {"step": whole + 1, "loss": 0.5}]


def test_a_full_disk_is_said_with_the_remedy(tmp_path: Path) -> None:
    log = written(tmp_path, range(1, 4))
    with (
        full_disk(log.stat().st_size),
        refused(tmp_path, "cannot write .*log.jsonl: .*free some space and continue with --resume"),
    ):
        append_log(log, {"step": 4, "loss": 0.25})
    with pytest.raises(UserError, match="cannot write"), full_disk(10):
        rewind_log(log, 2)
    assert read_log(log) == entries(range(1, 4))


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"loss": 1}', '{"step": "2"}', '{"step": 1, "step": 2}', "\x00\udcff"]
)
def test_a_damaged_line_in_the_middle_is_named_and_nothing_after_it_is_lost(tmp_path: Path, line: str) -> None:
    log = written(tmp_path, range(1, 4))
    lines = log.read_text().splitlines()
    lines[1] = line
    log.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    for read in (read_log, lambda path: rewind_log(path, 3)):
        with refused(tmp_path, r"log\.jsonl is damaged: line 2 is no logged step .*mend or remove that line"):
            read(log)


def test_a_folder_in_the_logs_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with refused(tmp_path, r"cannot read .*log\.jsonl"):
        read_log(tmp_path / "log.jsonl")
