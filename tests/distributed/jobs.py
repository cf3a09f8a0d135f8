"""A rank that tokenizes and samples: python -m tests.distributed.jobs MODEL FOLDER, or `kill` instead of MODEL."""

import os
import signal
import sys
from pathlib import Path

import torch

from st_ar.distributed import process_group
from tests.sampling_processes import draw
from tests.tokenizer.test_tokenize import COUNT, mixed_source, tiny_source, tokenize_mixed


def main(model: str, folder: Path) -> None:
    """Every job in one process group; with `kill`, rank 1 kills itself in its first shard."""
    torch.set_num_threads(1)  # as tests/conftest.py does: the bits depend on it
    if model == "kill":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        tokenize_mixed(folder / "killed", tiny_source(killed_after=6 if os.environ["RANK"] == "1" else COUNT))
        return
    with process_group("cpu"):
        tokenize_mixed(folder / "store")
        tokenize_mixed(folder / "stream", mixed_source(count=None, streaming=True))
        for out in ("samples.npz", "samples"):
            draw(Path(model), folder / "drawn" / out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
