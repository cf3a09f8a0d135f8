"""Commands on several ranks, started by torchrun as a user starts them."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Done:
    """What torchrun and each of its ranks ended with and printed."""

    returncode: int
    said: str  # by torchrun itself
    out: list[str]
    err: list[str]


def torchrun(world: int, *command: str | Path, logs: Path, timeout: float = 240) -> Done:
    """Run `command` (a module after "-m", or a script) on `world` ranks of one thread each, their output kept under `logs`.

    torchrun itself chooses a free port and holds on to it, and ends the other ranks when one has failed; whatever is left
    after `timeout` seconds is killed.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    launch += ["--redirects", "3", "--log-dir", str(logs), *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        launch,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said = started.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGINT)  # torchrun ends its ranks, which lead sessions of their own
        said = started.communicate(timeout=60)[0] + f"\nnot done after {timeout} s"
    printed = {
        name: [(folder / f"{name}.log").read_text() for folder in sorted(logs.glob("*/attempt_0/*"))]
        for name in ("stdout", "stderr")
    }
    return Done(started.returncode, said, printed["stdout"], printed["stderr"])


def checked_torchrun(world: int, *command: str | Path, logs: Path) -> list[str]:
    """What each rank printed; all must have succeeded."""
    done = torchrun(world, *command, logs=logs)
    assert done.returncode == 0, (done.said, done.err)
    return done.out
