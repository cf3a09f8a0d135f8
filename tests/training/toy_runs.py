"""Runs small enough to be made in a second, with every random thing switched on."""

from dataclasses import replace

from st_ar.config import ModelConfig, SelfGuidedConfig, TrainConfig
from st_ar.run_config import OptimConfig

# LlamaGen's dropouts and class dropout are on: they are ModelConfig's and TrainConfig's defaults.
PLAIN_RUN = TrainConfig(
    model=ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=16, grid=4, num_classes=3),
    optim=OptimConfig(lr=3e-3),
    steps=12,
    batch_size=6,
    log_every=1,
    checkpoint_every=4,
    dtype="float32",
    device="cpu",
)
GUIDED_RUN = replace(PLAIN_RUN, views=2, selfguided=SelfGuidedConfig(projector_hidden=24, positions=3, ema_decay=0.9))
