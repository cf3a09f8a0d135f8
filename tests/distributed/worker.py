"""A rank that trains every case: python -m tests.distributed.worker TOKENS OUT, under torchrun."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from st_ar.training import loop, optim
from st_ar.training.group import process_group
from tests.distributed.cases import CASES, CalmAdamW, first_gradients, place


def main(tokens: Path, out: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    optim.torch.optim.AdamW = CalmAdamW
    with process_group("cpu", 60):
        for name, config in CASES[world].items():
            parallel = "ddp" if config.parallel == "auto" else config.parallel
            gradients, losses, _ = first_gradients(config, world, rank, parallel)
            whole = {key: g.full_tensor() if isinstance(g, DTensor) else g for key, g in gradients.items()}
            if rank == 0:
                save_file(
                    {key: value.contiguous() for key, value in whole.items()}, out / f"{world}-{name}.safetensors"
                )
                (out / f"{world}-{name}.json").write_text(json.dumps([loss.item() for loss in losses]))
            loop.train(config, tokens, place(out, world, name), preset="toy")
            print(name, torch.initial_seed())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
