"""Runs that get a signal at a chosen instant of a chosen step.

python -m tests.training.dying JOB FOLDER [SOURCE] forks all CASES of a job from one process, since imports take most of their time.
FOLDER/SIGNAL-INSTANT-STEP gets each run and what it said.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimizer imports it, which takes longer than a run

from st_ar.errors import Interrupted
from st_ar.tokenizer.vq import VQTokenizer
from st_ar.training import checkpoint, loop, run
from st_ar.training.vqgan import train_tokenizer
from tests.ranks import ROOT
from tests.training.toy_gan import TOY_GAN, colours
from tests.training.toy_runs import GUIDED_RUN


def train_guided(out: Path, tokens: Path) -> None:
    loop.train(GUIDED_RUN, tokens, out, preset="toy")


def train_watched(out: Path, line: Path) -> None:
    from tests.training.test_watch import RUN, everything

    loop.train(RUN, line / "tokens", out, watching=everything(line))


def train_gan(out: Path, _: Path) -> None:
    train_tokenizer(TOY_GAN, colours(), out, preset="toy")


CASES: dict[Callable[[Path, Path], None], list[tuple[str, str, int]]] = {
    train_guided: [
        ("SIGKILL", "checkpoint", 8),
        ("SIGKILL", "export", 12),
        ("SIGTERM", "backward", 7),
        ("SIGINT", "log", 7),
    ],
    train_watched: [("SIGKILL", "backward", 7), ("SIGKILL", "log", 8)],
    train_gan: [("SIGKILL", "checkpoint", 8), ("SIGKILL", "export", 12)],
}


def die(job: Callable[[Path, Path], None], folder: Path, source: Path = Path()) -> Path:
    """Run all cases of a job; returns the folder."""
    command = [sys.executable, "-m", "tests.training.dying", job.__name__, folder, source]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process that forks must have no others
    done = subprocess.run(command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def arm(number: int, instant: str, step: int) -> None:
    """Replace what training calls at the instant by a version that sends the signal first."""
    backward, append_log, rename = loop.forward_backward, run.append_log, os.replace
    save_weights, write = checkpoint.save_weights, VQTokenizer.write
    passes = 0

    def at(here: str, now: bool) -> None:
        if here == instant and now:
            os.kill(os.getpid(), number)

    def armed_backward(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        at("backward", passes == step)
        return backward(*args)

    def armed_append_log(path: Path, entry: dict[str, Any]) -> None:
        at("log", entry["step"] == step)
        append_log(path, entry)

    def armed_save_weights(folder: Path, weights: Any, config: Any, info: dict[str, Any]) -> None:
        at("export", info["step"] == step)
        save_weights(folder, weights, config, info)

    def armed_write(tokenizer: VQTokenizer, folder: Path, **info: int) -> None:
        at("export", info["step"] == step)
        write(tokenizer, folder, **info)

    def armed_rename(source: Any, target: Any) -> None:
        at("checkpoint", Path(target).name == f"step_{step:08d}")
        rename(source, target)

    loop.forward_backward, run.append_log, os.replace = armed_backward, armed_append_log, armed_rename
    checkpoint.save_weights, VQTokenizer.write = armed_save_weights, armed_write


def live(job: Callable[[Path, Path], None], folder: Path, source: Path, case: tuple[str, str, int]) -> int:
    """Run a case in a fork of this process; returns its status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    with open(folder / "said", "w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        torch.set_num_threads(1)  # as tests/conftest.py does: the bits depend on it
        arm(signal.Signals[case[0]], *case[1:])
        try:
            job(folder / "run", source)
            status = 0
        except Interrupted as interrupted:
            print(interrupted, interrupted.signum)
            status = 7
        except BaseException as error:
            print(repr(error))
    os._exit(status)


if __name__ == "__main__":
    job = next(job for job in CASES if job.__name__ == sys.argv[1])
    for case in CASES[job]:
        folder = Path(sys.argv[2]) / "-".join(map(str, case))
        folder.mkdir()
        (folder / "status").write_text(str(live(job, folder, Path(sys.argv[3]), case)))
