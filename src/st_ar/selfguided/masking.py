"""What the student may not see (Eq. 3) and where its steps are compared (Eq. 5)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_key_mask(
    batch: int,
    length: int,
    ratio: float,
    generator: torch.Generator,
    *,
    share: float = 1.0,
    mine: slice = slice(None),
) -> Tensor:
    """Eq. 3's sequence mask as a key mask, True = masked: bool [batch, length], of it the sequences `mine`.

    Exactly round(ratio * (length - 1)) of each sequence's image-token keys are masked, drawn per sequence. Key 0, the
    class, is always visible, so no query is left without a key. Of the sequences, round(share * batch) are masked.
    """
    masked = round(ratio * (length - 1))
    drawn = torch.rand(batch, length - 1, generator=generator)
    order = drawn[mine].argsort(dim=1)  # each row is a permutation
    key_mask = F.pad(order < masked, (1, 0))
    if share < 1:
        seeing = torch.ones(batch, dtype=torch.bool)
        seeing[torch.randperm(batch, generator=generator)[: round(share * batch)]] = False
        key_mask[seeing[mine]] = False
    return key_mask


def show_own_position(key_mask: Tensor) -> Tensor:
    """Let a masked token's own query still see it: key mask [B, T] -> one mask for each query, [B, T, T]."""
    own = torch.eye(key_mask.shape[1], dtype=torch.bool, device=key_mask.device)
    return key_mask[:, None, :] & ~own


def random_positions(length: int, count: int, generator: torch.Generator, *, first: int = 0) -> Tensor:
    """Eq. 5's K positions, distinct, ascending, shared by the batch: int64 [count] in [first, length)."""
    return first + torch.randperm(length - first, generator=generator)[:count].sort().values
