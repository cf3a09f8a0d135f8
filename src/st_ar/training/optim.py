"""AdamW with LlamaGen's settings, gradient clipping, and the learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from st_ar.config import OptimConfig


def adamw(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW with weight decay only on parameters of two or more dimensions."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def clip_gradients(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """Clip gradients to the norm `largest` (0: no clipping). Returns the norm before clipping, over all ranks' shards."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, largest or math.inf, norm)
    return norm


def set_learning_rate(rate: float, *optimizers: torch.optim.Optimizer) -> None:
    """Set the learning rate of every parameter group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Return the learning rate of optimizer step `step` of `total`, counted from 1."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.schedule == "constant":
        share = 1.0
    elif config.schedule == "cosine":
        share = config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2
    else:
        decay_steps = max(1, round(config.decay_fraction * total))
        share = config.final_lr + (1 - config.final_lr) * min(1.0, (total - step) / decay_steps)
    return config.lr * share
