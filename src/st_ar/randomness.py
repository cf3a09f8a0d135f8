"""Random numbers as a pure function of (seed, stream, step), so that a checkpoint needs no generator state.

Data order, crops, masks, positions and dropped labels depend neither on resuming nor on the number of ranks or the
micro-batch size. Dropout inside the network depends on the rank and the micro-batch.
"""

from enum import IntEnum

import numpy as np
import torch


class RandomStream(IntEnum):
    """The use of random numbers. The values are a format: changing one changes the data order."""

    INITIALISATION = 0
    ORDER = 1
    CROPS = 2
    LABEL_DROPOUT = 3
    KEY_MASK = 4
    POSITIONS = 5
    DROPOUT = 6
    SAMPLING = 7
    PROBE = 8
    CODEBOOK = 9
    EVALUATION = 10


def numpy_generator(seed: int, stream: RandomStream, step: int = 0) -> np.random.Generator:
    """A NumPy generator for a stream at a step."""
    return np.random.default_rng([seed, stream, step])


def torch_seed(seed: int, stream: RandomStream, step: int = 0, rank: int = 0) -> int:
    """A seed for torch.manual_seed, for a stream at a step; give `rank` for numbers that differ between ranks."""
    entropy = [seed, stream, step, rank] if rank else [seed, stream, step]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def torch_generator(seed: int, stream: RandomStream, step: int = 0) -> torch.Generator:
    """A CPU generator for a stream at a step; the numbers do not depend on the device that uses them."""
    return torch.Generator().manual_seed(torch_seed(seed, stream, step))
