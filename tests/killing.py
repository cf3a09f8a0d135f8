"""Jobs that are killed again and again at random instants, until they have had enough.

python -m tests.killing JOB FOLDER KILLS SEED

A job's whole life is first lived undisturbed, in FOLDER/straight. Then it is begun in FOLDER/0, killed by signal 9 at a
random instant, gone on with, killed again and so on. If it gets to its end another begins in FOLDER/1; the last one is let live.
Every second kill waits until something is half written. What happened is printed as JSON.

All lives are forks of this process, which has imported torch and never used it, so that a life begins in no time.
"""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which an optimizer imports: that takes longer than a life

ROOT = Path(__file__).parents[1]
Job = Callable[[Path], object]


def survivors(job: str, folder: Path, kills: int, *, half_written: int = 0, seed: int = 0) -> list[Path]:
    """Have a job of tests/killed.py killed so often; the folders of what it came to, first that of the undisturbed life.

    Args:
        half_written: so often at least something must have been half written at the time.
    """
    command = [sys.executable, "-m", "tests.killing", job, folder, str(kills), str(seed)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # there must be none before a fork
    done = subprocess.run(command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills
    assert found["at_something_half_written"] >= half_written
    return [folder / "straight", *(folder / str(index) for index in range(found["ends"]))]


def begin(job: Job, folder: Path) -> int:
    """A life of the job, in a process of its own."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)  # as tests/conftest.py does: the bits depend on it
        job(folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def end(pid: int) -> bool:
    """Whether the life ended by being killed, not by itself."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"the job failed with status {status}")
    return status != 0


def half_written(folder: Path) -> list[str]:
    """Files and folders that have not got their names yet; they may get them or vanish while one looks."""
    below = [(Path(place), names) for place, *kinds in os.walk(folder) for names in kinds]
    partial = [place / name for place, names in below for name in names if fnmatch(name, ".*.partial")]
    return sorted(str(path.relative_to(folder)) for path in partial)


def die(pid: int, folder: Path, after: float, draws: random.Random, *, writing: bool) -> None:
    """Kill a life so many seconds after its beginning, if `writing` when something is half written."""
    time.sleep(after)
    if writing:
        deadline = time.monotonic() + 5
        while (
            not half_written(folder)
            and time.monotonic() < deadline
            and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.0005)
        time.sleep(draws.uniform(0, 0.02))
    os.kill(pid, signal.SIGKILL)


def main(name: str, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill the job so many times; what came of it."""
    job, draws = getattr(importlib.import_module("tests.killed"), name), random.Random(seed)
    begun = time.monotonic()
    assert not end(begin(job, folder / "straight"))
    whole = time.monotonic() - begun
    killed: list[list[str]] = []
    ends = 0
    while len(killed) < kills:
        here = folder / str(ends)
        pid = begin(job, here)
        die(pid, here, draws.uniform(0, 0.6 * whole), draws, writing=len(killed) % 2 == 1)
        if end(pid):
            killed.append(half_written(here))
        else:
            ends += 1
    assert not end(begin(job, folder / str(ends)))
    return {
        "kills": len(killed),
        "at_something_half_written": sum(bool(names) for names in killed),
        "half_written": killed,
        "ends": ends + 1,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
