"""Predicts a run's peak memory per rank, its time and its disk space.

Memory is that of tensors, which tests/gpu/test_memory.py compares with those of real steps. The CUDA context, NCCL and
fragmentation come on top.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from st_ar.config import TrainConfig
from st_ar.errors import note
from st_ar.hardware import (
    checkpoint_bytes,
    flops_per_token,
    parameters,
    projector_parameters,
    run_bytes,
    training_flops,
)

GIB = 2**30
USABLE = 0.9
"""Share of a GPU's memory that tensors may take."""


class Memory(NamedTuple):
    """Bytes of a rank when most are in use. A sharded rank has its shards of weights, moments, EMA and gradients, in float32."""

    weights: float
    moments: float
    ema: float
    activations: float
    """Activations of one micro-batch, with the logits and gradients that exist at once, and the copies of weights for matrix products."""
    gradients: float
    """Gradients of the weights. With one micro-batch and no DDP, they reuse memory that the backward pass has freed."""
    peak: float


def predict_memory(
    config: TrainConfig, ranks: int = 1, *, compiled: bool = True, images: float | None = None
) -> Memory:
    """Predict a rank's memory at its peak, with flash or memory-efficient attention.

    `images` is the size of a rank's micro-batch, if not the config's.
    """
    model, guided, kind = config.model, config.selfguided, config.activation_checkpointing
    size = 4 if config.dtype == "float32" else 2  # of matrix products
    dim, hidden, vocabulary = model.dim, model.hidden_dim, model.vocab_size
    sharded = ranks > 1 and config.parallel == "fsdp"
    images = config.batch_size / ranks / config.accumulate if images is None else images
    length = model.condition_length - 1 + model.sequence_length
    tokens = images * config.views * length

    # Copies of weights for matrix products.
    trained, block = parameters(model) + projector_parameters(config), 4 * dim**2 + 3 * dim * hidden
    shards = (config.shard_size or ranks) if sharded else 1
    copies = 0.0
    if sharded:  # two blocks, the output head, and of both networks what belongs to no block
        copies = 2 * size * block + 2 * size * vocabulary * dim + 8 * vocabulary * dim
    elif size == 2 and (kind == "none" or not compiled):  # autocast keeps those that it made
        copies = size * model.n_layers * block
    # A block: what its backward pass needs, for a token. x is the float32 input.
    x, scores = 4 * dim, 4 * model.n_heads
    masks = dim * ((model.residual_dropout > 0) + (model.ffn_dropout > 0))
    if compiled:  # norm, q, k, v, attention, its projection, norm; two inputs of the gate, and their product
        whole = x + 7 * size * dim + masks + scores + 3 * size * hidden
    else:  # float32 norms and their results too, a copy of rotated q and k, a cast for each product
        whole = 4 * x + (9 if size == 2 else 8) * size * dim + masks + scores + 4 * size * hidden
    products = (5 if compiled else 6) * size * dim + scores + 2 * size * hidden
    kept = {"none": whole, "selective": x + products, "full": x}[kind]
    backward = whole - kept + x * (1 + guided.contrast) + 4 * size * hidden  # recomputed, and gradients in one block
    bias = size * length if guided.mask_ratio or model.condition == "text" else 0
    first = dim * (model.token_dropout > 0)
    blocks = tokens * (model.n_layers * kept + bias + first)

    # The losses: norm, its input and gradient, a chunk of logits (14 bytes with their softmax and gradients), cosine distances.
    rows = min(tokens, max(512, 4 * dim))
    chunks, matrix = tokens // rows, 4 * vocabulary * dim
    head = tokens * (3 * x + 2 * size * dim) + matrix * (size / 4 + min(chunks - 1, 2))
    teacher = config.accumulate * tokens * x if guided.alpha > 0 else 0  # of all micro-batches
    logits = rows * vocabulary * (12 + size * (1 + (chunks > 1)))
    cosines = 3 * tokens * x if guided.alpha > 0 else 0
    losses = head + teacher + max(logits, cosines)
    activations = copies + blocks + max(losses, tokens * backward + matrix)

    weights, moments, ema = 4 * trained / shards, 8 * trained / shards, 4 * parameters(model) / shards
    gradients = weights
    beside = config.accumulate > 1 or (ranks > 1 and not sharded)  # those of earlier micro-batches, or DDP's buckets
    both = activations + gradients if beside else max(activations, gradients)
    return Memory(weights, moments, ema, activations, gradients, weights + moments + ema + both)


def largest_micro_batch(config: TrainConfig, ranks: int, memory: float, *, compiled: bool = True) -> int:
    """Return the most images of a rank's micro-batch that fit `memory` bytes, 0 if none do."""
    few, many = 0, 1 << 20
    while many - few > 1:
        images = (few + many) // 2
        fits = predict_memory(config, ranks, compiled=compiled, images=images).peak <= USABLE * memory
        few, many = (images, many) if fits else (few, images)
    return few


