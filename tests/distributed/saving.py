"""A rank that writes checkpoints: python -m tests.distributed.saving {whole,killed,resumed} TOKENS OUT, under torchrun.

The last line that a rank prints is a JSON object.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from st_ar.distributed import process_group
from st_ar.errors import UserError
from st_ar.training import checkpoint, loop
from tests.disk import full_disk
from tests.distributed.cases import FSDP
from tests.training.toy_runs import GUIDED_RUN

SHARDED = replace(GUIDED_RUN, **FSDP, steps=8, checkpoint_every=2)


def killed(rank: int) -> None:
    """Let rank 1 kill itself after writing its part of the checkpoint of step 6."""
    describe: Callable[..., Any] = checkpoint.describe_files

    def armed(folder: Path, rank: int) -> Any:
        if folder.name == ".step_00000006.partial" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return describe(folder, rank)

    checkpoint.describe_files = armed


def full(tokens: Path, out: Path, rank: int) -> str:
    """Train with a disk that is full for rank 1 from step 5 on, and resume; return this rank's error."""
    backward, passes = loop.forward_backward, 0

    def armed(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 5 and rank == 1:
            disk.__enter__()
        return backward(*args)

    disk = full_disk(1 << 13)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "forward_backward", armed)
        with pytest.raises(UserError) as error:
            loop.train(SHARDED, tokens, out, preset="toy")
    if rank == 1:
        disk.__exit__(None, None, None)
    loop.train(SHARDED, tokens, out, resume=True, preset="toy")
    return str(error.value)


def main(mode: str, tokens: Path, out: Path) -> dict[str, Any]:
    rank, found = int(os.environ["RANK"]), {}
    with process_group("cpu", 60):
        if mode == "killed":
            killed(rank)
        loop.train(
            SHARDED, tokens, out / ("straight" if mode == "whole" else "killed"), resume=mode == "resumed", preset="toy"
        )
        if mode == "whole":
            found["full"] = full(tokens, out / "full", rank)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
