"""A fake CUDA device for torch's CPU build: tensors that have a device, a type and a shape but no values, and a record of what they do.

Import it before torch, with the path of the compiled no_device.cpp in ST_AR_NO_DEVICE. Under `FakeTensorMode` the project's own
code then runs on "cuda", and `Recorder` notes what would make the host wait for a GPU.
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

_spec = importlib.util.find_spec("torch")
assert _spec is not None
assert _spec.origin is not None
assert "torch" not in sys.modules, "torch looks for devices when it is imported"
for _library in (Path(_spec.origin).parent / "lib/libtorch_cpu.so", os.environ["ST_AR_NO_DEVICE"]):
    ctypes.CDLL(str(_library), mode=ctypes.RTLD_GLOBAL)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.cuda.amp.common  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._guards import active_fake_mode  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

from st_ar import hardware  # noqa: E402

DEVICE = torch.device("cuda", 0)
MODE = FakeTensorMode()
"""The mode of every fake tensor. Entered once per script."""


class _Stream:
    """A stream or an event."""

    device = DEVICE

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...


_stream = _Stream()


class _Graph:
    """A CUDA graph, which is recorded and not replayed."""

    def pool(self) -> None: ...

    def replay(self) -> None: ...


def _nothing(*args: Any, **options: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


for _name, _value in {
    "is_initialized": lambda: False,
    "is_bf16_supported": lambda *args, **options: True,
    "_lazy_init": lambda: None,
    "device_count": lambda: 8,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda *args: "NVIDIA H200",
    "get_device_properties": lambda *args: SimpleNamespace(total_memory=141 << 30),
    "get_rng_state": lambda *args: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda *args: None,
    "max_memory_allocated": lambda *args: 0,
    "Stream": _Stream,
    "Event": _Stream,
    "CUDAGraph": _Graph,
    "current_stream": lambda *args: _stream,
    "stream": _nothing,
    "device": _nothing,
    "graph": _nothing,
}.items():
    setattr(torch.cuda, _name, _value)
torch.cuda.default_generators = (torch.Generator(),)
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
FakeTensorMode.__deepcopy__ = lambda self, memo: self
FakeTensorMode.avoid_device_init = True

_from_numpy, _linspace = torch.from_numpy, torch.linspace


def _fake_from_numpy(array: np.ndarray) -> Tensor:
    tensor = _from_numpy(array)
    return MODE.from_tensor(tensor) if active_fake_mode() else tensor


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function that reads or writes files compute with real tensors. Those that it returns become fake."""

    def wrapped(*args: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            result = function(*args, **options)
        return tree_map(lambda each: MODE.from_tensor(each) if isinstance(each, Tensor) else each, result)

    return wrapped


def _pin_memory(self: Tensor, *args: Any, **options: Any) -> Tensor:
    copy = self.clone()
    copy.is_pinned_copy = True
    return copy


def _real_linspace(*args: Any, **options: Any) -> Tensor:
    """The rates of drop path are read on the host."""
    with unset_fake_temporarily():
        return _linspace(*args, **options)


def _apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Move a module. torch changes parameters in place, which the memory of a fake tensor does not allow."""
    for child in self.children():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is not None and (moved := function(parameter.detach())) is not parameter:
            self._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        self._buffers[name] = None if buffer is None else function(buffer)
    return self


nn.Module._apply = _apply
torch.from_numpy, torch.linspace = _fake_from_numpy, _real_linspace
Tensor.pin_memory = _pin_memory
Tensor.record_stream = lambda self, stream: None


def choose_device() -> None:
    """Choose the device as commands do, which settles torch's attention kernels."""
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        hardware.choose_device("cuda")


VALUES = ("_local_scalar_dense", "item", "equal", "is_nonzero")
"""Operators that give the host a value."""
SHAPES = ("nonzero", "masked_select", "bincount", "unique_dim", "unique_consecutive", "_unique", "_unique2")
"""Operators whose results have shapes that the host must know."""
ATTENTION = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_safe_softmax": "math",
}
ATTENTION |= {f"{name}_backward": f"{kind} backward" for name, kind in ATTENTION.items()}


def place() -> str:
    """The innermost line of the project, or of the tests, that called."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if ("/st_ar/" in file or "/tests/gpu/" in file) and file != __file__:
            return f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"


class Recorder(TorchDispatchMode):
    """Notes what the operators within the block do, by kind: "operator at place"."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forget what was noted."""
        kinds = ("wait", "copy", "mixed", "float64", "moved")  # copies that wait, and others
        self.noted: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
        self.attention: Counter[str] = Counter()
        self.calls, self.square = 0, False

    def report(self) -> dict[str, Any]:
        """Return what was noted."""
        return {**self.noted, "attention": self.attention, "calls": self.calls, "square": self.square}

    def note(self, kind: str, name: str) -> None:
        self.noted[kind][f"{name} at {place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        on_device = [each for each in inputs if each.is_cuda]
        if on_device:
            if _waits(name, func, args, kwargs):
                self.note("wait", name)
            if len(on_device) < sum(each.dim() > 0 for each in inputs) and name not in ("copy_", "_to_copy"):
                self.note("mixed", name)
            if wide := [list(each.shape) for each in on_device if each.dtype == torch.float64 and each.dim() > 0]:
                self.note("float64", f"{name} {wide}")
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):  # it has no value: true, 1 or 0.5
            return {torch.bool: True}.get(args[0].dtype, 0.5 if args[0].is_floating_point() else 1)
        out = func(*args, **kwargs)
        if name in ("copy_", "_to_copy") and isinstance(out, Tensor):
            source = args[1] if name == "copy_" else args[0]
            free = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if source.is_cuda != out.is_cuda:
                async_copy = free and (source.is_cuda or hasattr(source, "is_pinned_copy"))
                kind = "moved" if async_copy else "copy"
                self.note(kind, f"{source.device.type} to {out.device.type} {list(out.shape)}")
        if name in ATTENTION:
            self.attention[ATTENTION[name]] += 1
        self.calls += bool(on_device)
        self.square |= name == "triu"  # a T x T mask
        return out


def _waits(name: str, func: Any, args: Any, kwargs: Any) -> bool:
    if name in ("index", "index_put", "index_put_"):
        filled = name != "index" and args[2].dim() == 0 and not args[2].is_cuda  # torch fills by the mask
        return not filled and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "repeat_interleave":
        return "Tensor" in str(func) and kwargs.get("output_size") is None
    return name in VALUES or name in SHAPES


@contextlib.contextmanager
def ranks(world: int) -> Generator[None]:
    """Be rank 0 of so many, whose collectives return at once."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def run(main: Callable[[], None]) -> None:
    """Run a script and end at once: the threads of torch's compiler can abort an ordinary exit."""
    main()
    sys.stdout.flush()
    os._exit(0)
