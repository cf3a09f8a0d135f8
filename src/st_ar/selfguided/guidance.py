"""Self-guidance from a network's features: key masks and positions, the EMA teacher, the projector and the losses.

It works with any network. B: images, M: views of each, T: positions, K: positions drawn for the contrast, D: features.
"""

import copy
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from st_ar.config import SelfGuidedConfig
from st_ar.randomness import RandomStream, torch_generator
from st_ar.selfguided.losses import mim_loss, step_loss, view_loss

# Random choices of a step


class GuidanceSample(NamedTuple):
    """The random choices of a step."""

    key_mask: Tensor | None
    """True where a key is masked: bool [B, M, T], or [B, M, T, T] with one mask per query. None masks nothing."""
    positions: Tensor | None
    """The K positions of Eq. 5, int64 [K]. None in a step without self-guidance."""


NO_GUIDANCE = GuidanceSample(None, None)
"""The choices of a plain step."""


def sample_guidance(
    config: SelfGuidedConfig, shape: tuple[int, int, int], *, seed: int, step: int, images: slice = slice(None)
) -> GuidanceSample:
    """Draw the random choices of a step, a pure function of the seed and the step.

    Args:
        shape: (B, M, T) of the step's whole batch.
        step: the optimizer step, counted from 1.
        images: the images whose masks to return, such as one rank's.
    """
    count, views, length = shape
    generator = torch_generator(seed, RandomStream.POSITIONS, step)
    positions = random_positions(length, config.positions, generator, first=config.first_position)
    if config.mask_ratio == 0:
        return GuidanceSample(None, positions)
    generator = torch_generator(seed, RandomStream.KEY_MASK, step)
    start, stop, _ = images.indices(count)
    rows = slice(start * views, stop * views)
    key_mask = random_key_mask(
        count * views, length, config.mask_ratio, generator, share=config.masked_share, rows=rows
    )
    if not config.mask_own_position:
        key_mask = show_own_position(key_mask)
    return GuidanceSample(key_mask.unflatten(0, (-1, views)), positions)


def random_key_mask(
    batch: int,
    length: int,
    ratio: float,
    generator: torch.Generator,
    *,
    share: float = 1.0,
    rows: slice = slice(None),
) -> Tensor:
    """Draw the key mask of Eq. 3, True = masked: bool [batch, length], or only `rows` of it.

    Each of round(share * batch) sequences has exactly round(ratio * (length - 1)) masked image-token keys, drawn per sequence.
    Key 0, the class, is always visible, so every query has a key.
    """
    masked = round(ratio * (length - 1))
    noise = torch.rand(batch, length - 1, generator=generator)
    ranks = noise[rows].argsort(dim=1)  # each row is a random permutation
    key_mask = F.pad(ranks < masked, (1, 0))
    if share < 1:
        unmasked = torch.ones(batch, dtype=torch.bool)
        unmasked[torch.randperm(batch, generator=generator)[: round(share * batch)]] = False
        key_mask[unmasked[rows]] = False
    return key_mask


def show_own_position(key_mask: Tensor) -> Tensor:
    """Make each masked token visible to its own query: key mask [B, T] -> one mask per query [B, T, T]."""
    own = torch.eye(key_mask.shape[1], dtype=torch.bool, device=key_mask.device)
    return key_mask[:, None, :] & ~own


def random_positions(length: int, count: int, generator: torch.Generator, *, first: int = 0) -> Tensor:
    """Draw the K positions of Eq. 5, distinct and ascending, shared by the batch: int64 [count] in [first, length)."""
    return first + torch.randperm(length - first, generator=generator)[:count].sort().values


# Teacher


Network = TypeVar("Network", bound=nn.Module)


class EMATeacher(nn.Module, Generic[Network]):
    """A copy of a network that follows it as an exponential moving average. It has no gradients and never trains.

    Its weights are also a run's EMA weights, with or without self-guidance.

    Args:
        model: the network to follow.
        decay: decay of the average.
        warmup: start with the decay min(decay, (1 + t) / (10 + t)) at step t, so that short runs get a useful teacher.
    """

    def __init__(self, model: Network, *, decay: float = 0.9999, warmup: bool = True) -> None:
        super().__init__()
        self.decay, self.warmup = decay, warmup
        self.model: Network = copy.deepcopy(model).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "EMATeacher[Network]":  # noqa: ARG002
        """Stay in evaluation mode."""
        return super().train(False)

    def update(self, model: nn.Module, step: int) -> float:
        """Move towards the network after optimizer step `step`, counted from 1; returns the decay used."""
        decay = ema_decay(self.decay, step, warmup=self.warmup)
        ema_update(self.model, model, decay)
        return decay


