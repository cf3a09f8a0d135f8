"""Device, dtype, compiler, memory, and the description of the machine."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from st_ar import hardware
from st_ar.data.store import TokenStore
from st_ar.errors import UserError, note
from st_ar.evaluation.generation.features import Compute, Extracted, Extractor, collect
from st_ar.evaluation.generation.image_sets import open_files
from st_ar.evaluation.likelihood import validation_loss
from st_ar.hardware import choose_compile, choose_device, choose_dtype, describe, peak_flops, revision, side_stream
from tests.data.random_store import random_store
from tests.toys import random_model

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="freed memory is kept only with glibc")


def cpu_with(monkeypatch: pytest.MonkeyPatch, machine: str, **has: bool) -> torch.dtype:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: has.get("avx512", False))
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: has.get("amx", False))
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: has.get("onednn", False))
    return choose_dtype("auto", CPU)


def test_auto_is_bfloat16_if_the_cpu_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_with(monkeypatch, "x86_64", avx512=True) == torch.bfloat16
    assert cpu_with(monkeypatch, "x86_64", amx=True) == torch.bfloat16
    assert cpu_with(monkeypatch, "x86_64", onednn=True) == torch.float32  # emulated
    assert cpu_with(monkeypatch, "aarch64", onednn=True) == torch.bfloat16
    assert cpu_with(monkeypatch, "aarch64") == torch.float32


def test_an_explicit_dtype_is_used() -> None:
    assert choose_dtype("float32", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_gpus_peak_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(CPU, torch.bfloat16) is None


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU here"):
        choose_device("cuda")
    assert choose_device("auto") == CPU


@pytest.mark.parametrize(
    ("load", "chosen", "noted"), [(0.5, None, False), (2.9, None, False), (7.25, None, True), (7.25, "2", False)]
)
def test_a_busy_machine_is_noted(
    load: float,
    chosen: str | None,
    noted: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    note.cache_clear()
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS") if chosen is None else monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    choose_device("cpu")
    assert ("busy (load 7.2, 2 threads here)" in capsys.readouterr().err) == noted


def test_compiling_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_compile(True, CPU)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not choose_compile(False, CPU)
    with pytest.raises(UserError, match=r"--compile needs a compiler, g\+\+ or clang\+\+: install one"):
        choose_compile(True, CPU)
    with pytest.raises(UserError, match="needs a compiler, gcc or clang or cc"):
        choose_compile(True, CUDA)
    (tmp_path / "mine").touch(mode=0o755)
    monkeypatch.setenv("CXX", "mine")
    assert choose_compile(True, CPU)


def test_auto_compiles_on_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not choose_compile("auto", CPU)
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose_compile("auto", CUDA)
    (tmp_path / "gcc").unlink()
    assert not choose_compile("auto", CUDA)
    assert "gcc or clang or cc: install one; the model is not compiled, and slower" in capsys.readouterr().err


def test_the_revision_is_found_in_a_clone_or_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = Path(hardware.__file__).parents[2]
    command = ["git", "-C", clone, "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if (clone / ".git").exists() and head:
        assert (revision() or "").removesuffix("-dirty") == head == describe()["revision"].removesuffix("-dirty")
    monkeypatch.setattr(hardware, "__file__", str(tmp_path / "lib" / "st_ar" / "hardware.py"))
    origin = '{"url": "https://host.example/st-ar", "vcs_info": {"vcs": "git", "commit_id": "0123abcd"}}'
    monkeypatch.setattr(hardware.importlib.metadata.PathDistribution, "read_text", lambda *_: origin)
    assert revision.__wrapped__() == "0123abcd"
    monkeypatch.setattr(hardware.importlib.metadata.PathDistribution, "read_text", lambda *_: None)
    assert revision.__wrapped__() is None


def test_the_description_names_the_cpus_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    for has, instructions in ((True, "AVX512 + bfloat16"), (False, "AVX512")):
        cpu_with(monkeypatch, "x86_64", avx512=has)
        assert describe()["instructions"] == instructions


def test_a_side_stream_works_at_once_on_a_cpu() -> None:
    done: list[int] = []
    with side_stream(CPU) as run:
        run(lambda: done.append(1))
        assert done == [1]
        with pytest.raises(ZeroDivisionError):
            run(lambda: done.append(1 // 0))
        run(lambda: done.append(2))
    assert done == [1, 2]


MEMORY = """
import resource, torch
from st_ar.hardware import freed_memory_kept

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

def use(megabytes, times):
    tensors = [torch.ones(megabytes << 18) for _ in range(times)]
    del tensors
    return resident()

base = use(40, 10)
with freed_memory_kept():
    with freed_memory_kept():
        pass
    within = use(40, 10)
after = resident()
print(base, within, after, use(600, 1))  # larger than any remaining hole
"""


@needs_glibc
def test_freed_memory_is_kept_inside_the_block() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    base, within, after, later = map(int, done.stdout.split())
    assert within > base + 300
    assert after < base + 100
    assert later < base + 100


@needs_glibc
def test_validation_and_feature_extraction_keep_freed_memory(tmp_path: Path) -> None:
    folder, _, _ = random_store(tmp_path / "tokens", images=4, crops=1, grid=3, vocab_size=11, num_classes=3)
    store, model, seen = TokenStore(folder), random_model(), list[int]()
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))

    def run(images: torch.Tensor) -> Extracted:
        seen.append(len(hardware._active))
        return Extracted(images.flatten(1).float()[:, :2])

    model.layers[0].register_forward_hook(lambda *_: seen.append(len(hardware._active)))
    for work in (
        lambda: validation_loss(model, store),
        lambda: collect(
            open_files(str(tmp_path / "images.npz")), Extractor(name="x", weights="", dim=2, run=run), ["fd"], Compute()
        ),
    ):
        seen.clear()
        work()
        assert seen
        assert set(seen) == {1}
        assert not hardware._active
