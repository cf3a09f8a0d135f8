"""The jobs that tests/killing.py kills. Each begins in `folder`, or goes on with what it finds there.

What they read lies beside the folder: a test has made it.
"""

import os
from dataclasses import replace
from pathlib import Path

from st_ar.data.source import Crops
from st_ar.evaluation.generation.evaluate import evaluate
from st_ar.evaluation.generation.features import Compute
from st_ar.evaluation.generation.image_sets import open_files, open_set
from st_ar.evaluation.generation.references import open_reference, write_reference
from st_ar.files import write_json
from st_ar.sampling import JOB
from st_ar.tokenizer.tokenize import tokenize
from st_ar.training.loop import train
from st_ar.training.vqgan import train_tokenizer
from tests.evaluation.generation.test_evaluate import ALL, toy
from tests.sampling_processes import draw
from tests.small_line import random_source, random_tokenizer
from tests.training.toy_gan import TOY_GAN, colours
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


def tokenizing(folder: Path) -> None:
    if (folder / "job.json").exists() or not (folder / "meta.json").exists():
        crops = Crops(kind="ten", size=6, range=1.5)
        tokenize(random_source(150, size=10), random_tokenizer(), crops, folder, batch_size=16, images_per_shard=8)


def sampling(folder: Path) -> None:
    """To both kinds of files."""
    folder.mkdir(exist_ok=True)
    for out, parts, done in (
        ("samples.npz", "samples.npz.parts", "samples.json"),
        ("samples", "samples", "samples/metadata.json"),
    ):
        if (folder / parts / JOB).exists() or not (folder / done).exists():
            draw(folder.parent / "model", folder / out, labels=[0, 1, 2] * 10)


def evaluating(folder: Path) -> None:
    """With a reference of its own."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)  # results name their files
    extractor, place = toy(), Compute(batch_size=4)
    if not Path("reference.npz").exists():
        write_reference(open_set("../images"), Path("reference.npz"), extractor, place)
    opened = open_reference("reference.npz", extractor, ALL, place)
    write_json(Path("result.json"), evaluate(open_files("../samples"), opened, extractor, ALL, place))
