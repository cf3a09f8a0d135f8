"""benchmarks/plan.py: its formulas against known volumes and real files."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from st_ar.presets import get_preset
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


def test_a_store_takes_the_bytes_that_are_planned(plan: ModuleType, tmp_path: Path) -> None:
    tokens, *_ = random_store(tmp_path / "tokens", images=2000, crops=4)
    taken = sum(file.stat().st_size for file in tokens.rglob("*") if file.is_file())
    assert taken == pytest.approx(plan.store_bytes(GUIDED_RUN.model, 2000, 4), rel=0.03)


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
    common = ["plan.py", "st-ar-xl", "--gpus", "64", "--batch-size", "2048"]
    monkeypatch.setattr(sys, "argv", [*common, "--tokens-per-second", "60000"])
    plan.main()
    measured = capsys.readouterr().out
    assert "throughput measured on one GPU" in measured
    assert "| tokens per second, per GPU and in total | 60,000, 3,840,000 |" in measured
    assert "| a step's computation | 273 ms |" in measured
    assert "| checkpoint | 12.5 GB, 6 s at 2 GB/s |" in measured
    monkeypatch.setattr(sys, "argv", [*common, "--mfu", "0.4"])
    plan.main()
    assert "throughput ASSUMED: 40% of 989 TFLOP/s; not measured" in capsys.readouterr().out
