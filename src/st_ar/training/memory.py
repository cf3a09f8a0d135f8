"""What is said when memory is not enough: which setting to lower."""

import contextlib
import re
from collections.abc import Generator

import torch

from st_ar.config import TrainConfig
from st_ar.errors import UserError
from st_ar.run_config import RunConfig


@contextlib.contextmanager
def enough_memory(config: RunConfig, world: int) -> Generator[None]:
    """Name the settings that take memory, on `world` ranks, if it runs out within.

    Raises:
        UserError: memory of the host or of a GPU that cannot be had.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not re.search(r"can't allocate memory|not enough memory|out of memory", said):
            raise
        asked = re.search(r"ried to allocate ([\d.]+ \w+)", said) or re.search(r"allocate ([\d.]+ \w+)", said)
        size = f" ({asked[1]} more could not be had)" if asked else ""
        raise UserError(f"out of memory{size}: {_remedy(config, world)}") from error


def _remedy(config: RunConfig, world: int) -> str:
    smaller = f"give a smaller --batch-size than {config.batch_size} or a smaller --model"
    if not isinstance(config, TrainConfig):
        return smaller
    ways: list[str] = []
    if config.activation_checkpointing != "full":
        ways.append("--activation-checkpointing full, which may also be given with --resume")
    here = config.batch_size // world
    more = next((n for n in range(config.accumulate + 1, here + 1) if here % n == 0), None)
    if more:
        ways.append(f"--accumulate {more}, for micro-batches of {here // more} x {config.views} sequences")
    if world > 1 and config.parallel != "fsdp":
        ways.append("--parallel fsdp, which splits the weights among the ranks")
    return "; or ".join([*(f"give {way}" for way in ways), smaller])
