"""benchmarks/on_gpu.py at its small size: what needs no GPU to be wrong."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from st_ar.evaluation.generation.image_sets import read_array
from st_ar.tokenizer import load_tokenizer, to_uint8
from st_ar.tokenizer.kmeans import KMeansTokenizer
from tests.data.random_store import random_store
from tests.ranks import ROOT


def benchmark(name: str, *arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the slice cifar10 has left, with tokens of a vocabulary that is not the preset's."""
    folder = tmp_path_factory.mktemp("on-gpu")
    store, _, _ = random_store(folder / "tokens", grid=8, vocab_size=32, num_classes=10)
    stores = ["--tokens", store, "--test-tokens", store]
    benchmark("on_gpu.py", "cifar10", "--small", *stores, "--out", folder / "out")
    return folder / "out"


def test_each_method_is_trained_and_measured(out: Path) -> None:
    found = json.loads((out / "small-cifar10.json").read_text())["results"]
    assert (found.pop("steps"), found.pop("seed")) == (20, 0)
    assert list(found) == ["control", "st-ar", "view"]
    for method in found.values():
        assert method["seconds_per_step"] > 0
        for weights in (method["live"], method["EMA"]):
            assert weights["validation loss"] == pytest.approx(np.log(32), rel=0.1)  # nothing to learn in noise
            assert len(weights["probe"]) == 8
    losses = {name: method["live"]["validation loss"] for name, method in found.items()}
    assert len(set(losses.values())) == 3


def test_samples_become_images_to_evaluate(out: Path, tmp_path: Path) -> None:
    codebook = torch.rand(32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    KMeansTokenizer(codebook, 4).save(tmp_path / "tokenizer")
    drawn = out / "cifar10-samples-seed0.npz"
    benchmark("decoded.py", drawn, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path)
    tokens = read_array(drawn, "view-EMA")
    assert tokens.shape == (100, 64)
    decoded = load_tokenizer(tmp_path / "tokenizer").decode(torch.from_numpy(tokens.astype(np.int64)).view(100, 8, 8))
    images = read_array(tmp_path / "cifar10-samples-seed0-view-EMA.npz", "arr_0")
    assert np.array_equal(images, to_uint8(decoded).numpy())
    assert len(list(tmp_path.glob("*.npz"))) == 6


def test_a_slice_that_fails_says_why_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    on_gpu = importlib.import_module("on_gpu")

    def broken(*_: Any, keep: Any, **__: Any) -> None:
        keep({"half": 1})
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(on_gpu.SLICES, "training", broken)
    monkeypatch.setitem(on_gpu.SLICES, "features", lambda *_: {"whole": 2})
    given = ["training", "features", "--small", "--revision", "abc", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", *given])
    with pytest.raises(SystemExit, match="failed: training"):
        on_gpu.main()
    found = {path.stem: json.loads(path.read_text())["results"] for path in tmp_path.glob("*.json")}
    assert found == {
        "small-training": {"revision": "abc", "half": 1, "failed": "no such kernel"},
        "small-features": {"revision": "abc", "whole": 2},
    }
