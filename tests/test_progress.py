"""Progress: a bar on a terminal, otherwise a line every 30 seconds, and silence for short work."""

import sys

import pytest

from st_ar import progress as module
from st_ar.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since an arbitrary time; the test moves them on."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_short_work_is_silent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("count", 10, unit="sheep") as bar:
        for _ in range(10):
            clock[0] += 2.9
            bar.advance(1)
    assert capsys.readouterr() == ("", "")


def test_long_work_prints_units_and_seconds_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("count", 10, unit="sheep") as bar:
        for index in range(8):
            clock[0] += 10
            bar.note(f"black {index}")
            bar.advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "count: 3/10 sheep, 70 s left black 2",
        "count: 6/10 sheep, 40 s left black 5",
    ]


def test_resumed_work_counts_earlier_units_but_not_their_time(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("count", 100, unit="sheep", done=80) as bar:
        clock[0] += 40
        bar.advance(4)
    assert capsys.readouterr().err == "count: 84/100 sheep, 160 s left\n"


@pytest.mark.parametrize("installed", [True, False])
def test_a_terminal_gets_a_bar_if_tqdm_is_installed_and_lines_otherwise(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    if not installed:
        monkeypatch.setattr(module, "find_spec", lambda name: None)
        monkeypatch.setitem(sys.modules, "tqdm", None)  # importing it raises
    with progress("count", 10, unit="sheep") as bar:
        clock[0] += 31
        bar.advance(5)
    text = capsys.readouterr().err
    assert ("5/10" in text and "sheep/s" in text, text == "count: 5/10 sheep, 31 s left\n") == (
        installed,
        not installed,
    )


def test_work_of_unknown_length_prints_the_units_done(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("count", None, unit="sheep") as bar:
        clock[0] += 31
        bar.advance(7)
    assert capsys.readouterr().err == "count: 7 sheep\n"


def test_work_within_work_is_silent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("count", 10, unit="sheep") as bar:
        with progress("shear", 4, unit="sheep") as inner:
            clock[0] += 31
            inner.advance(1)
        bar.advance(1)
    with progress("shear", 4, unit="sheep") as alone:
        clock[0] += 31
        alone.advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "count: 1/10 sheep, 279 s left",
        "shear: 1/4 sheep, 93 s left",
    ]
