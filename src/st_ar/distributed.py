"""Ranks, process group, collectives, signals, and the error shown when a rank dies."""

import contextlib
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from st_ar.errors import UserError, cause, note
from st_ar.hardware import choose_device

JOB_TIMEOUT = 24 * 3600.0
"""Seconds that ranks of a job wait for each other at its end. The death of a rank is noticed at once."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The rank of this process, and the number of ranks."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Read torchrun's RANK and WORLD_SIZE; without them there is one rank."""
        try:
            rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        except ValueError as error:
            raise UserError(
                f"RANK and WORLD_SIZE must be numbers ({error}): unset them, or start by torchrun"
            ) from error
        if not 0 <= rank < world:
            raise UserError(f"RANK {rank} must lie in [0, WORLD_SIZE {world}): unset both, or start by torchrun")
        return cls(rank=rank, world=world)

    def share(self, count: int) -> slice:
        """Return this rank's slice of `count` items. `count` is a multiple of the number of ranks."""
        each = count // self.world
        return slice(self.rank * each, (self.rank + 1) * each)


Result = TypeVar("Result")
JOIN_NOTE, JOIN_TIMEOUT = 5.0, 600.0
"""Seconds that a rank waits for the others at the start: until it prints a note, and at most."""
GRACE = 0.2
"""Seconds for gloo's threads to finish after the last collective."""
ROLL_CALL = 5.0
"""Seconds for the ranks to report that they are alive, after a collective failed."""


@contextlib.contextmanager
def process_group(device: str, timeout: float = 1800) -> Generator[tuple[Ranks, torch.device]]:
    """Join torchrun's process group, if there is one. Yield this process's ranks and device.

    Args:
        timeout: seconds that a rank waits for the others in a collective.
    """
    ranks, chosen = Ranks.from_environment(), choose_device(device)
    if ranks.world == 1:
        yield ranks, chosen
        return
    if chosen.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local} needs a GPU, but there are {torch.cuda.device_count()}: start fewer processes"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    if dist.is_initialized():  # by the caller, for several jobs: torchrun's store serves one group
        yield ranks, chosen
        return
    # If imported while a group exists, its default arguments keep the group alive, and gloo's threads abort the process at exit.
    import_module("torch.distributed.nn.functional")
    # CPU tensors use gloo beside NCCL, so that hosts can communicate without waiting for GPUs.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    _join(ranks, backend, timeout)
    main = threading.current_thread() is threading.main_thread()
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():  # about a small copy for 1 x 1 convolutions
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield ranks, chosen
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        if main:  # torchrun also sends SIGTERM after a loss, which must not end this rank before it reports the loss
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise UserError(_describe_loss(ranks, timeout, str(error).strip().splitlines()[0])) from error
    finally:
        # Gloo's threads need the GIL to drop their last tensors. Whoever destroys the group, or later the last DDP module, joins
        # these threads with the GIL held: without a moment to finish both wait for ever.
        time.sleep(GRACE)
        dist.destroy_process_group()
        if main:
            signal.signal(signal.SIGTERM, on_termination)


def _join(ranks: Ranks, backend: str, timeout: float) -> None:
    """Connect to the other ranks.

    Raises:
        UserError: they cannot connect, for example because a cluster has left RANK and WORLD_SIZE in the environment.
    """
    address = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
    who = f"rank {ranks.rank} of {ranks.world}, as RANK and WORLD_SIZE say,"
    waiting = threading.Timer(
        JOIN_NOTE, note, [f"{who} waits for the others at {address}; unset RANK and WORLD_SIZE to run alone"]
    )
    waiting.daemon = True
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun starts all ranks, or says why not
        waiting.start()
    try:
        store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world, timeout=timedelta(seconds=JOIN_TIMEOUT)))
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=timedelta(seconds=timeout)
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{who} cannot connect to the others at {address} ({cause(error)}): start them by torchrun, or unset RANK and WORLD_SIZE"
        ) from error
    finally:
        waiting.cancel()


