"""A process that trains TOY_GAN and kills itself at a chosen instant of a chosen step.

python -m tests.training.vqgan_dying OUT {log,checkpoint,export} STEP
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from st_ar.tokenizer.vq import VQTokenizer
from st_ar.training import run
from st_ar.training import vqgan as train
from tests.training.toy_gan import TOY_GAN, colours


def arm(instant: str, step: int) -> None:
    """Replace what the training calls at the instant by a version that ends the process first."""
    append_log, write, rename = run.append_log, VQTokenizer.write, os.replace

    def at(here: str, now: bool) -> None:
        if here == instant and now:
            os.kill(os.getpid(), signal.SIGKILL)

    def armed_append_log(path: Path, entry: dict[str, Any]) -> None:
        at("log", entry["step"] == step)
        append_log(path, entry)

    def armed_write(tokenizer: VQTokenizer, folder: Path, **info: int) -> None:
        at("export", info["step"] == step)
        write(tokenizer, folder, **info)

    def armed_rename(source: Any, target: Any) -> None:
        at("checkpoint", Path(target).name == f"step_{step:08d}")
        rename(source, target)

    run.append_log, VQTokenizer.write, os.replace = armed_append_log, armed_write, armed_rename


if __name__ == "__main__":
    torch.set_num_threads(1)  # as tests/conftest.py does: the bits depend on it
    arm(sys.argv[2], int(sys.argv[3]))
    train.train_tokenizer(TOY_GAN, colours(), Path(sys.argv[1]), preset="toy")
