"""Each rank of a sharded run holds and sends what it should: FSDP2 on fake CUDA, with a process group that sends nothing.

Proven: the shards and names of a checkpoint, the number of collectives in a step, that nothing but the state is kept after a step,
and the peak of memory, as rank 0 of 8 and 64 ranks. Not proven: NCCL, races of streams, DDP (its reducer reads real memory), and
what the allocator, kernels and NCCL need beyond tensors.
"""

import math
from dataclasses import replace
from typing import Any

import pytest

from st_ar.presets import get_preset
from st_ar.training.plan import predict_memory
from tests.gpu.conftest import Script

Report = dict[str, Any]
LAYERS = 3
SHARDS = {"8": 8, "8 in two groups": 4, "64": 64}
"""Ranks over which the weights are sharded."""
GIB = 2**30


@pytest.fixture(scope="module")
def ranks(run_script: Script) -> Report:
    return run_script("ranks")


def state_bytes(report: Report) -> int:
    return sum(4 * math.prod(shape) for shape in report["shards"].values())


@pytest.mark.parametrize("run", SHARDS)
def test_all_but_the_optimizers_step_counts_is_sharded_by_rows(ranks: Report, run: str) -> None:
    expected = {
        name: [-(-rows // SHARDS[run]), *rest]
        for name, (rows, *rest) in ((name, shape) for name, shape in ranks["unsharded"].items() if shape)
    }
    assert ranks[run]["shards"] == expected
    assert all(name.startswith("optimizer.state.") and name.endswith(".step") for name in ranks[run]["whole"])


@pytest.mark.parametrize("run", SHARDS)
def test_a_checkpoint_names_its_tensors_as_one_rank_does(ranks: Report, run: str) -> None:
    assert ranks[run]["shards"].keys() | ranks[run]["whole"].keys() == ranks["unsharded"].keys()


@pytest.mark.parametrize("run", SHARDS)
def test_a_step_has_few_collectives(ranks: Report, run: str) -> None:
    groups = LAYERS + 2  # the blocks, the output head, and all else
    assert ranks[run]["collectives"] == {
        # the student's groups, its blocks again in the backward pass, the teacher's blocks and the rest of it
        "allgather_base": groups + LAYERS + LAYERS + 1,
        "reduce_scatter_base": groups,
        "allgather": 1,  # negatives
        "allreduce": 1 + (groups if run == "8 in two groups" else 0),  # losses, and gradients of the copies
        "allreduce of norms": 1,
    }


@pytest.mark.parametrize("run", SHARDS)
def test_a_step_leaves_nothing_but_the_state(ranks: Report, run: str) -> None:
    left = ranks[run]["after"] - state_bytes(ranks[run])
    assert 0 <= left < 2**18  # step counts, rotary tables, and the last batch


def over_budget(ranks: Report, budgets: dict[str, float]) -> dict[str, float]:
    """The peaks above their budgets in GiB."""
    peaks = {run: ranks[run]["peak"] / GIB for run in budgets}
    return {run: peak for run, peak in peaks.items() if peak > budgets[run]}


def prediction(run: str) -> float:
    """The peak that `st-ar train --plan` tells of the full size, in GiB."""
    world, _, kind = run.partition(", ")
    config = replace(get_preset("st-ar-xl"), parallel="fsdp", batch_size=16 * int(world))
    config = replace(config, activation_checkpointing=kind.split()[0] if kind else "none")
    return predict_memory(config, int(world), compiled=False).peak / GIB


def test_memory_peaks_within_the_budget(ranks: Report) -> None:
    assert over_budget(ranks, {"8": 1.5, "8 in two groups": 1.6, "64": 1.42}) == {}


@pytest.mark.slow
def test_memory_of_the_full_size_peaks_within_the_budget(run_script: Script) -> None:
    """ST-AR XL, 16 images of two views on each rank."""
    ranks = run_script("ranks", "full-size")
    budgets = {"8": 24, "64": 23, "8, selective recomputation": 13, "8, full recomputation": 4.6}
    assert over_budget(ranks, budgets) == {}
    assert {run: ranks[run]["peak"] / GIB for run in budgets} == pytest.approx(
        {run: prediction(run) for run in budgets}, rel=0.1
    )
