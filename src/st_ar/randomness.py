"""Every random draw of a run is a pure function of (seed, purpose, step): nothing to save, nothing to rewind.

A resumed run, another number of ranks or another micro-batch size therefore sees the same data, crops, masks,
positions and dropped labels. (Dropout inside the network is drawn where it is needed: by rank and micro-batch.)
"""

from enum import IntEnum

import numpy as np
import torch


class RandomStream(IntEnum):
    """What a draw is for; the numbers are part of the data order and never change."""

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


def numpy_generator(seed: int, purpose: RandomStream, step: int = 0) -> np.random.Generator:
    """A NumPy generator for one purpose at one step."""
    return np.random.default_rng([seed, purpose, step])


def torch_seed(seed: int, purpose: RandomStream, step: int = 0, rank: int = 0) -> int:
    """A seed for torch.manual_seed, for one purpose at one step; another on each rank for what is drawn on each."""
    entropy = [seed, purpose, step, rank] if rank else [seed, purpose, step]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def torch_generator(seed: int, purpose: RandomStream, step: int = 0) -> torch.Generator:
    """A CPU generator for one purpose at one step; the same draws whatever device they are used on."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, step))
