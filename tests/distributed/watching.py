"""A rank that trains with and without watching: python -m tests.distributed.watching LINE OUT, under torchrun."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from st_ar.config import WatchConfig
from st_ar.distributed import process_group
from st_ar.training.loop import train
from tests.distributed.cases import GUIDED


def main(line: Path, out: Path) -> None:
    unseen = WatchConfig(track=("none",))
    watched = WatchConfig(
        sample_every=2, sample_tokenizer=line / "tokenizer", probe_every=3, probe_test_tokens=line / "test"
    )
    with process_group("cpu", 60):
        for parallel in ("ddp", "fsdp"):
            config = replace(GUIDED, parallel=parallel, log_every=4)
            train(config, line / "tokens", out / parallel / "unseen", watching=unseen)
            train(config, line / "tokens", out / parallel / "watched", watching=watched)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
