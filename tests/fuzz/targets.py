"""What is damaged: each artefact of the line, how it is made, and what a user would read from it."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from st_ar.config import Metric, ModelConfig, OptimConfig, TrainConfig
from st_ar.data.images import open_images
from st_ar.data.llamagen import import_tokens
from st_ar.data.source import Crops, Example, ImageSource
from st_ar.data.store import TokenStore
from st_ar.data.text import TextStore, write_text
from st_ar.evaluation.generation.evaluate import evaluate, one_line
from st_ar.evaluation.generation.features import Compute
from st_ar.evaluation.generation.image_sets import open_set
from st_ar.evaluation.generation.references import Reference, open_reference, write_reference
from st_ar.evaluation.generation.sweep import SweptModel, list_settings, sweep
from st_ar.evaluation.probe_features import FeatureCache, FeatureSpec, extract_features
from st_ar.files import write_json
from st_ar.model.generate import generate
from st_ar.model.transformer import Transformer
from st_ar.model.weights import HEADS, open_model
from st_ar.reproduce.plan import Files, measurements, probe_curve
from st_ar.sampling import SampleWriter
from st_ar.settings import to_dict
from st_ar.tokenizer import load_tokenizer
from st_ar.tokenizer.tokenize import tokenize
from st_ar.tokenizer.vq import VQTokenizer
from st_ar.training.loop import train
from tests.data.random_store import random_store
from tests.evaluation.generation.test_evaluate import pictures, toy
from tests.fuzz.mutations import Damage
from tests.small_line import make_line, random_source, random_tokenizer
from tests.tokenizer.test_vq import SMALL, random_tensors
from tests.toys import TINY, random_model, random_sequences, save_export

CHECKPOINTS_ARE_SEALED = True
"""Whether checkpoints carry checksums; without them another number in a tensor cannot be told from the right one."""


@dataclass(frozen=True)
class Target:
    """An artefact and its reader."""

    make: Callable[[Path], None]
    """Writes it into a new folder, the same each time."""
    read: Callable[[Path], Any]
    """Reads it as a user's command would, and tells what came out: equal for equal work."""
    is_legal: Callable[[Damage], bool] = lambda damage: False
    """Whether what is damaged so may give other work: no one could tell it from an artefact that was never damaged."""


def digest(*arrays: torch.Tensor | np.ndarray) -> str:
    """Of types, shapes and values."""
    found = hashlib.sha256()
    for array in map(np.asarray, arrays):
        found.update(f"{array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


# Token stores and captions

STORED = ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=11, grid=3, num_classes=3)


def _make_store(folder: Path) -> None:
    random_store(folder / "store", images=7, crops=3, grid=3, vocab_size=11, shards=2)


def _read_store(folder: Path) -> str:
    store = TokenStore(folder / "store")
    store.check_model(STORED)
    store.verify()
    crops = np.tile(np.arange(len(store.meta.crops)), (len(store), 1))
    return digest(store.codes(np.arange(len(store)), crops), store.labels)


