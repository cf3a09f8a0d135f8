"""The whole line on images that are already on the machine: plain and self-guided training side by side, in minutes.

Every stage leaves the artefact that the matching command would leave, so the other commands work on what is here, and a
stopped quickstart goes on where it was.
"""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from st_ar.config import TrainConfig
from st_ar.data.crops import Crops
from st_ar.data.images import ImageSource, open_images
from st_ar.data.store import META, TokenStore
from st_ar.data.tokenize import tokenize
from st_ar.errors import UserError
from st_ar.evaluation import features
from st_ar.evaluation.attention import attention_maps, attention_statistics
from st_ar.evaluation.hidden import batches
from st_ar.evaluation.lars import ProbeConfig
from st_ar.evaluation.likelihood import validation_loss
from st_ar.evaluation.metrics import frechet_distance, mean_and_covariance
from st_ar.evaluation.probe import probe
from st_ar.files import is_taken, read_json, write_json
from st_ar.hardware import describe
from st_ar.model.transformer import Transformer
from st_ar.model.weights import load_model
from st_ar.presets import get_preset
from st_ar.quickstart_report import METHODS, Measured, Shown, token_budget, write_page
from st_ar.sample_config import SampleSettings
from st_ar.sampling import sample_images
from st_ar.settings import to_dict
from st_ar.tokenizer import CONFIG as TOKENIZER_CONFIG
from st_ar.tokenizer import Tokenizer, load_tokenizer, paint
from st_ar.tokenizer.kmeans import train_kmeans
from st_ar.training.loop import train
from st_ar.training.run import seconds_per_step

Images = Literal["photos", "digits"]
PROBE = ProbeConfig()
SAMPLES = 1024
CENTRE = 4
"""Which of the ten crops is the centre: the probes train on it alone, to be quick."""


def quickstart(out: Path, *, images: Images = "photos", steps: int | None = None, seed: int = 0) -> Path:
    """Train, probe, sample and compare AR and ST-AR at equal tokens; returns the report's path.

    Args:
        out: folder of all artefacts; the same call again continues what was begun there.
        images: which of the embedded sources.
        steps: optimizer steps of each model; the preset's if None.
        seed: of everything.

    Raises:
        UserError: `out` holds something else, or a quickstart with other settings.
    """
    begun = time.perf_counter()
    configs = {method: _config(f"{prefix}-{images}", steps, seed) for method, prefix in METHODS.items()}
    _claim(out, images, configs)
    source, test_source = open_images(f"{images}:train"), open_images(f"{images}:test")
    tokenizer = _tokenizer(out / "tokenizer", source)
    store = _store(out / "tokens-train", source, tokenizer, "ten")
    test_store = _store(out / "tokens-test", test_source, tokenizer, "center")
    for method, prefix in METHODS.items():
        run = out / prefix
        train(configs[method], store.folder, run, resume=(run / "config.json").exists(), preset=f"{prefix}-{images}")

    order = np.random.default_rng(seed).permutation(len(test_store))
    labels = test_store.labels[np.resize(order, SAMPLES)].tolist()
    real = np.concatenate([_center(example.read(), test_source) for example in test_source.examples(0)])
    measured: dict[str, Measured] = {}
    samples: dict[str, np.ndarray] = {}
    models: dict[str, Transformer] = {}
    for method, prefix in METHODS.items():
        models[method] = model = load_model(out / prefix)
        samples[method] = sample_images(model, tokenizer, labels, SampleSettings(seed=seed, cfg_scale=1.0))
        measured[method] = _measure(model, out / prefix, store, test_store, samples[method], real)
    decoded = _decoded(tokenizer, store, 1024)
    summary = {
        "images": images,
        "steps": configs["AR"].steps,
        "tokens_per_method": token_budget(configs["AR"]),
        "seed": seed,
        "samples": SAMPLES,
        "frechet_distance": features.DESCRIPTION,
        "frechet_of_decoded_training_images": _frechet(decoded, real),
        **{method: asdict(result) for method, result in measured.items()},
        "step_time_ratio": measured["ST-AR"].seconds_per_step / measured["AR"].seconds_per_step,
        "seconds_of_this_call": time.perf_counter() - begun,
        "environment": describe(),
    }
    write_json(out / "summary.json", summary)
    shown = Shown(samples=samples, labels=labels, real=real, models=models, configs=configs)
    write_page(out / "report.html", measured, summary, shown, store, test_store)
    return out / "report.html"


# stages


def _config(preset: str, steps: int | None, seed: int) -> TrainConfig:
    config = replace(get_preset(preset), seed=seed)
    return config if steps is None else replace(config, steps=steps)


def _claim(out: Path, images: str, configs: dict[str, TrainConfig]) -> None:
    now = {"images": images, **{method: to_dict(config) for method, config in configs.items()}}
    file = out / "quickstart.json"
    if file.exists():
        if read_json(file, "a quickstart") != now:
            raise UserError(
                f"{out} holds a quickstart with other settings: give the same ones to continue it, or choose another --out"
            )
    elif is_taken(out):
        raise UserError(f"{out} exists already and is no quickstart of ours: choose another --out")
    else:
        write_json(file, now)


def _tokenizer(folder: Path, source: ImageSource) -> Tokenizer:
    if not (folder / TOKENIZER_CONFIG).exists():
        train_kmeans(source).save(folder)
    return load_tokenizer(folder)


def _store(folder: Path, source: ImageSource, tokenizer: Tokenizer, kind: Literal["ten", "center"]) -> TokenStore:
    if (folder / META).exists():
        store = TokenStore(folder)
        store.verify()
        return store
    crops = Crops(kind=kind, size=source.size, range=source.crop_range, mirror=source.mirror)
    return tokenize(source, tokenizer, crops, folder)


def _center(image: Any, source: ImageSource) -> np.ndarray:
    return Crops(kind="center", size=source.size, range=source.crop_range).cut(image)


def _decoded(tokenizer: Tokenizer, store: TokenStore, count: int) -> np.ndarray:
    """Training images as the tokenizer gives them back: what a perfect model would draw."""
    codes = store.center_codes(np.arange(min(count, len(store))))
    return paint(tokenizer, torch.from_numpy(codes.astype(np.int64)))


def _frechet(images: np.ndarray, reference: np.ndarray) -> float:
    statistics_of = [mean_and_covariance(features.region_statistics(x)) for x in (images, reference)]
    return frechet_distance(*statistics_of[0], *statistics_of[1])


def _measure(
    model: Transformer, run: Path, store: TokenStore, test_store: TokenStore, samples: np.ndarray, real: np.ndarray
) -> Measured:
    tokens, labels = next(batches(test_store, [0], 256))
    layers = range(1, model.config.n_layers + 1)
    maps = attention_maps(model, tokens[:, :-1], labels, layers=layers)
    return Measured(
        validation_loss=validation_loss(model, test_store),
        validation_loss_ema=validation_loss(load_model(run, ema=True), test_store),
        probe=probe(model, store, test_store, train_crops=[CENTRE], config=PROBE),
        frechet=_frechet(samples, real),
        attention={layer: attention_statistics(maps[layer], model.config.grid) for layer in layers},
        seconds_per_step=seconds_per_step(run),
    )
