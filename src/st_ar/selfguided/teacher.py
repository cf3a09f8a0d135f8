"""The teacher: an exponential moving average of the student, unmasked, without dropout and without gradients."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from st_ar.config import SelfGuidedConfig
from st_ar.model.transformer import Transformer


def ema_decay(config: SelfGuidedConfig, step: int) -> float:
    """The decay after optimizer step `step` (counted from 1): min(decay, (1 + t) / (10 + t)) with warm-up."""
    return min(config.ema_decay, (1 + step) / (10 + step)) if config.ema_warmup else config.ema_decay


class Teacher(nn.Module):
    """A copy of the student that follows it. Its weights are also the run's EMA weights, with or without self-guidance."""

    def __init__(self, student: Transformer, config: SelfGuidedConfig) -> None:
        super().__init__()
        self.config = config
        self.model = copy.deepcopy(student).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Teacher":  # noqa: ARG002
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
