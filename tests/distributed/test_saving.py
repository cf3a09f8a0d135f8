"""Checkpoints of several ranks: killed while writing, damaged, and on a disk that is full for one of them."""

import json
import re
import signal
from pathlib import Path

import pytest

from st_ar.training.checkpoint_files import list_checkpoints
from tests.data.random_store import random_store
from tests.disk import contents, flip_byte
from tests.ranks import checked_torchrun, torchrun

WORKER = ("-m", "tests.distributed.saving")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two ranks: straight, and full, with a disk that was full for rank 1 for a while."""
    out = tmp_path_factory.mktemp("out")
    random_store(out / "tokens", images=20, crops=4, shards=2)
    said = checked_torchrun(2, *WORKER, "whole", out / "tokens", out, logs=out / "logs")
    (out / "said.json").write_text(json.dumps([json.loads(text.splitlines()[-1]) for text in said]))
    return out


def steps(run: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run / "checkpoints")]


@pytest.mark.slow
def test_a_rank_killed_while_it_saves_and_a_damaged_shard_cost_nothing_but_time(folder: Path) -> None:
    run = folder / "killed"
    done = torchrun(2, *WORKER, "killed", folder / "tokens", folder, logs=folder / "logs-killed")
    assert re.search(rf"Root Cause.*?rank\s*: 1 .*?exitcode\s*: -{int(signal.SIGKILL)}", done.said, re.DOTALL)
    assert steps(run) == [2, 4]
    flip_byte(run / "checkpoints" / "step_00000004" / "tensors" / "__1_0.distcp", 3000)
    checked_torchrun(2, *WORKER, "resumed", folder / "tokens", folder, logs=folder / "logs-resumed")
    said = [path.read_text() for path in sorted((folder / "logs-resumed").glob("*/attempt_0/*/stderr.log"))]
    assert [text.count("is damaged (tensors/__1_0.distcp does not match its checksum)") for text in said] == [1, 0]
    assert contents(run / "export") == contents(folder / "straight" / "export")
    assert steps(run) == steps(folder / "straight") == [6, 8]


def test_a_disk_that_is_full_for_one_rank_is_said_by_all_and_leaves_the_last_checkpoint(folder: Path) -> None:
    for said in json.loads((folder / "said.json").read_text()):
        assert re.fullmatch(
            r"cannot write the checkpoint of step [46] \(.*\); .*step_0000000[24] is intact; free some space and .*",
            said["full"],
        )
    assert contents(folder / "full" / "export") == contents(folder / "straight" / "export")
