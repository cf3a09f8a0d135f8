"""Several processes: ranks, process group, collectives, signals, and the error shown when a rank dies."""

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
"""Seconds that ranks of a job wait for one another at its end. A rank that dies is noticed at once."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As torchrun says in RANK and WORLD_SIZE; without them there is one.

        Raises:
            UserError: they make no sense.
        """
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
        """Which of `count` things, a multiple of the ranks, are this one's."""
        each = count // self.world
        return slice(self.rank * each, (self.rank + 1) * each)


Made = TypeVar("Made")
PATIENCE, JOIN_TIMEOUT = 5.0, 600.0
"""Seconds that a rank waits for the others at its start: until it says so, and at most."""
GRACE = 0.2
"""Seconds for gloo's threads to finish after the last collective."""
ROLL_CALL = 5.0
"""Seconds for the ranks to say that they are alive when a collective has failed."""


@contextlib.contextmanager
def process_group(device: str, timeout: float = 1800) -> Generator[tuple[Ranks, torch.device]]:
    """Join the ranks that torchrun started, if it did; gives this one's place among them and its device.

    Args:
        timeout: seconds that a rank waits for the others in a collective.

    Raises:
        UserError: no such device, more ranks than GPUs, torchrun's variables make no sense, or another rank was lost.
    """
    ranks, chosen = Ranks.from_environment(), choose_device(device)
    if ranks.world == 1:
        yield ranks, chosen
        return
    if chosen.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local} has no GPU of its own, there are {torch.cuda.device_count()}: start fewer processes"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    if dist.is_initialized():  # by who calls, for several jobs in turn: torchrun's store serves one group
        yield ranks, chosen
        return
    # Imported with a group in being, this module keeps it in default arguments, and gloo's threads abort the process at its end.
    import_module("torch.distributed.nn.functional")
    # Tensors on the CPU go by gloo beside NCCL: hosts agree without waiting for their GPUs.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    _join(ranks, backend, timeout)
    main = threading.current_thread() is threading.main_thread()
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():  # of a layout that costs a copy for 1 x 1 convolutions, which are small
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield ranks, chosen
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        if main:  # torchrun sends SIGTERM for the same loss: it must not end this rank before it has said what happened
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise UserError(_loss(ranks, timeout, str(error).strip().splitlines()[0])) from error
    finally:
        # Gloo's threads need the GIL to drop their last tensors. Whoever destroys the group, or later the last DDP module, joins
        # these threads with the GIL held: without a moment to finish both wait for ever.
        time.sleep(GRACE)
        dist.destroy_process_group()
        if main:
            signal.signal(signal.SIGTERM, on_termination)


def _join(ranks: Ranks, backend: str, timeout: float) -> None:
    """Meet the other ranks.

    Raises:
        UserError: they cannot meet, as with variables that a cluster has left over.
    """
    at = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
    what = f"rank {ranks.rank} of {ranks.world}, as RANK and WORLD_SIZE say,"
    waiting = threading.Timer(
        PATIENCE, note, [f"{what} waits for the others at {at}; unset RANK and WORLD_SIZE to run alone"]
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
            f"{what} cannot meet the others at {at} ({cause(error)}): start them by torchrun, or unset RANK and WORLD_SIZE to run alone"
        ) from error
    finally:
        waiting.cancel()


def _loss(ranks: Ranks, timeout: float, reason: str) -> str:
    """What to say when a collective has failed: who does not answer.

    Torchrun keeps the store outside its ranks, so that those who are left can still call the roll there.
    """
    store = dist.distributed_c10d._get_default_store()
    others = [rank for rank in range(ranks.world) if rank != ranks.rank]
    missing = others
    with contextlib.suppress(RuntimeError):
        store.set(f"st-ar/alive/{ranks.rank}", "")
        until = time.monotonic() + ROLL_CALL
        while missing and time.monotonic() < until:
            missing = [rank for rank in missing if not store.check([f"st-ar/alive/{rank}"])]
            time.sleep(0.1)
    named = ("rank " if len(missing) == 1 else "ranks ") + ", ".join(map(str, missing)) if missing else "the connection"
    reason = re.sub(r"^\[[^]]*\] ", "", reason).split(". ")[0]  # without gloo's place in its source, and its advice
    return (
        f"rank {ranks.rank} of {ranks.world} has lost {named} ({reason}; it waits up to {timeout:g} s): what that one said "
        "last is above; start all of them again, a run with --resume"
    )


def host_group(timeout: float) -> dist.ProcessGroup | None:
    """A group of all ranks for a thread beside the training: its collectives go by gloo and meet no others.

    Args:
        timeout: seconds that a rank waits for the others.

    Returns:
        None if there is one rank.
    """
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    assert isinstance(group, dist.ProcessGroup)  # no rank is left out
    return group


def rank0_first(action: Callable[[], Made]) -> Made:
    """What `action` makes, on rank 0 before all others: what one has downloaded is there for the rest."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
        return action()
    made = action()
    if dist.is_initialized():
        dist.barrier()
    return made


def broadcast_from_rank0(action: Callable[[], Made]) -> Made:
    """What `action` makes on rank 0 alone, for all.

    Raises:
        UserError: on every rank, if it does so there.
    """
    if not dist.is_initialized():
        return action()
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            made = [action()]
        except UserError as error:
            made = [error]
    dist.broadcast_object_list(made, device=torch.device("cpu"))
    if isinstance(made[0], UserError):
        raise made[0]
    return made[0]


def data_parallel(module: nn.Module, *, gradient_as_bucket_view: bool = False) -> nn.Module:
    """The module with its gradients averaged over the ranks; itself if there is one rank.

    Args:
        gradient_as_bucket_view: the gradients are what is sent, not copied to it: less memory.
    """
    if not dist.is_initialized():
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=gradient_as_bucket_view)


def get_rank() -> int:
    """Which rank this is; 0 if there is one."""
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
    """The ranks' largest number. Hosts wait for one another, not for their GPUs."""
    if not dist.is_initialized():
        return number
    numbers = torch.tensor([number])
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


def barrier() -> None:
    """Wait for all ranks."""
    all_reduce_max(0)


def all_gather(tensor: Tensor) -> Tensor:
    """The ranks' tensors, of one shape, joined along the first dimension in the order of the ranks; without gradient."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_gather_ragged(tensor: Tensor) -> Tensor:
    """The ranks' tensors, alike but for the length of their first dimension, joined along it in the order of the ranks."""
    if not dist.is_initialized():
        return tensor
    lengths = all_gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = all_gather(padded).split(max(lengths)) if max(lengths) else [tensor] * len(lengths)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


@contextlib.contextmanager
def stop_on_signal() -> Generator[list[int]]:
    """A list that SIGINT and SIGTERM append their number to; a second signal interrupts at once.

    After an error among several ranks SIGTERM stays ignored until `process_group` has reported it.
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
