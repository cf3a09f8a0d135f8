"""A rank of the runs of test_training: python -m tests.distributed.worker {TOKENS,compiled} OUT, under torchrun.

One start for all, since starting takes longer than training. The last line that a rank prints is a JSON object.
"""

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from st_ar.config import TrainConfig
from st_ar.distributed import process_group
from st_ar.errors import Interrupted, UserError
from st_ar.model import weights
from st_ar.training import loop, optim, run
from tests.calls import Calls
from tests.distributed.cases import (
    CAPTIONS,
    CASES,
    COMPILED,
    FSDP,
    GUIDED,
    INITIAL,
    RELAY,
    CalmAdamW,
    first_gradients,
    run_folder,
)


def counted(patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count this rank's calls of the functions that write files."""
    counts: dict[str, int] = {}
    for module, name in ((run, "append_log"), (run, "rewind_log"), (run, "write_json"), (weights, "save_tensors")):
        written: Callable[..., Any] = getattr(module, name)

        def writing(*args: Any, name: str = name, written: Callable[..., Any] = written, **kwargs: Any) -> None:
            counts[name] = counts.get(name, 0) + 1
            written(*args, **kwargs)

        patch.setattr(module, name, writing)
    return counts


def stopped_and_resumed(tokens: Path, out: Path, rank: int) -> str:
    """Stop a run by SIGTERM to rank 1 in step 2, and resume it; return the message of the stop."""
    backward, passes = loop.forward_backward, 0

    def signalled(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(*args)

    config = replace(GUIDED, **FSDP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "forward_backward", signalled)
        with pytest.raises(Interrupted) as stop:
            loop.train(config, tokens, out, preset="toy")
    if rank == 0:
        shutil.rmtree(out / "export")  # as if killed between checkpoint and export
    loop.train(config, tokens, out, resume=True, preset="toy")
    return str(stop.value)


def broken(tokens: Path, out: Path, rank: int) -> str:
    """Make the loss of rank 1 infinite in step 1; return this rank's error."""
    forward = loop.SelfGuided.forward

    def exploding(*args: Any) -> Any:
        losses = forward(*args)
        return losses._replace(total=losses.total * math.inf) if rank == 1 else losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.SelfGuided, "forward", exploding)
        with pytest.raises(UserError) as error:
            loop.train(GUIDED, tokens, out, preset="toy")
    return str(error.value)


def save_gradients(config: TrainConfig, world: int, rank: int, path: Path) -> dict[str, int]:
    """Save all ranks' gradients and this rank's losses; return the number of collectives by name."""
    calls = Calls("c10d")
    gradients, losses = first_gradients(config, world, rank, calls)
    whole = {key: g.full_tensor() if isinstance(g, DTensor) else g for key, g in gradients.items()}
    if rank == 0:
        save_file({key: g.contiguous() for key, g in whole.items()}, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps([loss.item() for loss in losses]))
    return dict(calls.counts)


def compiled(out: Path) -> None:
    with process_group("cpu", 60):
        for name, config in COMPILED.items():
            save_gradients(config, 2, int(os.environ["RANK"]), out / f"2-{name}")


def main(tokens: Path, out: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    optim.torch.optim.AdamW = CalmAdamW
    found: dict[str, Any] = {"collectives": {}}
    with pytest.MonkeyPatch.context() as patch, process_group("cpu", 60):
        found["writes"] = counted(patch)
        for name, config in CASES[world].items():
            found["collectives"][name] = save_gradients(config, world, rank, out / f"{world}-{name}")
            others = tokens.parent / "others" if name == "fsdp-bfloat16" else None
            loop.train(config, tokens, run_folder(out, world, name), validation=others, preset="toy")
        found["seed"] = torch.initial_seed()
        loop.train(RELAY[world], tokens, out / "relay", resume=world == 4, preset="toy")
        if world == 2:
            loop.train(CAPTIONS, tokens, out / "captions", text=tokens.parent / "text.safetensors", preset="toy")
            loop.train(INITIAL, tokens, out / "initial", init=run_folder(out, 2, "ddp"), preset="toy")
            found["stopped"] = stopped_and_resumed(tokens, out / "stopped", rank)
            found["broken"] = broken(tokens, out / "broken", rank)
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "compiled":
        compiled(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