def _make_text(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number, lengths in enumerate(((3, 1, 2), (1, 4, 1, 2))):
        captions = [rng.standard_normal((length, 4)).astype(np.float32) for length in lengths]
        write_text(folder / "text" / f"{number}.safetensors", captions, encoder="toy")


def _read_text(folder: Path) -> tuple[str, str]:
    text = TextStore(folder / "text")
    text.check_tokens(TokenStore(made("store") / "store"))
    text.verify()
    return digest(text.features(np.arange(len(text)), 3), text.lengths), text.encoder


def _make_llamagen_tokens(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, shape, high in (("codes", (1, 2, 9), 11), ("labels", (1,), 3)):
        (folder / name).mkdir()
        for number in range(4):
            np.save(folder / name / f"{number}.npy", rng.integers(0, high, shape))


def _read_llamagen_tokens(folder: Path) -> str:
    store = import_tokens(folder / "codes", folder / "labels", folder / "out", vocab_size=11, max_skipped=0)
    return digest(store.codes(np.arange(len(store)), np.tile([0, 1], (len(store), 1))), store.labels)


CENTRE = Crops(kind="center", size=6, range=1.0)


def _make_unfinished_store(folder: Path) -> None:
    """As a job leaves it that was killed in its last shard; of eight images one could not be used."""
    source = random_source()

    def examples(start: int, stop: int = 5) -> Iterator[Example]:
        for index, example in zip(range(start, 8), source.examples(start), strict=False):
            if index == stop:
                raise KeyboardInterrupt
            yield example if index != 1 else Example(b"no image", 1, "broken")

    with contextlib.suppress(KeyboardInterrupt):
        _tokenize(replace(source, examples=examples), folder / "store")


def _tokenize(source: ImageSource, out: Path) -> TokenStore:
    return tokenize(source, random_tokenizer(), CENTRE, out, images_per_shard=2, max_skipped=0.5)


def _read_unfinished_store(folder: Path) -> str:
    store = _tokenize(random_source(), folder / "store")
    store.verify()
    return digest(store.codes(np.arange(len(store)), np.zeros((len(store), 1), int)), store.labels)


def _is_made_again(damage: Damage) -> bool:
    """A shard without its end is made again, of the images as they are now: the broken one has been mended."""
    return damage.kind == "delete" and Path(damage.file).name.startswith(("labels", "sums"))


# Models and tokenizers

INFO = {"step": 7, "preset": "toy", "class_names": ["ant", "bee", "cow"], "tokenizer": "abc", "class_dropout": 0.1}


def _make_export(folder: Path) -> None:
    save_export(folder / "export", random_model(TINY, 0), random_model(TINY, 1), INFO)


def _work(model: Transformer) -> str:
    tokens, labels = random_sequences(TINY, 2)
    with torch.no_grad():
        logits = model(tokens[:, :-1], labels).logits
    return digest(logits, generate(model, torch.tensor([0, 2]), seed=0))


def _read_export(folder: Path) -> list[str]:
    return [_work(open_model(folder / "export", ema=ema)[0]) for ema in (False, True)]


def _make_llamagen(folder: Path) -> None:
    torch.save({"model": random_model().state_dict(), "steps": 3}, folder / "theirs.pt")


def _read_llamagen(folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(HEADS, (TINY.dim, TINY.n_layers), TINY.n_heads)
        return _work(open_model(folder / "theirs.pt", grid=3)[0])


def _make_kmeans(folder: Path) -> None:
    random_tokenizer().save(folder / "tokenizer")


def _make_vq(folder: Path) -> None:
    VQTokenizer(SMALL, random_tensors()).save(folder / "tokenizer")


def _read_tokenizer(folder: Path) -> str:
    tokenizer = load_tokenizer(folder / "tokenizer")
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(images)
    return digest(codes, tokenizer.decode(codes % tokenizer.vocab_size))


# Runs

RUN = TrainConfig(
    model=replace(STORED, dim=8, n_heads=1),
    optim=OptimConfig(lr=1e-2),
    steps=2,
    batch_size=4,
    log_every=1,
    checkpoint_every=1,
    keep=1,
    dtype="float32",
    device="cpu",
)


def _make_run(folder: Path) -> None:
    _make_store(folder)
    train(RUN, folder / "store", folder / "run")
    (folder / "store").rename(folder.with_name(f"{folder.name}-store"))


def _read_run(folder: Path) -> str:
    """A step more; the store lies where `made` keeps it."""
    train(replace(RUN, steps=3), made("run").with_name(f"{made('run').name}-store"), folder / "run", resume=True)
    return digest(*(value for _, value in sorted(open_model(folder / "run")[0].state_dict().items())))


def _is_legal_run(damage: Damage) -> bool:
    return "checkpoints" in damage.file and not CHECKPOINTS_ARE_SEALED


# Pictures


def _make_pictures(folder: Path) -> None:
    for number, picture in enumerate(pictures(3, size=16)):
        place = folder / "images" / f"class {number}"
        place.mkdir(parents=True)
        for suffix in ("png", "jpg", "webp"):
            Image.fromarray(picture).save(place / f"{number}.{suffix}")
    grey = pictures(1, seed=1, size=16)[0]
    Image.fromarray(grey).quantize(16).save(folder / "images" / "class 0" / "palette.png")
    Image.fromarray(grey[..., 0]).save(folder / "images" / "class 1" / "grey.png")


def _read_pictures(folder: Path) -> str:
    source = open_images(f"folder:{folder / 'images'}")
    crops = Crops(kind="center", size=16, range=1.0)
    store = tokenize(source, random_tokenizer(), crops, folder / "tokens", max_skipped=0)
    return digest(*(np.asarray(example.read()) for example in source.examples(0)), store.labels)


def _is_legal_picture(damage: Damage) -> bool:
    """JPEG and WebP have no checksums, and which files are in the folder is the user's to say."""
    return not damage.file.endswith(".png") or damage.is_consistent or damage.kind in ("delete", "folder")


def _make_samples(folder: Path) -> None:
    images = pictures(8)
    np.savez(folder / "samples.npz", arr_0=images, arr_1=np.arange(8) % 3)
    settings = {"cfg_scale": 1.5, "temperature": 1.0, "seed": 0}
    weights = {"file": "model.safetensors", "sha256": "abcd", "ema": False, "step": 3}
    labels = (np.arange(8) % 3).tolist()
    write_json(folder / "samples.json", {"settings": settings, "weights": weights, "labels": labels})


@cache
def _reference() -> Reference:
    return open_reference(str(made("reference") / "reference.npz"), toy(), METRICS, Compute())


METRICS: list[Metric] = ["fid", "sfid", "is", "kid", "precision", "recall", "density", "coverage"]


def _read_samples(folder: Path) -> tuple[str, dict[str, float]]:
    samples = open_set(str(folder / "samples.npz"))
    result = evaluate(samples, _reference(), toy(), METRICS, Compute())
    one_line(result)
    return result["samples"]["sha256"], result["metrics"]


class _Drawn(SampleWriter):
    """A job of eight pictures in parts of three."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, 8, {"settings": {"seed": 0}, "labels": [0] * 8}, 3)

    def draw(self, parts: int) -> None:
        for part in range(parts):
            if not self.is_finished(part):
                self.write(part, pictures(8)[self.numbers(part).start : self.numbers(part).stop])


def _make_unfinished_samples(folder: Path) -> None:
    _Drawn(folder / "samples.npz").draw(2)


def _read_unfinished_samples(folder: Path) -> str:
    job = _Drawn(folder / "samples.npz")
    job.draw(3)
    job.finish([0] * 8)
    samples = open_set(str(folder / "samples.npz"))
    return digest(*(pixels for _, pixels in samples.read(0, 1)))


def _make_png_samples(folder: Path) -> None:
    (folder / "samples").mkdir()
    for index, image in enumerate(pictures(4)):
        Image.fromarray(image).save(folder / "samples" / f"{index:06d}.png")
    write_json(folder / "samples" / "metadata.json", {"labels": [0, 1, 2, 0], "label_mode": "balanced"})


def _read_png_samples(folder: Path) -> Any:
    result = evaluate(open_set(str(folder / "samples")), _reference(), toy(), METRICS, Compute())
    one_line(result)
    return result["samples"]["sha256"], result["metrics"]


def _make_reference(folder: Path) -> None:
    np.savez(folder / "images.npz", arr_0=pictures(20))
    write_reference(open_set(str(folder / "images.npz")), folder / "reference.npz", toy(), Compute())
    (folder / "images.npz").unlink()


def _read_reference(folder: Path) -> tuple[str, dict[str, float]]:
    reference = open_reference(str(folder / "reference.npz"), toy(), METRICS, Compute())
    result = evaluate(open_set(str(made("samples") / "samples.npz")), reference, toy(), METRICS, Compute())
    one_line(result)
    return reference.content, result["metrics"]


# Results that later verbs read


def _make_cache(folder: Path) -> None:
    _read_cache(folder)


def _read_cache(folder: Path) -> str:
    cache = FeatureCache(folder / "cache", 1e9)
    store = TokenStore(made("store") / "store")
    found = extract_features(
        random_model(), store, FeatureSpec(layers=[1, 3], steps=[2, 9]), cache=cache, weights="abc"
    )
    return digest(*found.layers.values(), found.labels)


def _make_sweep(folder: Path) -> None:
    _read_sweep(folder)


def _read_sweep(folder: Path) -> Any:
    line, out = made("line"), folder / "sweep"
    swept = SweptModel(line / "model", line / "tokenizer", out / "samples", num=4, batch_size=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "st_ar.evaluation.generation.sweep.line_chart", lambda *_, **__: _Drawing()
        )  # slow, and not what is looked at
        rows = sweep(swept, list_settings([1.0], [1.0], [0, 2]), _small_reference(), toy(), ["fid"], out, Compute())
    return [row["metrics"] for row in rows]


class _Drawing:
    def save(self, path: Path) -> None:
        path.touch()


@cache
def _small_reference() -> Reference:
    images = made("line") / "reference.npz"
    return open_reference(str(images), toy(), ["fid"], Compute())


def _make_line(folder: Path) -> None:
    make_line(folder)
    np.savez(folder / "reference.npz", arr_0=pictures(20, size=6))


def _make_results(folder: Path) -> None:
    write_json(folder / "evaluation.json", {"metrics": {"FID": 3.5, "IS": 20.0, "recall": 0.5}, "notes": []})
    write_json(folder / "probe.json", {"results": [{"steps": [2, 9], "top1": [0.25, 0.5], "layer": 2}]})
    write_json(folder / "run" / "config.json", {"format_version": 1, "config": to_dict(RUN)})
    lines = [json.dumps({"step": step, "tokens_per_second": 100.0 + step}) + "\n" for step in (1, 2, 3)]
    (folder / "run" / "log.jsonl").write_text("".join(lines))


def _read_results(folder: Path) -> Any:
    results = {("evaluate", "live"): [folder / "evaluation.json"], ("probe", "live"): [folder / "probe.json"]}
    files = Files(runs=[folder / "run"], results=results)
    found = measurements(files, ["fid", "is", "recall"])
    steps, top1 = probe_curve(folder / "probe.json")
    assert len(steps) == len(top1)
    for value in [*steps, *top1, *(value for spread in found.values() for value in spread.values)]:
        assert isinstance(value, int | float), value
    return {name: spread.text(2) for name, spread in found.items()}


TARGETS = {
    "store": Target(_make_store, _read_store),
    "text": Target(_make_text, _read_text, lambda damage: damage.kind == "swap"),
    "unfinished-store": Target(_make_unfinished_store, _read_unfinished_store, _is_made_again),
    "llamagen-tokens": Target(_make_llamagen_tokens, _read_llamagen_tokens, lambda damage: True),
    "export": Target(_make_export, _read_export),
    "llamagen": Target(_make_llamagen, _read_llamagen, lambda damage: damage.is_consistent),
    "kmeans": Target(_make_kmeans, _read_tokenizer),
    "vq": Target(_make_vq, _read_tokenizer),
    "run": Target(_make_run, _read_run, _is_legal_run),
    "pictures": Target(_make_pictures, _read_pictures, _is_legal_picture),
    "samples": Target(_make_samples, _read_samples, lambda damage: damage.is_consistent),
    "unfinished-samples": Target(_make_unfinished_samples, _read_unfinished_samples),
    "png-samples": Target(_make_png_samples, _read_png_samples, _is_legal_picture),
    "reference": Target(_make_reference, _read_reference, lambda damage: damage.is_consistent),
    "cache": Target(_make_cache, _read_cache),
    "sweep": Target(_make_sweep, _read_sweep, lambda damage: True),
    "results": Target(_make_results, _read_results, lambda damage: True),
}
LINE = Target(_make_line, lambda folder: None)
_made: dict[str, Path] = {}
_place: list[Path] = []


def keep_in(folder: Path) -> None:
    """Where `made` puts what it makes."""
    _place[:] = [folder]
    _made.clear()


def made(name: str) -> Path:
    """The undamaged artefact, made once."""
    if name not in _made:
        folder = _place[0] / name
        folder.mkdir()
        (LINE if name == "line" else TARGETS[name]).make(folder)
        _made[name] = folder
    return _made[name]
