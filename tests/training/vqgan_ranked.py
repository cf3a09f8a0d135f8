"""A rank that trains TOY_GAN: python -m tests.training.vqgan_ranked OUT, under torchrun. Rank n writes, if it does, to OUT/rank-n."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from st_ar.training import vqgan as module
from tests.training.toy_gan import TOY_GAN, colours


def train(out: Path) -> None:
    """With an AdamW that does not enlarge gradients which are nothing but rounding errors, as those of biases before norms."""

    def calm(network: nn.Module, config: Any) -> torch.optim.AdamW:
        return torch.optim.AdamW(network.parameters(), lr=config.lr, betas=config.betas, eps=1e-2)

    config = replace(TOY_GAN, model=replace(TOY_GAN.model, codebook_size=48))  # so many that some will be idle
    config = replace(config, steps=8, evaluate_every=8, adversary=replace(config.adversary, start=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "adamw", calm)
        module.train_tokenizer(config, colours(), out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]) / f"rank-{os.environ['RANK']}")
