"""Self-guidance from a network's features: key masks and positions, the EMA teacher, the projector and the losses.

It works with any network (docs/own-model.md). B: images, M: views of each, T: positions, K: positions drawn for the contrast,
D: features.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from st_ar.config import SelfGuidedConfig
from st_ar.distributed import all_gather, get_rank
from st_ar.errors import UserError
from st_ar.hardware import to_device
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
    """Move the parameters of an average towards those of a network of the same structure, in the average's dtype, and copy its buffers.

    Sharded parameters must be sharded alike: each rank averages its own shards.
    """
    averages, values = (
        [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()] for module in (average, model)
    )
    if [p.shape for p in averages] != [p.shape for p in values]:
        raise UserError("the network's parameters are not those that the teacher was copied from: give the same module")
    torch._foreach_lerp_(averages, values, 1 - decay)
    for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)


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


class SelfGuidance(nn.Module):
    """Self-guidance for any autoregressive network: the random choices of a step, the projector, and the losses of features.

    Args:
        dim: width D of the features at the contrast layer.
        config: weights of the losses and all other settings; the paper's if None.
        seed: seed of the masks and positions.
    """

    def __init__(self, dim: int, config: SelfGuidedConfig | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.dim, self.config, self.seed = dim, config or SelfGuidedConfig(), seed
        self.projector = make_projector(dim, self.config)

    def sample(
        self, shape: Sequence[int], step: int, *, total: float = math.inf, images: slice = slice(None)
    ) -> GuidanceSample:
        """Draw the key mask and the positions of a step, a pure function of the seed and the step, on the projector's device.

        Args:
            shape: (B, M, T) of the step's whole batch, over all ranks.
            step: the optimizer step.
            total: steps of the run, for `until`.
            images: the images whose masks to return, such as one rank's.

        Raises:
            UserError: the shape has no views, or the settings need more views or positions than there are.
        """
        if len(shape) != 3:
            raise UserError(f"tokens of shape {list(shape)} have no views: give [B, M, T], M views of each image")
        config, (count, views, length) = self.config, shape
        if config.contrast and config.view_loss and views < 2:
            raise UserError(
                f"the inter-view loss compares views, and there is {views}: give tokens [B, M, T] with M of 2 or more"
            )
        if config.contrast and config.first_position + config.positions > length:
            raise UserError(
                f"{config.positions} positions from position {config.first_position} on are more than the {length} of a sequence"
            )
        if not config.guides(step, total):
            return NO_GUIDANCE
        sample = sample_guidance(config, (count, views, length), seed=self.seed, step=step, images=images)
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        return GuidanceSample(*(None if each is None else to_device(each, device) for each in sample))

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], sample: GuidanceSample
    ) -> GuidanceLosses:
        """Return the losses of this rank's images; `total` is what to add to the network's own loss.

        Where a process group exists and `negatives` is global, the teacher's features of all ranks are negatives.

        Args:
            student: features [B, M, T, D] with gradients, from the pass with `sample.key_mask`: "mid", the contrast layer's, and
                "last", the last layer's. Those that no loss needs may be missing.
            teacher: the same of the teacher's pass, without a mask and without gradients.
            sample: the step's random choices, from `sample`.

        Raises:
            UserError: features are missing, have other shapes, or carry gradients from the teacher, or there is a single image.
        """
        config, positions = self.config, sample.positions
        if positions is None:
            return guidance_losses(
                config, self.projector, Features(student.get("last"), student.get("mid")), Features(None, None), None
            )
        needed = [name for name, used in (("last", config.alpha > 0), ("mid", config.contrast)) if used]
        for name in needed:
            self._check(name, student.get(name), teacher.get(name))
        middle, offset = None, 0
        if config.contrast:
            middle = teacher["mid"][:, :, positions]
            if config.negatives == "global":
                offset, middle = get_rank() * len(middle), all_gather(middle)
            if len(middle) < 2:
                raise UserError("the contrast needs negatives, and the batch has one image: give 2 images or more")
        return guidance_losses(
            config,
            self.projector,
            Features(student.get("last"), student.get("mid")),
            Features(teacher.get("last"), middle),
            positions,
            offset=offset,
        )

    def _check(self, name: str, student: Tensor | None, teacher: Tensor | None) -> None:
        if student is None or teacher is None:
            raise UserError(f"features {name!r} are missing: give both networks' [B, M, T, D]")
        if student.dim() != 4 or student.shape != teacher.shape or (name == "mid" and student.shape[-1] != self.dim):
            width = f"D of {self.dim}" if name == "mid" else "any D"
            raise UserError(
                f"features {name!r} are {list(student.shape)} and the teacher's {list(teacher.shape)}: give [B, M, T, D] with {width}"
            )
        if teacher.requires_grad:
            raise UserError("the teacher's features carry gradients: compute them under torch.no_grad()")
