"""benchmarks/on_gpu.py at its small size: what needs no GPU to be wrong."""

import importlib
import json
import os
import re
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from st_ar.evaluation.generation.image_sets import open_files, read_array
from st_ar.tokenizer import load_tokenizer, to_uint8
from st_ar.tokenizer.kmeans import KMeansTokenizer
from st_ar.training.checkpoint import Checkpoints
from tests.data.random_store import random_store
from tests.ranks import ROOT

CPU = torch.device("cpu")


def benchmark(name: str, *arguments: str | Path, **environment: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def imported(name: str) -> ModuleType:
        return importlib.import_module(name)

    return imported


def checks(gpu_checks: Any, cases: Any, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """What a group of checks prints, by name."""
    gpu_checks.run_cases(cases)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the slice cifar10 has left, with tokens of a vocabulary that is not the preset's."""
    folder = tmp_path_factory.mktemp("on-gpu")
    store, _, _ = random_store(folder / "tokens", grid=8, vocab_size=32, num_classes=10)
    stores = ["--tokens", store, "--test-tokens", store]
    printed = benchmark("on_gpu.py", "cifar10", "--small", *stores, "--out", folder / "out")
    assert "cifar10: " in printed.splitlines()[-1]
    return folder / "out"


@pytest.mark.slow
def test_each_method_is_trained_and_measured(out: Path) -> None:
    found = json.loads((out / "small-cifar10.json").read_text())["results"]
    assert (found.pop("steps"), found.pop("seed")) == (20, 0)
    assert found.pop("seconds") > 0
    assert list(found) == ["control", "st-ar", "view"]
    for method in found.values():
        assert method["seconds_per_step"] > 0
        for weights in (method["live"], method["EMA"]):
            assert weights["validation loss"] == pytest.approx(np.log(32), rel=0.1)  # nothing to learn in noise
            assert len(weights["probe"]) == 8
    losses = {name: method["live"]["validation loss"] for name, method in found.items()}
    assert len(set(losses.values())) == 3


@pytest.mark.slow
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
    assert np.array_equal(
        open_files(str(tmp_path / "cifar10-samples-seed0-st-ar-live.npz")).labels, np.arange(100) % 10
    )
    assert len(list(tmp_path.glob("*.npz"))) == 6


def test_a_stores_crops_become_images_to_evaluate(tmp_path: Path) -> None:
    store, codes, labels = random_store(tmp_path / "tokens", grid=2, vocab_size=32, num_classes=10)
    tokenizer = KMeansTokenizer(torch.rand(32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1, 4)
    tokenizer.save(tmp_path / "tokenizer")
    options = ["--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "out", "--num", "40"]
    benchmark("decoded.py", store, *options)
    images, asked = (read_array(tmp_path / "out" / "tokens.npz", name) for name in ("arr_0", "arr_1"))
    crops = torch.from_numpy(codes.reshape(-1, 2, 2).astype(np.int64))
    decoded = to_uint8(tokenizer.decode(crops)).numpy().reshape(*codes.shape[:2], -1)
    found = [(decoded == image.reshape(-1)).all(-1) for image in images]
    assert len(found) == 40
    assert all(labels[np.nonzero(each)[0]].tolist() == [label] for each, label in zip(found, asked, strict=True))
    assert len({np.argmax(each) for each in found}) > 10


def test_a_slice_that_fails_keeps_its_figures_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    on_gpu = module("on_gpu")

    def broken(*given: Any, **_: Any) -> None:
        given[3]({"half": 1})
        written = json.loads((tmp_path / "small-training-l.json").read_text())["results"]
        assert written == {"revision": "abc", "half": 1, "unfinished": True}
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(on_gpu.SLICES, "training", broken)
    given = ["training", "--small", "--revision", "abc", "--presets", "l", "--only", "training", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", *given])
    with pytest.raises(SystemExit) as ended:
        on_gpu.main()
    assert ended.value.code == 1
    found = json.loads((tmp_path / "small-training-l.json").read_text())["results"]
    assert found == {"revision": "abc", "half": 1, "failed": "no such kernel", "seconds": 0}


@pytest.mark.slow
def test_a_slice_over_its_limit_is_killed_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    on_gpu = module("on_gpu")
    monkeypatch.setattr(on_gpu, "GRACE", 0)
    given = ["quickstart", "attention", "--small", "--limit-s", "0.5", "attention=60", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", *given])
    with pytest.raises(SystemExit, match=r"^failed: quickstart$"):
        on_gpu.main()
    assert "killed; what it had is saved" in capfd.readouterr().out
    (ways,) = (
        v for k, v in json.loads((tmp_path / "small-attention.json").read_text())["results"].items() if " heads" in k
    )
    assert list(ways) == ["mask T x T", "widened head", "unmasked, causal"]
    for way in ways.values():
        assert way["passed"]
        assert way["apart"].keys() == {"result", "dq", "dk", "dv"}
        assert 0 < max(way["apart"].values()) < 0.01  # bfloat16
        assert way["ms"] > 0
        assert way["TFLOP/s"] == pytest.approx(7 * 2 * 2 * 32**2 * 16 / way["ms"] / 1e9)


def test_cases_begin_only_if_the_longest_would_fit_again(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    common, now = module("common"), [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    budget, begun = common.Budget(100), []
    for seconds in budget.cases([10, 40, 30, 30, 5]):
        begun.append(seconds)
        now[0] += seconds
    assert (begun, budget.left_out, budget.left()) == ([10, 40, 30], ["30", "5"], 20)


def test_the_calls_in_the_help_fit_their_minutes(module: Any) -> None:
    on_gpu = module("on_gpu")
    calls = re.findall(r"benchmarks/on_gpu.py ([a-z0-9 ]+ --(?:[^-]|-[^-]|--(?!out))+?)--out out\n", on_gpu.__doc__)
    assert len(calls) == 4
    for call in calls:
        options = {
            name: words for name, *words in (part.split() for part in f"slices {call}".replace("\\", "").split("--"))
        }
        limits = on_gpu.read_limits(options["limit-s"])
        assert limits.keys() == on_gpu.LIMITS.keys() == on_gpu.SLICES.keys()
        assert 250 <= sum(limits[name] for name in options["slices"]) <= 350
    assert on_gpu.read_limits(["9", "check=5"]) == dict.fromkeys(on_gpu.LIMITS, 9) | {"check": 5}


def test_memory_on_a_gpu_is_a_methods_own(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held, most, steps = [7 * 2**30], [0], count()  # other methods hold 7 GiB

    def step() -> None:
        held[0] += 2 * 2**30 if next(steps) == 0 else 0  # the optimizer's state
        most[0] = max(most[0], held[0] + 3 * 2**30)

    fakes: dict[str, Any] = {
        "memory_allocated": lambda: held[0],
        "max_memory_allocated": lambda: most[0],
        "reset_peak_memory_stats": lambda: most.__setitem__(0, held[0]),
        "synchronize": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    peak, seconds = module("training").gpu_memory(step, 2**30)
    assert peak == 1 + 2 + 3
    assert seconds >= 0


def test_a_check_that_fails_does_not_stop_the_others(capsys: pytest.CaptureFixture[str], module: Any) -> None:
    def broken() -> Any:
        raise RuntimeError("no such kernel")

    cases = [
        ("a", lambda: {"at": (0.5, 0.5), "over": (0.6, 0.5), "nan": (float("nan"), 9.0)}),
        ("b", broken),
        ("c", lambda: {"exact": (0.0, 0.0)}),
    ]
    found = checks(module("gpu_checks"), cases, capsys)
    passed = {"a: at": True, "a: over": False, "a: nan": False, "b": False, "c: exact": True}
    assert {name: line["passed"] for name, line in found.items()} == passed
    assert found["b"]["failed"] == "no such kernel"


def test_failed_checks_are_named_and_groups_that_die_or_take_too_long_are_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    on_gpu, kept = module("on_gpu"), dict[str, Any]()
    script = tmp_path / "script.py"
    script.write_text(
        "import json, signal, sys\n"
        "for name, passed in (('fine', True), ('wrong', False)):\n"
        "    print(json.dumps({'name': f'{sys.argv[1]}: {name}', 'passed': passed}), flush=True)\n"
        "if sys.argv[1] == 'slow': signal.pause()\n"
        "sys.exit(3 if sys.argv[1] == 'dead' else 0)\n"
    )
    monkeypatch.setattr(on_gpu.gpu_checks, "__file__", str(script))
    monkeypatch.setattr(on_gpu.gpu_checks, "GROUPS", {"dead": 0, "slow": 0})
    with pytest.raises(ValueError, match=r"^4 of 6 checks failed: ") as error:
        on_gpu.check(CPU, True, module("common").Budget(1), kept.update)
    for name in ("dead: wrong", "slow: wrong", "dead: exit status", "slow: exit status"):
        assert name in str(error.value)
    assert (kept["passed"], kept["of"]) == (2, 6)
    assert {line["value"] for line in kept["checks"] if "exit" in line["name"]} == {3, -9}


@pytest.mark.parametrize(("group", "numbers"), [("gradients-64", 32), ("gradients-text", 32), ("decoding", 12)])
def test_small_checks_pass_on_a_cpu(group: str, numbers: int, module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_checks = module("gpu_checks")
    found = checks(gpu_checks, gpu_checks.GROUPS[group](gpu_checks.Place(CPU, True)), capsys)
    assert [name for name, line in found.items() if not line["passed"]] == []
    assert len(found) == numbers
    exact = [line["value"] for name, line in found.items() if "float32" in name and "bfloat16" not in name]
    assert exact == [0.0] * len(exact)
    if group.startswith("gradients"):
        fast = [line["value"] for name, line in found.items() if "bfloat16: gradient" in name]
        assert len(fast) == 4
        assert min(fast) > 0.001


def test_wrong_gradients_fail(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_checks = module("gpu_checks")
    config = gpu_checks.settings("ST-AR", 4, "class", True)
    right, compute = gpu_checks.expected(config), gpu_checks.losses_and_gradients
    name = "model.layers.0.attention.wqkv.weight"

    def change(gradient: torch.Tensor) -> dict[str, float]:
        monkeypatch.setattr(gpu_checks, "losses_and_gradients", lambda *_: (right[0], right[1] | {name: gradient}))
        found = gpu_checks.compare_gradients(config, gpu_checks.Place(CPU, True), torch.float32, False)
        monkeypatch.setattr(gpu_checks, "losses_and_gradients", compute)
        return {what: value for what, (value, tolerance) in found.items() if not value <= tolerance}

    assert change(right[1][name]) == {}
    assert change(1.05 * right[1][name])["worst parameter"] == pytest.approx(0.05)
    holed = right[1][name].clone()
    holed[3, 3] = float("nan")
    assert {"not finite", "gradient"} <= change(holed).keys()


def test_codes_and_revival_are_checked(
    module: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_checks = module("gpu_checks")
    place = gpu_checks.Place(CPU, True)
    found = checks(gpu_checks, gpu_checks.tokenizer(place), capsys)
    assert [name for name, line in found.items() if not line["passed"]] == []
    assert found["VQ: codes that differ, float32"]["value"] == 0
    assert found["VQ: reconstruction, bfloat16"]["value"] > 0.001
    numbers = count()
    monkeypatch.setattr("st_ar.training.vqgan.VQLearner._revive", lambda *_: next(numbers))
    assert gpu_checks.compare_revival(place)["no code was revived"] == (1.0, 0.0)
    assert next(numbers) == 7


@pytest.mark.slow
def test_checkpoints_are_checked(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_checks = module("gpu_checks")
    place = gpu_checks.Place(CPU, True)
    assert {value for value, _ in gpu_checks.compare_checkpoints(place).values()} == {0.0}
    monkeypatch.setattr(Checkpoints, "restore", lambda *_: None)
    found = gpu_checks.compare_checkpoints(place)
    assert found["values of the resumed state that are not the saved one's"][0] > 1000
    assert found["weights of the resumed run"][0] > 0.01


BARE = """
import socket, sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions, requires
from re import match

allowed, waiting = set(), ["torch", "numpy", "safetensors", "pillow", "scikit-learn", "scikit-image", "matplotlib", "jinja2"]
while waiting:
    name = match("[A-Za-z0-9_.-]+", waiting.pop())[0].lower().replace("_", "-")
    if name not in allowed:
        allowed.add(name)
        try:
            waiting += [need for need in requires(name) or [] if "extra ==" not in need]
        except ImportError:
            pass

allowed.add("st-ar")

class Bare(PathFinder):
    owners = packages_distributions()
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        owners = [owner.lower().replace("_", "-") for owner in cls.owners.get(name.partition(".")[0], [])]
        if owners and not allowed.intersection(owners):
            return None
        return PathFinder.find_spec(name, path, target)

def refuse(*_):
    raise OSError("there is no network")

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
socket.getaddrinfo = refuse
"""


@pytest.mark.slow  # each slice is a process, and some compile: minutes in all
def test_every_slice_runs_small_with_the_listed_packages_and_no_network(tmp_path: Path, module: Any) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BARE)
    path = os.pathsep.join([str(tmp_path / "bare"), str(ROOT / "src")])
    environment = os.environ | {"PYTHONPATH": path}
    tried = [sys.executable, "-c", "import torch, sklearn, tyro"]
    probe = subprocess.run(tried, env=environment, capture_output=True, text=True)
    assert "No module named 'tyro'" in probe.stderr
    slices = [name for name in module("on_gpu").SLICES if name != "cifar10"]
    printed = benchmark("on_gpu.py", *slices, "--small", "--out", tmp_path, PYTHONPATH=path)
    for name in slices:
        assert f"\n{name}: " in printed
        found = json.loads((tmp_path / f"small-{name}.json").read_text())["results"]
        assert not found.keys() & {"failed", "unfinished", "no time for"}
        assert len(found) > 1
    ratio = json.loads((tmp_path / "small-compile.json").read_text())["results"]["ST-AR: eager takes times as long"]
    assert ratio > 0
