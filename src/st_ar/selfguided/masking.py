"""What the student may not see (Eq. 3) and where its steps are compared (Eq. 5)."""

import torch
from torch import Tensor


def random_key_mask(batch: int, length: int, ratio: float, generator: torch.Generator, *, share: float = 1.0) -> Tensor:
    """Eq. 3's sequence mask as a key mask, True = masked: bool [batch, length].

    Exactly round(ratio * (length - 1)) of each sequence's image-token keys are masked, drawn per sequence. Key 0, the
    class, is always visible, so no query is left without a key. Of the sequences, round(share * batch) are masked.
    """
    masked = round(ratio * (length - 1))
    order = torch.rand(batch, length - 1, generator=generator).argsort(dim=1)
    key_mask = torch.zeros(batch, length, dtype=torch.bool)
    key_mask[:, 1:] = order < masked  # each row of `order` is a permutation
    if share < 1:
        key_mask[torch.randperm(batch, generator=generator)[round(share * batch) :]] = False
    return key_mask


def show_own_position(key_mask: Tensor) -> Tensor:
    """Let a masked token's own query still see it: key mask [B, T] -> one mask for each query, [B, T, T]."""
    own = torch.eye(key_mask.shape[1], dtype=torch.bool, device=key_mask.device)
    return key_mask[:, None, :] & ~own


def random_positions(length: int, count: int, generator: torch.Generator, *, first: int = 0) -> Tensor:
    """Eq. 5's K positions, distinct, ascending, shared by the batch: int64 [count] in [first, length)."""
    return first + torch.randperm(length - first, generator=generator)[:count].sort().values
