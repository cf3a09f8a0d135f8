"""The sampling job: classes or captions -> tokens -> pictures -> a file that says how they were made."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from st_ar.config import ModelConfig
from st_ar.data.text import TextStore
from st_ar.errors import UserError
from st_ar.files import require_absent, sha256, write_json, written_aside
from st_ar.hardware import describe
from st_ar.model.generate import generate
from st_ar.model.transformer import Transformer
from st_ar.model.weights import ModelInfo
from st_ar.progress import progress
from st_ar.randomness import Purpose, torch_seed
from st_ar.tokenizer import Tokenizer, to_uint8


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How tokens are drawn; see `st_ar.generate`."""

    cfg_scale: float = 1.0
    """Classifier-free guidance scale; 1 is none."""
    cfg_interval: int = -1
    """Guide only the first token and this many decode steps + 1; -1 guides all."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together hold more than p; 1 for all."""
    seed: int = 0
    """Seed of the choice of classes or captions, and of the draws."""
    batch_size: int = 256
    """Images drawn at once; with another size the same seed gives other images."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {self.batch_size}")
        if self.seed < 0:
            raise UserError(f"--seed must be 0 or more, not {self.seed}")


def sample_images(
    model: Transformer,
    tokenizer: Tokenizer,
    labels: Sequence[int],
    settings: SampleSettings | None = None,
    text: TextStore | None = None,
) -> np.ndarray:
    """Draw an image for each label: uint8 [images, H, W, 3].

    Args:
        labels: classes; for a text model, indices of the captions in `text`.
        text: the captions, for a text model and no other.

    Raises:
        UserError: a label or a setting out of range, captions missing or not wanted, or a tokenizer with another codebook
            than the model's.
    """
    settings = settings or SampleSettings()
    config = model.config
    if not labels:
        raise UserError("no labels were given: each image needs one")
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} codes, the model {config.vocab_size}: give the model's own tokenizer"
        )
    if (config.condition == "text") != (text is not None):
        raise UserError(
            f"the model is drawn for {config.condition_name}: captions are for text models, which need them"
        )
    device = model.output.weight.device
    how = {k: v for k, v in asdict(settings).items() if k not in ("seed", "batch_size")}
    pictures: list[np.ndarray] = []
    with progress("sample", len(labels), unit="images") as bar:
        for start in range(0, len(labels), settings.batch_size):
            some = labels[start : start + settings.batch_size]
            chunk = torch.tensor(some) if text is None else text.features(np.array(some), config.text_tokens)
            tokens = generate(model, chunk.to(device), seed=torch_seed(settings.seed, Purpose.SAMPLING, start), **how)
            images = tokenizer.decode(tokens.unflatten(1, (config.grid, config.grid)).cpu())
            pictures.append(to_uint8(images).numpy())
            bar.advance(len(chunk))
    return np.concatenate(pictures)


def choose_labels(
    num: int, num_classes: int, seed: int, *, mode: Literal["balanced", "random"], only: Sequence[int] = ()
) -> list[int]:
    """Labels of `num` images: in turn over the classes (or those of `only`), or drawn at random from them.

    Raises:
        UserError: no images, or a class that the model does not know.
    """
    if num < 1:
        raise UserError(f"--num must be at least 1, not {num}")
    if wrong := [label for label in only if not 0 <= label < num_classes]:
        raise UserError(f"--labels {wrong[0]} is out of range: the model knows classes 0 to {num_classes - 1}")
    classes = np.array(only or range(num_classes))
    if mode == "random":
        return np.random.default_rng([seed, Purpose.SAMPLING]).choice(classes, num).tolist()
    return np.resize(classes, num).tolist()


def choose_conditions(
    config: ModelConfig,
    text: TextStore | None,
    num: int | None,
    seed: int,
    *,
    mode: Literal["balanced", "random"],
    labels: Sequence[int] = (),
) -> list[int]:
    """What `num` images are drawn for: classes (64 if None), or indices of a text model's captions (each one if None).

    Raises:
        UserError: as `choose_labels`; or classes asked of a text model.
    """
    if text is None:
        return choose_labels(64 if num is None else num, config.num_classes, seed, mode=mode, only=labels)
    if labels:
        raise UserError(
            "--labels are classes, and this model is drawn for captions: leave them out; --text says what to draw"
        )
    return choose_labels(len(text) if num is None else num, len(text), seed, mode=mode)


def check_output(out: Path) -> None:
    """Refuse, before any work, an --out that is neither a new .npz file nor a new folder."""
    if out.suffix and out.suffix != ".npz":
        raise UserError(f"--out {out}: samples are written to a .npz file or to a folder of PNGs, not to {out.suffix}")
    require_absent(out, "a set of samples")
    if out.suffix:
        require_absent(out.with_suffix(".json"), "a set of samples' metadata")


def save_samples(
    out: Path,
    images: np.ndarray,
    labels: Sequence[int],
    settings: SampleSettings,
    info: ModelInfo,
    tokenizer: Tokenizer,
    text: TextStore | None = None,
) -> None:
    """Write a .npz in ADM's layout (arr_0 images, arr_1 labels) or a folder of PNGs, with metadata that says how they were made.

    `labels` and `text` are those of `sample_images`.
    """
    drawn_for = {"labels": list(labels)}
    if text is not None:
        drawn_for = {"captions": list(labels), "text": {"encoder": text.encoder, "fingerprint": text.fingerprint}}
    metadata = {
        "images": len(images),
        "weights": {"file": info.source.name, "sha256": sha256(info.source), "ema": info.ema, "step": info.step},
        "tokenizer": tokenizer.fingerprint,
        "settings": asdict(settings),
        **drawn_for,
        "environment": describe(),
    }
    if out.suffix == ".npz":
        with written_aside(out) as aside, open(aside, "wb") as file:
            np.savez(file, arr_0=images, arr_1=np.array(labels, np.int64))
        write_json(out.with_suffix(".json"), metadata)
        return
    for index, image in enumerate(images):
        with written_aside(out / f"{index:06d}.png") as aside:
            Image.fromarray(image).save(aside, format="PNG")
    write_json(out / "metadata.json", metadata)
