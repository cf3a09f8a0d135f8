"""The method: key mask and positions (Eq. 3, 5), the EMA teacher, and the total loss (Eq. 8)."""

import copy
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from st_ar.config import ModelConfig, SelfGuidedConfig
from st_ar.model.transformer import Transformer
from st_ar.randomness import RandomStream, torch_generator
from st_ar.selfguided.losses import linear_next_token_loss, mim_loss, step_loss, view_loss


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


def ema_decay(config: SelfGuidedConfig, step: int) -> float:
    """The decay after optimizer step `step` (counted from 1): min(decay, (1 + t) / (10 + t)) with warm-up."""
    return min(config.ema_decay, (1 + step) / (10 + step)) if config.ema_warmup else config.ema_decay


class EMATeacher(nn.Module):
    """A copy of the student that follows it. Its weights are also the run's EMA weights, with or without self-guidance."""

    def __init__(self, student: Transformer, config: SelfGuidedConfig) -> None:
        super().__init__()
        self.config = config
        self.model = copy.deepcopy(student).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "EMATeacher":  # noqa: ARG002
        """Stay in evaluation mode: the teacher has no dropout."""
        return super().train(False)

    @torch.no_grad()
    def update(self, student: Transformer, step: int) -> float:
        """Move towards the student, in float32, once for each optimizer step; returns the decay used."""
        decay = ema_decay(self.config, step)
        ours, theirs = ([_local(p) for p in module.parameters()] for module in (self.model, student))
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        return decay


def _local(parameter: Tensor) -> Tensor:
    """The part of it that is on this rank: teacher and student are split alike, so each rank can average its own."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Projector(nn.Sequential):
    """f: an MLP on the student's side only (after SimSiam, arXiv 2011.10566), back to D features.

    Layer norm stands between the layers instead of batch norm, so that an image's loss depends on the others through
    the negatives alone, and micro-batches add up exactly to the large batch.
    """

    def __init__(self, dim: int, hidden: int, depth: int) -> None:
        widths = [dim, *[hidden] * (depth - 1), dim]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths[:-1]):
            layers += [nn.Linear(width_in, width_out, bias=False), nn.LayerNorm(width_out), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-2], dim))


class GuidanceSample(NamedTuple):
    """A step's random choices."""

    key_mask: Tensor | None
    """Masked keys, bool [B, M, T] or [B, M, T, T]; None when r = 0."""
    positions: Tensor | None
    """The K positions of Eq. 5, int64 [K]; None in a step without self-guidance."""


NO_GUIDANCE = GuidanceSample(None, None)
"""What a plain step draws."""


class TeacherFeatures(NamedTuple):
    """What the teacher saw, without gradients."""

    last: Tensor | None
    """Last-layer features [B, M, T, D] for Eq. 4; None when alpha = 0."""
    mid: Tensor | None
    """Contrast-layer features at the positions [B, M, K, D] for Eq. 6 and 7; None when beta = 0."""


class Losses(NamedTuple):
    """The terms of Eq. 8, scalars; a term without weight is 0 and was not computed."""

    total: Tensor
    ar: Tensor
    mim: Tensor
    step: Tensor
    view: Tensor


