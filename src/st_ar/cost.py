"""What training costs in floating-point operations and bytes, by formula."""

from st_ar.config import ModelConfig, TrainConfig


def flops_per_token(config: ModelConfig) -> tuple[float, float]:
    """Forward FLOPs per token of the blocks and of the vocabulary projection (two a multiply-add, causal attention)."""
    per_block = 4 * config.dim**2 + 3 * config.dim * config.hidden_dim
    attention = 2 * config.sequence_length * config.dim  # two products over half the keys, on average
    return config.n_layers * (2 * per_block + attention), 2 * config.dim * config.vocab_size


def training_flops_per_token(config: TrainConfig, *, until: float | None = None) -> float:
    """Three passes of everything, and the teacher's over the blocks up to the last that it is asked for, in the steps that have one.

    What activation checkpointing repeats is not counted, nor the projector and the losses.

    Args:
        until: share of the run that has self-guidance, if not the config's.
    """
    body, head = flops_per_token(config.model)
    guided, depth = config.selfguided, config.model.n_layers
    layers = depth if guided.alpha > 0 else guided.layer(depth) if guided.contrast else 0
    return 3 * (body + head) + body * layers / depth * (guided.until if until is None else until) / guided.every


def training_flops(config: TrainConfig, images: int) -> float:
    """Of a whole run on a store of `images` images."""
    tokens = config.total_steps(images) * config.batch_size * config.views * config.model.sequence_length
    return tokens * training_flops_per_token(config)


def parameters(config: ModelConfig) -> int:
    """Weights of a transformer."""
    block = 4 * config.dim**2 + 3 * config.dim * config.hidden_dim + 2 * config.dim
    classes = (config.num_classes + 1) * config.dim
    return config.n_layers * block + 2 * config.vocab_size * config.dim + classes + config.dim


def run_bytes(config: TrainConfig, images: int = 0) -> int:
    """Disk that a class model's run takes at most, in float32: checkpoints (weights, average, AdamW's two moments) and exports, the
    newest and, on a store of so many images, those that --keep-every keeps. The best by a validation store is not counted.
    """
    kept = config.total_steps(images) // config.keep_every if config.keep_every else 0
    return parameters(config.model) * 4 * (4 * (config.keep + 1 + kept) + 2 * (1 + kept))
