"""Progress of long work: a tqdm bar on a terminal, otherwise a line every 30 seconds."""

import contextlib
import shutil
import sys
import time
from collections.abc import Generator
from contextvars import ContextVar
from importlib.util import find_spec

INTERVAL = 30.0
"""Seconds between two lines without a terminal. Shorter work prints nothing."""

_nested = ContextVar("_nested", default=False)
"""Whether other work already shows its progress."""


class Progress:
    """The progress of one piece of work; made by `progress`."""

    def __init__(self, what: str, total: int | None, unit: str, done: int, shown: bool) -> None:
        self.what, self.total, self.unit, self.before, self.shown = what, total, unit, done, shown
        self.done, self.text = done, ""
        self.start = self.printed = time.monotonic()
        self.bar = None
        if shown and sys.stderr.isatty() and find_spec("tqdm") is not None:  # training does not require tqdm
            from tqdm import tqdm

            width = shutil.get_terminal_size().columns  # 80 if the terminal does not report it
            self.bar = tqdm(desc=what, total=total, initial=done, unit=f" {unit}", file=sys.stderr, ncols=width)

    def advance(self, count: int) -> None:
        """Add `count` finished units."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.shown and (now := time.monotonic()) - self.printed >= INTERVAL and self.done > self.before:
            self.printed = now
            state = f"{self.done} {self.unit}"
            if self.total is not None:
                left = (now - self.start) * max(0, self.total - self.done) / (self.done - self.before)
                state = f"{self.done}/{self.total} {self.unit}, {left:.0f} s left"
            print(f"{self.what}: {state} {self.text}".rstrip(), file=sys.stderr)

    def note(self, text: str) -> None:
        """Show `text` beside the bar until the next note."""
        self.text = text
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def count(self, count: int) -> None:
        """Add `count` finished units, and show units per second without a bar too."""
        rate = (self.done + count - self.before) / max(1e-9, time.monotonic() - self.start)
        self.text = f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2f} {self.unit}/s"
        self.advance(count)


@contextlib.contextmanager
def progress(what: str, total: int | None, *, unit: str, done: int = 0, shown: bool = True) -> Generator[Progress]:
    """Show the progress of work. Work inside other work shows nothing.

    Args:
        what: name of the work.
        total: number of units; None if unknown.
        unit: plural name of a unit.
        done: units finished by an earlier run.
        shown: False on ranks that print nothing.
    """
    shown = shown and not _nested.get()
    if shown:
        _nested.set(True)
    bar = Progress(what, total, unit, done, shown)
    try:
        yield bar
    finally:
        if bar.bar is not None:
            bar.bar.close()
        if shown:
            _nested.set(False)
