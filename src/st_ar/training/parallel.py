"""Training on several ranks under torchrun: who is there, and what they share."""

import contextlib
import os
import warnings
from collections.abc import Callable, Generator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from st_ar.data.ranks import Ranks
from st_ar.errors import UserError
from st_ar.hardware import choose_device

Made = TypeVar("Made")


@contextlib.contextmanager
def process_group(device: str) -> Generator[tuple[Ranks, torch.device]]:
    """Join the ranks that torchrun started, if it did; gives this one's place among them and its device.

    Raises:
        UserError: no such device, more ranks than GPUs, or torchrun's variables make no sense.
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
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        with warnings.catch_warnings():  # of a layout that costs a copy for 1 x 1 convolutions, which are small
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            yield ranks, chosen
    finally:
        dist.destroy_process_group()


def in_turn(action: Callable[[], Made]) -> Made:
    """What `action` makes, on rank 0 before all others: what one has downloaded is there for the rest."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
        return action()
    made = action()
    if dist.is_initialized():
        dist.barrier()
    return made


def shared(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over the ranks; itself if there is one rank."""
    if not dist.is_initialized():
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DistributedDataParallel(module, broadcast_buffers=False)


def mean(tensor: Tensor) -> Tensor:
    """The mean over the ranks."""
    return total(tensor) / dist.get_world_size() if dist.is_initialized() else tensor


def total(tensor: Tensor) -> Tensor:
    """The sum over the ranks."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def everyone(tensor: Tensor) -> Tensor:
    """The ranks' tensors, of one shape, joined along the first dimension in the order of the ranks."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def joined(tensor: Tensor) -> Tensor:
    """The ranks' tensors, alike but for the length of their first dimension, joined along it in the order of the ranks."""
    if not dist.is_initialized():
        return tensor
    lengths = everyone(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = everyone(padded).split(max(lengths)) if max(lengths) else [tensor] * len(lengths)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
