"""Processes that draw the samples of tests/test_sampling.py: killed at a chosen instant.

python -m tests.sampling_processes LINE FOLDER: forks them all from one process, since imports take the most of their time.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from st_ar.config import SampleSettings
from st_ar.model.weights import open_model
from st_ar.sampling import Sampler, sample_to
from tests.small_line import random_tokenizer

LABELS = [0, 2, 1, 0, 0, 1, 2]
SETTINGS = SampleSettings(seed=9, top_k=5, cfg_scale=1.5)
BATCH = 2
INSTANTS = {
    "samples.npz": [
        "part-000000.npy",
        "part-000000.sha256",
        "part-000002.npy",
        "samples.npz.preview.png",
        "samples.npz",
        "samples.json",
        "job.json",
    ],
    "samples": ["000000.png", "000003.png", "metadata.json", "job.json"],
}
"""By output: a job is killed just before this file takes its name, or, for job.json, just before it is removed."""


def draw(model_folder: Path, out: Path, *, batch_size: int = BATCH, **changes: Any) -> None:
    """The samples, with some settings changed."""
    model, info = open_model(model_folder, ema=changes.pop("ema", False))
    labels = changes.pop("labels", LABELS)
    settings = SampleSettings(**{**SETTINGS.__dict__, **changes})
    sampler = Sampler(model, random_tokenizer(), settings)
    sample_to(out, sampler, labels, info, batch_size=batch_size)


def arm(name: str) -> None:
    """Kill this process before the file `name` takes its name or, if it is job.json, is removed."""
    rename, unlink = os.replace, Path.unlink

    def armed_rename(source: Any, target: Any) -> None:
        if Path(target).name == name != "job.json":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    def armed_unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == name == "job.json":
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(self, missing_ok)

    os.replace, Path.unlink = armed_rename, armed_unlink


def fork(work: Callable[[], None]) -> int:
    """Run the work in a child; its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def main(model: Path, folder: Path) -> None:
    draw(model, folder / "before")  # so that no child does anew what a process does once
    for out, instants in INSTANTS.items():
        for instant in instants:

            def killed(out: str = out, instant: str = instant) -> None:
                arm(instant)
                draw(model, folder / f"{out}-{instant}" / out)

            assert os.waitstatus_to_exitcode(os.waitpid(fork(killed), 0)[1]) == -signal.SIGKILL, (out, instant)


if __name__ == "__main__":
    torch.set_num_threads(1)  # as tests/conftest.py does: the bits depend on it
    main(Path(sys.argv[1]), Path(sys.argv[2]))
