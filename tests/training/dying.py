"""A process that trains GUIDED_RUN and sends itself a signal at a chosen instant of a chosen step.

python -m tests.training.dying TOKENS OUT {SIGKILL,SIGTERM,SIGINT} {backward,log,checkpoint,export} STEP
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from st_ar.errors import Interrupted
from st_ar.training import checkpoint as keep
from st_ar.training import loop, run
from tests.training.toy_runs import GUIDED_RUN


def arm(number: int, instant: str, step: int) -> None:
    """Replace what the loop calls at the instant by a version that sends the signal first."""
    backward, append_log, save_weights, rename = loop.forward_backward, run.append_log, keep.save_weights, os.replace
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

    def armed_rename(source: Any, target: Any) -> None:
        at("checkpoint", Path(target).name == f"step_{step:08d}")
        rename(source, target)

    loop.forward_backward, run.append_log, keep.save_weights = armed_backward, armed_append_log, armed_save_weights
    os.replace = armed_rename


if __name__ == "__main__":
    torch.set_num_threads(1)  # as tests/conftest.py does: the bits depend on it
    arm(signal.Signals[sys.argv[3]], sys.argv[4], int(sys.argv[5]))
    try:
        loop.train(GUIDED_RUN, Path(sys.argv[1]), Path(sys.argv[2]), preset="toy")
    except Interrupted as interrupted:
        print(interrupted, interrupted.signum)
        sys.exit(7)
