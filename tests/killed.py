"""The jobs that tests/killing.py kills. Each begins in `folder`, or goes on with what it finds there."""

from dataclasses import replace
from pathlib import Path

from st_ar.tokenizer.train import train_tokenizer
from st_ar.training.loop import train
from tests.tokenizer.toy_gan import TOY_GAN, colours
from tests.training.toy_runs import GUIDED_RUN

KILLED_RUN = replace(GUIDED_RUN, steps=24, checkpoint_every=2, keep_every=8)
KILLED_GAN = replace(TOY_GAN, checkpoint_every=2)


def training(folder: Path) -> None:
    resume = (folder / "config.json").exists()
    stores = folder.parent
    train(KILLED_RUN, stores / "tokens", folder, validation=stores / "validation", resume=resume, preset="toy")


def tokenizer_training(folder: Path) -> None:
    resume = (folder / "config.json").exists()
    train_tokenizer(KILLED_GAN, colours(), folder, resume=resume, preset="toy")