def shortage(config: TrainConfig, ranks: int, memory: float, *, compiled: bool = True) -> str:
    """Return a warning if a run is not expected to fit `memory` bytes, with settings that do; empty if it fits."""

    def peak(**changes: Any) -> float:
        return predict_memory(replace(config, **changes), ranks, compiled=compiled).peak

    if peak() <= USABLE * memory:
        return ""
    share, kinds = config.batch_size // ranks, ("none", "selective", "full")
    smallest = 2 if config.selfguided.negatives == "local" else 1
    parts = [n for n in range(config.accumulate + 1, share // smallest + 1) if share % n == 0]
    stronger = kinds[kinds.index(config.activation_checkpointing) + 1 :]
    changes: list[dict[str, Any]] = [{"accumulate": n} for n in parts]
    changes += [{"activation_checkpointing": kind} for kind in stronger]
    changes += [{"parallel": "fsdp"}] if ranks > 1 and config.parallel != "fsdp" else []
    changes += [{"activation_checkpointing": "full", **change} for change in changes]
    found: dict[tuple[str, ...], str] = {}  # the first of each kind is the cheapest
    for change in changes:
        single = len(change) == 1
        if (single or not found) and (needed := peak(**change)) <= USABLE * memory:
            flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in change.items())
            found.setdefault(tuple(change), f"{flags} ({needed / GIB:.3g} GiB)")
    remedy = " or ".join(found.values()) or "a smaller --batch-size or --model, or more GPUs"
    return f"training may take {peak() / GIB:.3g} GiB, more than {USABLE:.0%} of a GPU's {memory / GIB:.3g} GiB: give {remedy}"


def note_shortage(
    config: TrainConfig, parallel: str, dtype: torch.dtype, ranks: int, device: torch.device, *, compiled: bool
) -> None:
    """Tell the user before a run if it is not expected to fit the GPU; `parallel` is from `choose_parallel`."""
    memory = torch.cuda.get_device_properties(device).total_memory
    planned = replace(config, parallel=parallel, dtype="float32" if dtype == torch.float32 else "bfloat16")
    if short := shortage(planned, ranks, memory, compiled=compiled):
        note(short)


def plan_run(
    config: TrainConfig, memory: float, peak: float, *, ranks: int, mfu: float, images: int, compiled: bool
) -> list[tuple[str, str]]:
    """Return the rows of a plan: what, and how much. `config.parallel` is from `choose_parallel`.

    A GPU has `memory` bytes and `peak` FLOP/s in bfloat16, of which it is assumed to reach the share `mfu`.
    """
    model, views, steps = config.model, config.views, config.total_steps(images)
    needed = predict_memory(config, ranks, compiled=compiled)
    names = ("weights", "AdamW's moments", "EMA", "activations", "gradients")
    micro = config.batch_size // ranks // config.accumulate
    largest = largest_micro_batch(config, ranks, memory, compiled=compiled)
    tokens = steps * config.batch_size * views * model.sequence_length
    recomputed = (config.activation_checkpointing == "full") * tokens * flops_per_token(model)[0]
    seconds = (training_flops(config, images) + recomputed) / (ranks * mfu * peak)
    speed, hours, projector = tokens / seconds, seconds / 3600, projector_parameters(config)
    timed = [
        ("tokens per second, per GPU and in total", f"{speed / ranks:,.0f}, {speed:,.0f}"),
        ("steps, and seconds per step", f"{steps:,}, {seconds / steps:.3g}"),
        ("time of the run", f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"),
    ]
    return [
        ("parameters of model and projector", f"{parameters(model) / 1e6:,.1f} M, {projector / 1e6:.1f} M"),
        ("micro-batch of a rank", f"{micro} images, {micro * views} sequences"),
        *(
            (f"memory of a rank: {name}", f"{size / GIB:.3g} GiB")
            for name, size in zip(names, needed[:-1], strict=True)
        ),
        ("peak memory of a rank", f"{needed.peak / GIB:.3g} of {memory / GIB:.3g} GiB"),
        (f"largest micro-batch in {USABLE:.0%} of it", f"{largest} images, {largest * views} sequences"),
        # the peak is bfloat16's, and a caption's operations are not counted
        *(timed if config.dtype != "float32" and model.condition == "class" else []),
        ("checkpoint", f"{checkpoint_bytes(config) / 1e9:.3g} GB"),
        (f"disk of the run, with --keep {config.keep}", f"{run_bytes(config, images) / 1e9:.3g} GB"),
    ]