def make_teacher(model: Network, config: SelfGuidedConfig) -> EMATeacher[Network]:
    """Build the teacher with the decay of the settings."""
    return EMATeacher(model, decay=config.ema_decay, warmup=config.ema_warmup)


def ema_decay(decay: float, step: int, *, warmup: bool = True) -> float:
    """Return the decay after optimizer step `step`, counted from 1: min(decay, (1 + step) / (10 + step)) with warm-up."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the parameters of an average towards those of a network of the same structure, in the average's dtype.

    Sharded parameters must be sharded alike: each rank averages its own shards.
    """
    averages, values = (
        [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()] for module in (average, model)
    )
    torch._foreach_lerp_(averages, values, 1 - decay)


# Losses


class Projector(nn.Sequential):
    """The projector f, an MLP on the student's side only (after SimSiam, arXiv 2011.10566), back to D features.

    It has layer norm where SimSiam has batch norm. Images then affect one another only as negatives, and the gradients of
    micro-batches add up exactly to those of the large batch.
    """

    def __init__(self, dim: int, hidden: int, depth: int) -> None:
        widths = [dim, *[hidden] * (depth - 1), dim]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths[:-1]):
            layers += [nn.Linear(width_in, width_out, bias=False), nn.LayerNorm(width_out), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-2], dim))


def make_projector(dim: int, config: SelfGuidedConfig) -> Projector | None:
    """Build the projector, or return None without contrast."""
    return Projector(dim, config.projector_hidden, config.projector_depth) if config.contrast else None


class Features(NamedTuple):
    """Features of a batch of views. Those that no loss needs are None."""

    last: Tensor | None
    """Last layer [B, M, T, D], for Eq. 4."""
    middle: Tensor | None
    """Contrast layer, for Eq. 6 and 7: the student's at all positions [B, M, T, D], the teacher's at the K positions
    [B, M, K, D]."""


class GuidanceLosses(NamedTuple):
    """The terms that self-guidance adds to Eq. 8, scalars. A term without weight is 0 and not computed."""

    total: Tensor
    """alpha * mim + beta * (step + view) / 2."""
    mim: Tensor
    step: Tensor
    view: Tensor


def guidance_losses(
    config: SelfGuidedConfig,
    projector: Projector | None,
    student: Features,
    teacher: Features,
    positions: Tensor | None,
    *,
    offset: int = 0,
) -> GuidanceLosses:
    """Compute Eq. 4, 6 and 7, weighted as in Eq. 8.

    Args:
        projector: the projector from `make_projector`.
        student: features with gradients, of b images.
        teacher: features without gradients. `middle` holds the candidates of the contrast, those of B >= b images: with
            micro-batches or several ranks the whole batch's.
        positions: the positions of Eq. 5, int64 [K]; None in a step without self-guidance.
        offset: index of the student's first image among the candidates.
    """
    features = next(each for each in student if each is not None)
    total, mim, step, view = features.new_zeros(4, dtype=torch.promote_types(features.dtype, torch.float32))
    if config.alpha > 0 and student.last is not None and teacher.last is not None:
        mim = mim_loss(student.last, teacher.last)
        total = total + config.alpha * mim
    if projector is not None and teacher.middle is None:  # DDP expects a gradient for every weight
        total = total + sum(0 * parameter.sum() for parameter in projector.parameters())
    elif projector is not None:
        assert teacher.middle is not None
        assert student.middle is not None
        assert positions is not None
        z = projector(student.middle[:, :, positions])
        temperature, reduction = config.temperature, config.reduction
        if config.step_loss:
            step = step_loss(z, teacher.middle, temperature=temperature, reduction=reduction, offset=offset)
        if config.view_loss:
            view = view_loss(z, teacher.middle, temperature=temperature, reduction=reduction, offset=offset)
        total = total + config.beta * (step + view) / 2
    return GuidanceLosses(total, mim, step, view)
