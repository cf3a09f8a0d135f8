"""Steps as a CUDA graph: with replays that run the recorded step again, a run ends with the same weights and log, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from st_ar.config import TrainConfig
from st_ar.errors import UserError
from st_ar.selfguided.objective import Losses
from st_ar.training import graph, loop
from st_ar.training.loop import train
from tests.training.toy_runs import GUIDED_RUN, PLAIN_RUN, assert_same_result

REPLAYS: list[int] = []
"""One for each replay: the number of its graph."""


def record(run: Callable[[], Losses]) -> tuple[Callable[[], None], Losses]:
    """Record without a GPU: a replay reads the static inputs and writes the static losses, as a CUDA graph does."""
    losses, number = Losses(*torch.zeros(5).unbind()), 1 + max(REPLAYS, default=-1)

    def replay() -> None:
        REPLAYS.append(number)
        for kept, new in zip(losses, run(), strict=True):
            kept.copy_(new)

    return replay, losses


@pytest.mark.parametrize(
    ("config", "graphs"),
    [
        (PLAIN_RUN, 1),
        (GUIDED_RUN, 1),
        (replace(GUIDED_RUN, selfguided=replace(GUIDED_RUN.selfguided, every=2), accumulate=2), 2),
        (replace(GUIDED_RUN, selfguided=replace(GUIDED_RUN.selfguided, mask_own_position=False)), 1),
    ],
    ids=["plain", "guided", "alternating in micro-batches", "own position seen"],
)
def test_a_run_of_replays_is_the_same(
    config: TrainConfig, graphs: int, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, log_every=5)
    expected = train(config, tokens, tmp_path / "expected")
    REPLAYS.clear()
    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(loop, "require_graph", lambda device, world: None)
    found = train(replace(config, cuda_graph=True), tokens, tmp_path / "found")
    assert_same_result(found, expected)
    assert len(set(REPLAYS)) == graphs
    # The first steps of each kind are not replayed, nor the guided ones that are logged, whose features are read.
    logged = 0 if config is PLAIN_RUN else len({5, 10, 12} - {1, 2, 3})
    assert len(REPLAYS) >= config.total_steps(8) - graph.WARM_UP * graphs - logged


def test_it_is_for_one_gpu(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="--cuda-graph is for a single process with a GPU, and this one has none: leave it"
    ):
        train(replace(PLAIN_RUN, cuda_graph=True), tokens, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="and there are 2 ranks"):
        graph.require_graph(torch.device("cuda"), 2)
    with pytest.raises(UserError, match="--cuda-graph does not work with --activation-checkpointing"):
        replace(PLAIN_RUN, cuda_graph=True, activation_checkpointing="full")