def _describe_loss(ranks: Ranks, timeout: float, reason: str) -> str:
    """The message after a failed collective. It names the ranks that do not report through torchrun's store, which outlives them."""
    store = dist.distributed_c10d._get_default_store()
    missing = [rank for rank in range(ranks.world) if rank != ranks.rank]
    with contextlib.suppress(RuntimeError):
        store.set(f"st-ar/alive/{ranks.rank}", "")
        until = time.monotonic() + ROLL_CALL
        while missing and time.monotonic() < until:
            missing = [rank for rank in missing if not store.check([f"st-ar/alive/{rank}"])]
            time.sleep(0.1)
    named = ("rank " if len(missing) == 1 else "ranks ") + ", ".join(map(str, missing)) if missing else "the connection"
    reason = re.sub(r"^\[[^]]*\] ", "", reason).split(". ")[0]  # without gloo's source position and advice
    return (
        f"rank {ranks.rank} of {ranks.world} has lost {named} ({reason}; it waits up to {timeout:g} s): see that "
        "rank's last output above, then start all ranks again, a run with --resume"
    )


def host_group(timeout: float) -> dist.ProcessGroup | None:
    """A gloo group for a thread beside the training; None if there is one rank.

    Args:
        timeout: seconds that a rank waits for the others.
    """
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    assert isinstance(group, dist.ProcessGroup)  # it has all ranks
    return group


def rank0_first(action: Callable[[], Result]) -> Result:
    """Call `action` on rank 0, then on the others, so that only rank 0 downloads."""
    if get_rank() > 0:
        barrier()
        return action()
    result = action()
    barrier()
    return result


def broadcast_from_rank0(action: Callable[[], Result]) -> Result:
    """Call `action` on rank 0 and return its result on all ranks. A UserError is raised on all ranks."""
    if not dist.is_initialized():
        return action()
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [action()]
        except UserError as error:
            result = [error]
    dist.broadcast_object_list(result, device=torch.device("cpu"))
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def data_parallel(module: nn.Module, *, gradient_as_bucket_view: bool = False) -> nn.Module:
    """Wrap a module so that gradients are averaged over the ranks; no wrapper for one rank.

    Args:
        gradient_as_bucket_view: keep gradients in the communication buffers, which saves memory.
    """
    if not dist.is_initialized():
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=gradient_as_bucket_view)


def get_rank() -> int:
    """The rank of this process; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean over the ranks."""
    return all_reduce_sum(tensor) / dist.get_world_size() if dist.is_initialized() else tensor


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over the ranks."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(number: int) -> int:
    """The largest number of all ranks. Hosts do not wait for GPUs."""
    if not dist.is_initialized():
        return number
    numbers = torch.tensor([number])
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


def barrier() -> None:
    """Wait for all ranks."""
    all_reduce_max(0)


def all_gather(tensor: Tensor) -> Tensor:
    """Concatenate the ranks' tensors of equal shape along the first dimension, in rank order, without gradient."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_gather_ragged(tensor: Tensor) -> Tensor:
    """Concatenate the ranks' tensors, whose first dimensions may differ, in rank order."""
    if not dist.is_initialized():
        return tensor
    lengths = all_gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = all_gather(padded).split(max(lengths)) if max(lengths) else [tensor] * len(lengths)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


@contextlib.contextmanager
def stop_on_signal() -> Generator[list[int]]:
    """A list of the signals SIGINT and SIGTERM that arrive in the block. A second signal interrupts at once.

    After an error among several ranks, SIGTERM is ignored until `process_group` has reported the error.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        restore()

    def restore() -> None:
        for number, old in previous.items():
            signal.signal(number, old)

    previous: dict[signal.Signals, Any] = {
        number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    except RuntimeError:
        if dist.is_initialized():
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        restore()
