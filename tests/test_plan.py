"""benchmarks/plan.py: its formulas against the method's known costs, real modules and real files."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from st_ar.config import WatchConfig
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset
from st_ar.selfguided.guidance import Projector
from st_ar.training.loop import train
from tests.data.random_store import random_store
from tests.ranks import ROOT
from tests.training.toy_runs import GUIDED_RUN


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan", ROOT / "benchmarks" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["plan"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parameters_are_those_of_the_modules(plan: ModuleType) -> None:
    projector = Projector(32, GUIDED_RUN.selfguided.projector_hidden, GUIDED_RUN.selfguided.projector_depth)
    assert plan.projector_parameters(GUIDED_RUN) == sum(p.numel() for p in projector.parameters())
    weights = sum(p.numel() for p in Transformer(GUIDED_RUN.model).parameters())
    trained = weights + plan.projector_parameters(GUIDED_RUN)
    assert plan.state_bytes(GUIDED_RUN) == 4 * (4 * trained + weights)  # weights, gradients, two moments; average


def test_a_checkpoint_and_a_store_take_the_bytes_that_are_planned(plan: ModuleType, tmp_path: Path) -> None:
    config = replace(GUIDED_RUN, model=replace(GUIDED_RUN.model, dim=128), steps=1)
    tokens, *_ = random_store(tmp_path / "tokens", images=2000, crops=4)
    run = train(config, tokens, tmp_path / "run", watching=WatchConfig(track=("none",)))
    for folder, planned in (
        (run / "checkpoints" / "step_00000001", plan.checkpoint_bytes(config)),
        (tokens, plan.store_bytes(config.model, 2000, 4)),
    ):
        taken = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        assert taken == pytest.approx(planned, rel=0.03)


def test_the_volumes_are_those_of_ring_algorithms(plan: ModuleType) -> None:
    config = replace(get_preset("st-ar-xl"), batch_size=2048)
    trained = 4 * (plan.parameters(config.model) + plan.projector_parameters(config))
    assert plan.network_bytes(config, 64, "ddp", 8) == pytest.approx(2 * 63 / 64 * trained)
    assert plan.network_bytes(config, 64, "hybrid", 8) == pytest.approx(2 * 7 / 8 * trained / 8)
    assert plan.negatives_bytes(config, 64) == pytest.approx(63 / 64 * 2048 * 2 * 4 * 1280 * 4)
    assert plan.negatives_bytes(get_preset("llamagen-xl"), 64) == 0


def test_the_table_says_what_it_was_told(
    plan: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["plan.py", "st-ar-xl", "--gpus", "64", "--batch-size", "2048", "--epochs", "300"]
    monkeypatch.setattr(sys, "argv", [*common, "--tokens-per-second", "60000"])
    plan.main()
    measured = capsys.readouterr().out
    assert "throughput measured on one GPU" in measured
    assert "| forward operations a token, blocks / head | 1,486.4 / 41.9 MFLOP |" in measured  # METHOD, section 7
    assert "| tokens a second, of a GPU and together | 60,000, 3,840,000 |" in measured
    assert "| a step's computation | 273 ms |" in measured
    assert "| time of the run | 14.2 h |" in measured
    monkeypatch.setattr(sys, "argv", [*common, "--mfu", "0.4"])
    plan.main()
    assert "throughput ASSUMED: 40% of 989 TFLOP/s; not measured" in capsys.readouterr().out
