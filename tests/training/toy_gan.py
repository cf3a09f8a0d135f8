"""A VQ-GAN's training small enough for a second, with every part of it switched on."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from st_ar.config import AdversaryConfig, OptimConfig, VQConfig, VQTrainConfig
from st_ar.data.source import Example, ImageSource

TOY_GAN = VQTrainConfig(
    model=VQConfig(channels=8, multipliers=(1, 2), z_channels=8, codebook_size=16, codebook_dim=4, residual_blocks=1),
    adversary=AdversaryConfig(start=6, channels=4, layers=1),
    optim=OptimConfig(lr=3e-3),
    size=12,
    crop_range=1.25,
    steps=12,
    batch_size=4,
    revive_after=3,
    ema_decay=0.9,
    log_every=1,
    evaluate_every=5,
    evaluate_images=6,
    checkpoint_every=4,
    dtype="float32",
    device="cpu",
)
"""The discriminator is heard from step 7 on; codes are revived at steps 3, 6, 9 and 12."""


def colours(count: int = 10, *, name: str = "colours", content: str = "") -> ImageSource:
    """Images of two colours each, one left and one right."""

    def examples(start: int) -> Iterator[Example]:
        for index in range(start, count):
            left, right = np.random.default_rng(index).integers(0, 256, (2, 3), np.uint8)
            pixels = np.where(np.arange(20)[None, :, None] < 10, left, right).repeat(18, axis=0)
            yield Example(Image.fromarray(pixels), 0, f"{name}/{index}")

    return ImageSource(
        name=name,
        class_names=["a"],
        count=count,
        examples=examples,
        size=12,
        crop_range=1.25,
        mirror=True,
        content=content,
    )
