"""One trial: an artefact is copied, damaged and read, and what becomes of it is judged."""

import contextlib
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from st_ar.errors import UserError
from tests.fuzz.mutations import SPRUNG, damage
from tests.fuzz.targets import TARGETS, made

SECONDS = 20
"""A trial that takes longer hangs."""
ROOM = 1 << 30
"""Bytes that a reader may take beside what is there."""
REFUSED = object()


class Hang(BaseException):
    """No Exception, so that nothing takes it for damage."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Little time and little memory: what asks for more than ROOM is told that there is none."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    if pages is not None:  # Linux
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read(name: str, folder: Path) -> Any:
    """What comes out, or REFUSED."""
    try:
        with bounded():
            return TARGETS[name].read(folder)
    except UserError as error:
        said = str(error)
        assert said
        assert "\n" not in said, said
        assert len(said) < 2000, f"{len(said)} characters: {said[:200]}"
        return REFUSED


@cache
def expected(name: str, folder: Path) -> Any:
    """What comes out of the undamaged artefact."""
    shutil.copytree(made(name), folder)
    found = read(name, folder)
    assert found is not REFUSED
    return found


def attempt(name: str, seed: int, scratch: Path) -> str:
    """Damage artefact `name` as `seed` has it; returns what became of it, or fails.

    It is refused in one line, or read as if it were whole, or (where nobody could tell) as another one. It runs no code.
    """
    wanted = expected(name, made(name).with_name(f"{name}-expected"))
    folder = scratch / f"{name}-{seed}"
    shutil.copytree(made(name), folder)
    done = damage(folder, random.Random(f"{name} {seed}"))
    try:
        found = read(name, folder)
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            error.add_note(f"after {done}")
        raise
    assert not list(folder.rglob(SPRUNG)), f"code was run: {done}"
    assert found in (REFUSED, wanted) or TARGETS[name].is_legal(done), f"silently other work after {done}"
    shutil.rmtree(folder)
    return "refused" if found is REFUSED else "harmless" if found == wanted else "legal"
