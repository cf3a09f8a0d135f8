"""Several ranks train as one: gradients, weights, averages and logs, however the weights are held."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from st_ar.training import optim
from st_ar.training.log import read_log
from st_ar.training.loop import train
from tests.data.random_store import random_store
from tests.distributed.cases import CASES, CalmAdamW, alone, first_gradients, place
from tests.ranks import checked_torchrun

EVERY = [(world, name) for world, cases in CASES.items() for name in cases]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, trained by its ranks: one start for each number of them."""
    folder = tmp_path_factory.mktemp("out")
    tokens = random_store(folder / "tokens", images=20, crops=4, shards=2)[0]
    for world in CASES:
        checked_torchrun(world, "-m", "tests.distributed.worker", tokens, folder, logs=folder / f"logs-{world}")
    return folder


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim.torch.optim, "AdamW", CalmAdamW)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("world", "name"), EVERY)
def test_gradients_and_losses_are_those_of_one_rank(out: Path, world: int, name: str) -> None:
    config = CASES[world][name]
    expected, losses, _ = first_gradients(alone(config, world), 1, 0, "none")
    assert min(float(gradient.abs().max()) for gradient in expected.values()) > 1e-4
    close(load_file(out / f"{world}-{name}.safetensors"), expected)
    found = json.loads((out / f"{world}-{name}.json").read_text())
    assert found == pytest.approx([loss.item() for loss in losses], rel=1e-5)


@pytest.mark.parametrize(("world", "name"), EVERY)
def test_a_run_is_that_of_one_rank(out: Path, tmp_path: Path, world: int, name: str) -> None:
    config = CASES[world][name]
    run = train(alone(config, world), out / "tokens", tmp_path / "run", preset="toy")
    several = place(out, world, name)
    for file in ("model.safetensors", "ema.safetensors"):
        close(load_file(several / "export" / file), load_file(run / "export" / file))
    logs = [
        [
            {key: value for key, value in entry.items() if key != "tokens_per_second"}
            for entry in read_log(folder / "log.jsonl")
        ]
        for folder in (several, run)
    ]
    assert len(logs[0]) == config.steps
    for found, expected in zip(*logs, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