class SelfGuided(nn.Module):
    """The student with its projector, and its losses. With alpha = beta = r = 0 this is plain autoregressive training."""

    def __init__(self, model: Transformer, config: SelfGuidedConfig) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.mid = config.layer(model.config.n_layers)
        self.last = model.config.n_layers
        self.projector = (
            Projector(model.config.dim, config.projector_hidden, config.projector_depth) if config.contrast else None
        )

    def teach(self, teacher: EMATeacher, tokens: Tensor, labels: Tensor, positions: Tensor | None) -> TeacherFeatures:
        """The teacher's unmasked pass over tokens [B, M, T] with the student's labels [B, ..]. No gradient, no output head."""
        config = self.config
        if not config.needs_teacher or positions is None:
            return TeacherFeatures(None, None)
        wanted = {layer for layer, on in ((self.last, config.alpha > 0), (self.mid, config.contrast)) if on}
        with torch.no_grad():
            states = teacher.model.features(*_sequences(tokens, labels), layers=wanted)
        views = tokens.shape[:2]
        last = states[self.last].unflatten(0, views) if config.alpha > 0 else None
        if last is not None and config.mim_features == "after_norm":
            last = teacher.model.norm(last)
        mid = states[self.mid].unflatten(0, views)[:, :, positions] if config.contrast else None
        return TeacherFeatures(last, mid)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        draws: GuidanceSample,
        targets: TeacherFeatures,
        candidates: Tensor | None,
        offset: int,
    ) -> Losses:
        """The student's masked pass and Eq. 8.

        Args:
            tokens: int64 [b, M, T]; labels: [b] or [b, N, width], as for the model, already dropped.
            draws: this batch's mask and positions; targets: the teacher's features of the same images.
            candidates: teacher features [B, M, K, D] that the contrastive losses choose among, B >= b.
            offset: the place of this batch's first image in `candidates`.
        """
        config = self.config
        key_mask = None if draws.key_mask is None else draws.key_mask.flatten(0, 1)
        inputs, repeated = _sequences(tokens, labels)
        hidden = self.model.features(inputs, repeated, key_mask=key_mask, layers={self.mid, self.last})

        last = self.model.norm(hidden[self.last])
        ar = self.model.output(last, partial(linear_next_token_loss, tokens=tokens.flatten(0, 1)))
        total, mim, step, view = ar, *ar.new_zeros(3)
        if targets.last is not None:
            compared = last if config.mim_features == "after_norm" else hidden[self.last]
            mim = mim_loss(compared.unflatten(0, tokens.shape[:2]), targets.last)
            total = total + config.alpha * mim
        if self.projector is not None and candidates is None:  # every weight has a gradient, as DDP expects
            total = total + sum(0 * parameter.sum() for parameter in self.projector.parameters())
        elif self.projector is not None:
            assert candidates is not None
            assert draws.positions is not None
            z = self.projector(hidden[self.mid].unflatten(0, tokens.shape[:2])[:, :, draws.positions])
            temperature, reduction = config.temperature, config.reduction
            if config.step_loss:
                step = step_loss(z, candidates, temperature=temperature, reduction=reduction, offset=offset)
            if config.view_loss:
                view = view_loss(z, candidates, temperature=temperature, reduction=reduction, offset=offset)
            total = total + config.beta * (step + view) / 2
        return Losses(total, ar, mim, step, view)


def _sequences(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Views as a batch of model inputs: tokens [B, M, T], labels [B, ..] -> [B * M, T - 1], [B * M, ..]."""
    return tokens.flatten(0, 1)[:, :-1], labels.repeat_interleave(tokens.shape[1], dim=0)


def sample_guidance(
    config: SelfGuidedConfig,
    model: ModelConfig,
    *,
    images: int,
    views: int,
    seed: int,
    step: int,
    mine: slice = slice(None),
) -> GuidanceSample:
    """The choices of step `step` for its whole batch, a pure function of (seed, step); of them the part of the images `mine`."""
    length, generator = model.sequence_length, torch_generator(seed, RandomStream.POSITIONS, step)
    positions = random_positions(length, config.positions, generator, first=config.first_position)
    if config.mask_ratio == 0:
        return GuidanceSample(None, positions)
    generator = torch_generator(seed, RandomStream.KEY_MASK, step)
    first, last, _ = mine.indices(images)
    rows = slice(first * views, last * views)
    key_mask = random_key_mask(
        images * views, length, config.mask_ratio, generator, share=config.masked_share, mine=rows
    ).unflatten(0, (-1, views))
    if not config.mask_own_position:
        key_mask = show_own_position(key_mask.flatten(0, 1)).unflatten(0, key_mask.shape[:2])
    return GuidanceSample(key_mask, positions)
