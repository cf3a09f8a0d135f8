"""Inductor's kernels of compiled blocks, made for an H200 on fake CUDA; prints their launches and resources, as JSON:
python -m tests.gpu.kernels. It needs the triton wheel that fits torch.
"""

from tests.gpu import fake_cuda, graphs  # isort: skip -- before torch

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo.device_interface
import torch._inductor.config
import torch._inductor.graph
import torch._inductor.runtime.triton_helpers
import torch._inductor.scheduler
import torch._inductor.utils
import torch.utils._triton
import triton
from torch._inductor.codecache import PyCodeCache
from triton.backends.compiler import GPUTarget

from st_ar.presets import get_preset

CACHE = tempfile.TemporaryDirectory()
os.environ |= {"TORCHINDUCTOR_CACHE_DIR": CACHE.name, "TRITON_CACHE_DIR": CACHE.name}
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    total_memory=143771 << 20,
    L2_cache_size=60 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
    is_integrated=0,
    clock_rate=1980000,
    memory_clock_rate=3201000,
    memory_bus_width=6144,
    uuid="0",
)
LIMITS = {
    "max_shared_mem": H200.shared_memory_per_block_optin,
    "max_num_regs": H200.regs_per_multiprocessor,
    "multiprocessor_count": H200.multi_processor_count,
    "warpSize": H200.warp_size,
    "sm_clock_rate": H200.clock_rate,
    "mem_clock_rate": H200.memory_clock_rate,
    "mem_bus_width": H200.memory_bus_width,
}


class Driver:
    """Triton's view of the device."""

    utils = SimpleNamespace(get_device_properties=lambda device: LIMITS)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return fake_cuda.DEVICE

    def get_device_interface(self) -> Any:
        return torch.cuda


def pretend() -> None:
    """Show Inductor an H200."""
    cuda, interface = torch.cuda, torch._dynamo.device_interface.CudaInterface
    cuda.get_device_properties = lambda *args: H200
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.synchronize = lambda *args: None
    cuda.device_count = lambda: 1
    fake_cuda._Stream.cuda_stream = 0
    torch.version.cuda = "13.0"
    for name in ("_cuda_getCurrentRawStream", "_cuda_getDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
        setattr(torch._C, name, lambda *args: 0)
    torch._C._cuda_setDevice = lambda *args: None
    torch._dynamo.device_interface.get_cuda_stream = lambda *args: 0
    for name in ("get_device_properties", "current_device", "device_count", "synchronize", "current_stream"):
        setattr(interface, name, staticmethod(getattr(cuda, name)))
    interface.is_available = staticmethod(lambda: True)
    interface.is_bf16_supported = staticmethod(torch.cuda.is_bf16_supported)
    interface.get_raw_stream = staticmethod(lambda *args: 0)
    for module in (torch.utils._triton, torch._inductor.utils, torch._inductor.scheduler):
        module.has_triton = lambda *args: True
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.use_static_triton_launcher = False
    torch._inductor.config.shape_padding = False  # it would time matrix products
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.joint_graph_constant_folding = False
    triton.runtime.driver.set_active(Driver())


CODE: list[tuple[str, str]] = []
"""Whose graph (forward, backward or inference), and its Python code."""


class Module:
    """What stands for compiled code: its graph, run by fake tensors."""

    __file__ = str(Path(CACHE.name) / "none.py")

    def __init__(self, graph: Any) -> None:
        self.graph = graph.orig_gm

    def call(self, args: Any) -> Any:
        return torch.fx.Interpreter(self.graph).run(*args)


def keep(self: Any, code: Any) -> Module:
    CODE.append(("backward" if self.is_backward else "inference" if self.is_inference else "forward", code.value))
    self.cache_key, self.cache_path, self.cache_linemap = "none", Module.__file__, []
    return Module(self)


torch._inductor.graph.GraphLowering._compile_to_module_lines = keep
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def resources(source: str, name: str) -> list[dict[str, int]]:
    """Compile a kernel for sm_90; registers and bytes of stack, where spilled ones go, of each of its variants."""
    kernel = getattr(PyCodeCache.load(source), name)
    kernel.precompile(warm_cache_only=True)
    found = []
    for result in kernel.compile_results:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(result.kernel.asm["cubin"])
            file.flush()
            text = subprocess.run(
                [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
            )
        registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text.stdout)[0]
        found.append({"registers": int(registers), "stack": int(stack)})
    return found


def describe(code: str) -> dict[str, Any]:
    """Launches of a graph's code and the resources of its kernels."""
    body = code.split("def call(")[-1]
    kernels = re.findall(r"async_compile\.triton\('([^']+)', '''(.*?)'''", code, re.DOTALL)
    return {
        "fused": len(re.findall(r"\btriton_\w+\.run\(", body)),
        "others": Counter(re.findall(r"\b(?:extern_kernels|torch\.ops\.aten)\.(\w+)(?:\.\w+)?\(", body)),
        "kernels": {name: resources(source, name) for name, source in kernels},
        "allocated": re.findall(r"empty_strided_cuda\(\(([^)]*)\)", body),
    }


def main() -> None:
    fake_cuda.choose_device()
    pretend()
    Path(Module.__file__).touch()
    plain, guided = get_preset("llamagen-b"), get_preset("st-ar-b")
    runs = {
        "plain": lambda: graphs.train(plain, backend="inductor"),
        "guided": lambda: graphs.train(guided, backend="inductor"),
        "decode": lambda: graphs.decode(backend="inductor"),
    }
    found: dict[str, Any] = {}
    with fake_cuda.MODE:
        for name, run in runs.items():
            CODE.clear()
            run()
            assert len(dict(CODE)) == len(CODE), "two graphs of one kind"
            found |= {f"{name}, {kind}": describe(code) for kind, code in CODE}
    print(json.dumps(found))


if __name__ == "__main__":
    fake_cuda.run(main)
