"""Progress on long work: a bar with an ETA on a terminal, a line every half minute elsewhere."""

import contextlib
import sys
import time
from collections.abc import Generator
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Protocol

_within = ContextVar("_within", default=False)
"""Whether work that is shown is going on around."""


class Progress(Protocol):
    """What the work tells."""

    def advance(self, count: int) -> None:
        """So many more units are done."""
        ...

    def note(self, text: str) -> None:
        """Something worth seeing beside the bar, replaced by the next."""
        ...


class _Lines:
    """Plain lines for logs; silent for work of under half a minute."""

    def __init__(self, what: str, total: int | None, unit: str, before: int) -> None:
        self.what, self.total, self.unit, self.before = what, total, unit, before
        self.done, self.text = before, ""
        self.begun = self.said = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said >= 30 and self.done > self.before:
            self.said = now
            if self.total is None:
                state = f"{self.done} {self.unit}"
            else:
                left = (now - self.begun) * max(0, self.total - self.done) / (self.done - self.before)
                state = f"{self.done}/{self.total} {self.unit}, {left:.0f} s left"
            print(f"{self.what}: {state} {self.text}".rstrip(), file=sys.stderr)

    def note(self, text: str) -> None:
        self.text = text


class _Silent:
    """Of work that is a part of other work, or of a rank whose work another one stands for."""

    def advance(self, count: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@contextlib.contextmanager
def progress(what: str, total: int | None, *, unit: str, done: int = 0, shown: bool = True) -> Generator[Progress]:
    """Follow work of `total` units (None: nobody knows), `done` of which are done already; only the rank that is `shown` tells.

    Work within other work is not shown.
    """
    if not shown or _within.get():
        yield _Silent()
        return
    _within.set(True)
    try:
        with _shown(what, total, unit, done) as bar:
            yield bar
    finally:
        _within.set(False)


@contextlib.contextmanager
def _shown(what: str, total: int | None, unit: str, done: int) -> Generator[Progress]:
    if not sys.stderr.isatty() or find_spec("rich") is None:  # training itself needs torch, numpy and safetensors alone
        yield _Lines(what, total, unit, done)
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("[bold]{task.description}"),
        rich.BarColumn(bar_width=24),
        rich.MofNCompleteColumn(),
        rich.TextColumn(unit),
        rich.TimeElapsedColumn(),
        rich.TextColumn("ETA"),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[text]}"),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, completed=done, text="")

        class _Bar:
            def advance(self, count: int) -> None:
                bar.advance(task, count)

            def note(self, text: str) -> None:
                bar.update(task, text=text)

        yield _Bar()


class Pace:
    """So many units per second of this call, beside the bar."""

    def __init__(self, unit: str) -> None:
        self.unit, self.begun, self.done = unit, time.monotonic(), 0

    def advance(self, bar: Progress, count: int) -> None:
        """So many more units are done."""
        self.done += count
        rate = self.done / max(1e-9, time.monotonic() - self.begun)
        bar.note(f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2f} {self.unit}/s")
        bar.advance(count)
