"""Sampling: classes or captions -> tokens -> pictures, in memory or as files that say how they were made."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.data.text import TextStore
from st_ar.distributed import Ranks
from st_ar.errors import UserError
from st_ar.files import sha256
from st_ar.hardware import Beside, choose_device, choose_dtype, local_device, require_compiler
from st_ar.model.generate import TokenSampler
from st_ar.model.transformer import Transformer
from st_ar.model.weights import ModelInfo, open_model
from st_ar.progress import Pace, progress
from st_ar.randomness import Purpose, torch_seed
from st_ar.sample_config import SampleSettings
from st_ar.sample_job import SampleJob
from st_ar.tokenizer import Tokenizer, paint, place_tokenizer

PICTURES_AT_ONCE = 16
MOST = 10_000_000
"""Images of a job: more are a mistake."""


def sample_images(
    model: Transformer,
    tokenizer: Tokenizer,
    labels: Sequence[int],
    settings: SampleSettings | None = None,
    text: TextStore | None = None,
    *,
    batch_size: int = 256,
) -> np.ndarray:
    """Draw an image for each label: uint8 [images, H, W, 3]. Image n depends on the seed, n and its label alone.

    Args:
        labels: classes; for a text model, indices of the captions in `text`.
        text: the captions, for a text model and no other.
        batch_size: images drawn at once.

    Raises:
        UserError: a label or a setting out of range, captions missing or not wanted, or a tokenizer with another codebook
            than the model's.
    """
    sampler = Sampler(model, tokenizer, settings or SampleSettings(), text)
    sampler.check(labels, batch_size)
    with progress("sample", len(labels), unit="images") as bar:
        pictures: list[np.ndarray] = []
        for start in range(0, len(labels), batch_size):
            numbers = range(start, min(start + batch_size, len(labels)))
            pictures.append(sampler.pictures(sampler.tokens(numbers, labels, bar.advance)))
    return np.concatenate(pictures)


def open_model_and_tokenizer(
    model: Path,
    tokenizer: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    ema: bool = False,
    grid: int | None = None,
) -> tuple[Transformer, ModelInfo, Tokenizer]:
    """Load both and put them where they compute; `dtype`, of the model alone, as for `choose_dtype`.

    Raises:
        UserError: either is missing or damaged, they do not belong together, or there is no such device.
    """
    place = local_device(choose_device(device))
    network, info = open_model(model, ema=ema, grid=grid)
    painter = place_tokenizer(tokenizer, device, "float32")
    require_own_tokenizer(info, model, painter, tokenizer)
    return network.to(place, choose_dtype(dtype, place)), info, painter


def require_own_tokenizer(info: ModelInfo, model: Path, painter: Tokenizer, tokenizer: Path) -> None:
    """Refuse a tokenizer that a model was not trained with; `model` and `tokenizer` are where the two are from."""
    if info.tokenizer and painter.fingerprint != info.tokenizer:
        raise UserError(
            f"{model} speaks the codes of tokenizer {info.tokenizer[:12]}, {tokenizer} is {painter.fingerprint[:12]}: "
            "give the tokenizer that made the model's token store"
        )


class Sampler:
    """A model, its tokenizer and how to draw from them; `compiled` as for `Decoder`."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        settings: SampleSettings,
        text: TextStore | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        config = model.config
        if tokenizer.vocab_size != config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} codes, the model {config.vocab_size}: give the model's own tokenizer"
            )
        if (config.condition == "text") != (text is not None):
            raise UserError(
                f"the model is drawn for {config.condition_name}: captions are for text models, which need them"
            )
        self.model, self.tokenizer, self.settings, self.text = model, tokenizer, settings.resolved(config), text
        self.device, self.compiled = model.output.weight.device, compiled
        if compiled:
            require_compiler(self.device)
        self.seed = torch_seed(settings.seed, Purpose.SAMPLING)
        self.drawer: tuple[int, TokenSampler] | None = None

    def check(self, labels: Sequence[int], batch_size: int) -> None:
        """Refuse what could not be drawn, before anything is."""
        if not labels:
            raise UserError("no labels were given: each image needs one")
        if batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {batch_size}")
        if batch_size > MOST:
            raise UserError(f"--batch-size must be at most {MOST}, not {batch_size}")
        self._conditions([min(labels), max(labels)])

    def _conditions(self, labels: Sequence[int]) -> Tensor:
        if self.text is not None:
            return self.text.features(np.array(labels), self.model.config.text_tokens)
        conditions = torch.tensor(labels)
        self.model.cls_embedding.check(conditions)
        return conditions

    def tokens(
        self, numbers: Sequence[int], labels: Sequence[int], advance: Callable[[int], None] | None = None
    ) -> Tensor:
        """Tokens int64 [n, T] of the images with these numbers, of a job whose labels are given.

        advance: called after each token with how many images more that makes.
        """
        count, length = len(numbers), self.model.config.sequence_length
        tokens = torch.empty(0)
        for tokens in self.steps(numbers, labels):
            if advance:
                drawn = tokens.shape[1]
                advance(count * drawn // length - count * (drawn - 1) // length)
        return tokens.clone()

    def steps(self, numbers: Sequence[int], labels: Sequence[int]) -> Generator[Tensor, None, None]:
        """What `tokens` does, token by token: the tokens so far [n, 1], [n, 2] .. [n, T], a view of memory that is written on.

        It may be left at any token, and is over when other images are drawn.
        """
        count = len(numbers)
        conditions = self._conditions([labels[number] for number in numbers]).to(self.device)
        if self.drawer is None or self.drawer[0] != count:
            self.drawer = None  # its memory makes room for the next
            self.drawer = count, TokenSampler(self.model, count, self.settings, compiled=self.compiled)
        drawer = self.drawer[1]
        for drawn in drawer.steps(conditions, np.array(numbers), self.seed):
            yield drawer.tokens[:, :drawn]

    def pictures(self, tokens: Tensor, on_some: Callable[[], None] | None = None) -> np.ndarray:
        """Tokens [n, T] -> uint8 [n, H, W, 3]; a few at a time, since a VQ network needs much memory for each."""
        pictures: list[np.ndarray] = []
        for some in tokens.split(PICTURES_AT_ONCE):
            pictures.append(paint(self.tokenizer, some))
            if on_some:
                on_some()
        return np.concatenate(pictures)


def sample_to(
    out: Path,
    sampler: Sampler,
    labels: Sequence[int],
    info: ModelInfo,
    *,
    label_mode: str = "balanced",
    batch_size: int = 256,
    ranks: Ranks | None = None,
) -> None:
    """Draw an image for each label into a .npz file (ADM's layout: arr_0 images, arr_1 labels) or a folder of PNGs.

    metadata.json, or the .json beside the .npz, says how they were made. Ranks take parts in turn and meet in the files.

    Raises:
        UserError: as `sample_images` and `SampleJob`, or a full disk.
    """
    sampler.check(labels, batch_size)
    ranks, text = ranks or Ranks(), sampler.text
    record = {
        "weights": {"file": info.source.name, "sha256": sha256(info.source), "ema": info.ema, "step": info.step},
        "dtype": str(sampler.model.output.weight.dtype).removeprefix("torch."),
        "compiled": sampler.compiled,
        "tokenizer": sampler.tokenizer.fingerprint,
        "settings": asdict(sampler.settings),
        "label_mode": label_mode,
        **(
            {"labels": list(labels)}
            if text is None
            else {"captions": list(labels), "text": {"encoder": text.encoder, "fingerprint": text.fingerprint}}
        ),
    }
    job = SampleJob(out, len(labels), record, batch_size, ranks)
    mine = range(ranks.rank, job.parts, ranks.world)
    left = [part for part in mine if not job.is_finished(part)]
    total, todo = (sum(len(job.numbers(part)) for part in parts) for parts in (mine, left))
    pace = Pace("images")
    first = ranks.rank == 0
    with (
        progress("sample", total, unit="images", done=total - todo, shown=first) as bar,
        Beside(sampler.device) as beside,
    ):

        def advance(images: int) -> None:
            job.beat()
            pace.advance(bar, images)

        for part in left:
            tokens = sampler.tokens(job.numbers(part), labels, advance)
            beside.run(partial(_paint, job, sampler, part, tokens))
    if first:
        job.finish(labels)


def _paint(job: SampleJob, sampler: Sampler, part: int, tokens: Tensor) -> None:
    job.write(part, sampler.pictures(tokens, job.beat))


def choose_labels(
    num: int, num_classes: int, seed: int, *, mode: Literal["balanced", "random"], only: Sequence[int] = ()
) -> list[int]:
    """Labels of `num` images: in turn over the classes (or those of `only`), or drawn at random from them.

    Raises:
        UserError: no images, or a class that the model does not know.
    """
    if num < 1:
        raise UserError(f"--num must be at least 1, not {num}")
    if num > MOST:
        raise UserError(f"--num must be at most {MOST}, not {num}")
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
    per_class: int | None = None,
) -> list[int]:
    """What `num` images are drawn for: classes (64 if None), or indices of a text model's captions (each one if None).

    per_class: in place of `num`, so many of each class or caption.

    Raises:
        UserError: as `choose_labels`; classes asked of a text model; or `per_class` beside what contradicts it.
    """
    if per_class is not None:
        if num is not None:
            raise UserError("give --num or --per-class, not both")
        if mode == "random":
            raise UserError("--per-class takes the classes in turn: leave out --label-mode random, or give --num")
        if per_class < 1:
            raise UserError(f"--per-class must be at least 1, not {per_class}")
        labels = tuple(dict.fromkeys(labels))
        num = per_class * (len(text) if text is not None else len(labels) or config.num_classes)
    if text is None:
        return choose_labels(64 if num is None else num, config.num_classes, seed, mode=mode, only=labels)
    if labels:
        raise UserError(
            "--labels are classes, and this model is drawn for captions: leave them out; --text says what to draw"
        )
    return choose_labels(len(text) if num is None else num, len(text), seed, mode=mode)
