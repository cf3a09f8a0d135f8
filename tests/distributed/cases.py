"""Configs that are trained on one rank and on several, to be compared."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from st_ar.config import SelfGuidedConfig, TrainConfig
from st_ar.hardware import choose_dtype
from st_ar.selfguided.guidance import make_teacher, sample_guidance
from st_ar.selfguided.objective import Losses, SelfGuided
from st_ar.training.loop import Learner, forward_backward
from st_ar.training.parallel import choose_parallel, parallelize
from tests.toys import NO_DROPOUT, random_model
from tests.training.toy_runs import GUIDED_RUN

GUIDED = replace(GUIDED_RUN, model=replace(GUIDED_RUN.model, **NO_DROPOUT), batch_size=8, steps=4, checkpoint_every=4)
"""Without dropout inside the network, which differs between ranks; label dropout remains."""
OTHER = replace(
    GUIDED, selfguided=replace(GUIDED.selfguided, mask_own_position=False, mim_features="after_norm", reduction="sum")
)
LOCAL = replace(GUIDED, selfguided=replace(GUIDED.selfguided, negatives="local"))
SELDOM = replace(GUIDED, selfguided=replace(GUIDED.selfguided, every=2, until=0.8, masked_share=0.5))
"""Steps 1 and 3 of 4 are self-guided."""
PLAIN = replace(GUIDED, selfguided=SelfGuidedConfig(mask_ratio=0, alpha=0, beta=0))

DDP: dict[str, Any] = {"parallel": "ddp"}
FSDP: dict[str, Any] = {"parallel": "fsdp"}
HYBRID: dict[str, Any] = {"parallel": "fsdp", "shard_size": 2}
CASES: dict[int, dict[str, TrainConfig]] = {
    2: {
        "ddp": replace(GUIDED, **DDP),
        "ddp-accumulate": replace(GUIDED, **DDP, accumulate=2, activation_checkpointing="full"),
        "ddp-local": replace(LOCAL, **DDP),
        "ddp-plain": replace(PLAIN, **DDP),
        "ddp-now-and-then": replace(SELDOM, **DDP),
        "fsdp": replace(GUIDED, **FSDP),
        "fsdp-accumulate": replace(OTHER, **FSDP, accumulate=4, activation_checkpointing="selective"),
        "fsdp-bfloat16": replace(GUIDED, **FSDP, dtype="bfloat16"),
        "fsdp-now-and-then": replace(SELDOM, **FSDP),
        "fsdp-plain": replace(PLAIN, **FSDP, activation_checkpointing="full"),
    },
    4: {
        "ddp": replace(OTHER, parallel="auto"),
        "fsdp": replace(OTHER, **FSDP),
        "hybrid": replace(GUIDED, **HYBRID),
        "hybrid-accumulate": replace(
            LOCAL, **HYBRID, batch_size=16, accumulate=2, activation_checkpointing="selective"
        ),
    },
}
"""Ranks -> name -> config."""
CAPTIONS = replace(
    GUIDED,
    **FSDP,
    model=replace(GUIDED.model, condition="text", num_classes=1000, text_tokens=4, text_dim=6),
    class_dropout=0.3,
)
"""Of two ranks, with the text store beside the token store."""
INITIAL = replace(GUIDED, **FSDP, steps=1)
"""Of two ranks, from the weights that "ddp" ends with."""
COMPILED = {
    f"{parallel}-{again}": replace(GUIDED, parallel=parallel, activation_checkpointing=again, compile=True)
    for parallel in ("ddp", "fsdp")
    for again in ("none", "selective", "full")
}
"""Of two ranks."""
RELAY = {
    2: replace(GUIDED, **DDP, steps=2),
    1: replace(GUIDED, steps=4),
    4: replace(GUIDED, **FSDP, steps=6),
}
"""A run that continues with other numbers of ranks, in this order; one rank ends it after step 8."""


def single(config: TrainConfig, world: int) -> TrainConfig:
    """The config for one rank. With local negatives, its micro-batches must be as small as those of the ranks."""
    pieces = config.accumulate * world if config.selfguided.negatives == "local" else 1
    return replace(config, parallel="none", shard_size=None, accumulate=pieces, activation_checkpointing="none")


class CalmAdamW(torch.optim.AdamW):
    """Does not amplify gradients that are only rounding errors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, eps=1e-3)


def first_gradients(
    config: TrainConfig, world: int, rank: int, watch: AbstractContextManager[Any] | None = None
) -> tuple[dict[str, Tensor], Losses]:
    """The gradients (or shards of them) and losses of this rank, on random tokens with weights far from zero.

    Args:
        watch: entered around the forward and the backward pass.
    """
    torch.manual_seed(3)
    teacher = make_teacher(random_model(config.model, seed=1), config.selfguided)
    student = SelfGuided(random_model(config.model, seed=0), config.selfguided).train()
    cpu = torch.device("cpu")
    dtype = choose_dtype(config.dtype, cpu)
    called = parallelize(student, teacher, config, choose_parallel(config, world), cpu, dtype)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(16, (config.batch_size, 2, 16), generator=generator)
    labels = torch.randint(4, (config.batch_size,), generator=generator)
    each = config.batch_size // world
    share = slice(rank * each, (rank + 1) * each)
    draws = sample_guidance(
        config.selfguided, (config.batch_size, 2, config.model.sequence_length), seed=0, step=1, images=share
    )
    with watch or nullcontext():
        losses = forward_backward(
            Learner(called, teacher, config.accumulate, dtype), tokens[share], labels[share], draws
        )
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}, losses


def run_folder(out: Path, world: int, name: str) -> Path:
    return out / f"{world}-{name}"
