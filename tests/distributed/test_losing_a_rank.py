"""A rank that dies or hangs ends the others, which name it."""

import re
import signal
from pathlib import Path

import pytest

from st_ar.training.checkpoint_files import list_checkpoints
from tests.data.random_store import random_store
from tests.ranks import Done, torchrun

SMALL = "--model.dim 32 --model.n-layers 2 --model.n-heads 2 --model.vocab-size 16 --model.grid 4 --model.num-classes 3"
RUN = "--batch-size 8 --log-every 1 --steps 40 --checkpoint-every 2 --device cpu --dtype float32 --selfguided.projector-hidden 24"
RUN += " --selfguided.contrast-layer 1"


def lost(folder: Path, how: str, *options: str) -> Done:
    """Two ranks of a run, of which rank 1 is lost in step 5."""
    tokens = random_store(folder / "tokens", images=20, crops=4)[0]
    command = f"train st-ar-b --tokens {tokens} --out {folder / 'run'} {SMALL} {RUN}".split()
    return torchrun(2, "-m", "tests.distributed.dying", how, *command, *options, logs=folder / "logs", timeout=100)


def test_a_killed_rank_ends_the_others_which_name_it_and_keep_the_last_checkpoint(tmp_path: Path) -> None:
    done = lost(tmp_path, "kill")
    assert done.returncode == 1
    assert "not done after" not in done.said
    assert re.search(r"Root Cause.*?rank\s*: 1 .*?exitcode\s*: -9", done.said, re.DOTALL)
    expected = r"st-ar, rank 0: rank 0 of 2 has lost rank 1 \([^\n]*; it waits up to 600 s\): .* with --resume\n"
    assert re.fullmatch(expected, done.err[0])
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[0][0] == 2  # step 4 may not be complete


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_after_the_timeout(tmp_path: Path) -> None:
    done = lost(tmp_path, "sleep", "--rank-timeout", "5", "--parallel", "fsdp")
    assert done.returncode == 1
    assert "not done after" not in done.said
    assert re.search(r"has lost rank 1 \(Timed out .*; it waits up to 5 s\)", done.err[0])
    assert re.search(rf"rank\s*: 1 .*?exitcode\s*: -{int(signal.SIGTERM)}", done.said, re.DOTALL)
