"""`st-ar attention`: what to draw and to average, the checks that it is there, and the work itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from st_ar.config import ModelConfig
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation.attention import (
    NO_MASKS,
    ImageMasks,
    LayerStatistics,
    attention_steps,
    average_statistics,
    center_crops,
    require_between,
)
from st_ar.evaluation.attention_report import Looked, write_curves, write_maps, write_page, write_statistics
from st_ar.evaluation.subjects import Subject, check_store, find_subjects
from st_ar.figures import require_matplotlib
from st_ar.files import folder_aside, require_absent, require_place
from st_ar.hardware import choose_device
from st_ar.report import require_reports
from st_ar.tokenizer import Tokenizer, paint, place_tokenizer


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What to draw and to average."""

    layers: tuple[int, ...] = ()
    """To draw, counted from 1; half the least depth if none are given."""
    heads: tuple[str, ...] = ("mean",)
    """To draw: mean, numbers counted from 1, or all."""
    steps: tuple[int, ...] = ()
    """Numbers of tokens read; those of `attention_steps` if none are given."""
    images: tuple[int, ...] = (0, 1, 2)
    """Of the store, to draw."""
    average: int = 256
    """Images to average over, evenly spaced in the store; all if it has fewer."""
    masks: ImageMasks = NO_MASKS

    def resolved(self, configs: Mapping[str, ModelConfig], store: TokenStore) -> "Chosen":
        """With every default and all written out, each value once; layers and steps ascending.

        Raises:
            UserError: a layer, head, step or image that is not there, or nothing to do.
        """
        length = store.meta.grid**2
        layers = self.layers or (max(1, min(config.n_layers for config in configs.values()) // 2),)
        heads = _heads(self.heads, max(config.n_heads for config in configs.values()))
        steps = self.steps or tuple(attention_steps(length))
        for name, config in configs.items():
            require_between("layer", layers, 1, config.n_layers, f"{name} has layers")
            numbers = [int(head) for head in heads if head != "mean"]
            require_between("head", numbers, 1, config.n_heads, f"{name} has heads")
        require_between("step", steps, 1, length - 1, "maps can be drawn after reading")
        require_between("image", self.images, 0, len(store) - 1, f"{store.folder} has images")
        if not heads or not self.images or self.average < 1:
            raise UserError("--heads, --images and --average must each ask for at least one")
        return replace(
            self,
            layers=tuple(sorted(set(layers))),
            heads=heads,
            steps=tuple(sorted(set(steps))),
            images=tuple(dict.fromkeys(self.images)),
            average=min(self.average, len(store)),
        )


def _heads(words: Sequence[str], most: int) -> tuple[str, ...]:
    heads: list[str] = []
    for word in words:
        if word == "all":
            heads += map(str, range(1, most + 1))
        elif word == "mean":
            heads.append(word)
        elif word.removeprefix("-").isdecimal():
            heads.append(str(int(word)))
        else:
            raise UserError(f"--heads {word!r} is no head: give mean, numbers counted from 1, or all")
    return tuple(dict.fromkeys(heads))


def report_attention(
    paths: Sequence[Path],
    tokens: Path,
    tokenizer: Path,
    out: Path,
    chosen: Chosen | None = None,
    *,
    names: Sequence[str] = (),
    ema: bool = False,
    device: str = "auto",
) -> dict[str, dict[int, LayerStatistics]]:
    """Look at models of one store: write maps, statistics and a page, attention.html, to the folder `out`.

    Args:
        paths: of models, as for `open_model`.
        tokens: the store whose centre crops are read.
        names: of the models; by default as `call_models` has it, with "(EMA)" for averaged weights.
        ema, device: of every model.

    Returns:
        The statistics by model and layer.

    Raises:
        UserError: files that do not belong together, a text model, names that do not tell the models apart, something out of
            range, or `out` exists.
    """
    require_absent(out, "a folder of attention maps")
    require_place(out)
    require_matplotlib()
    require_reports()
    subjects = find_subjects(paths, names, "ema" if ema else "live")
    for subject in subjects:
        subject.info.config.require_classes("st-ar attention")
    store, painter = _open_images(tokens, tokenizer, subjects, device)
    chosen = (chosen or Chosen()).resolved({subject.name: subject.info.config for subject in subjects}, store)
    place = choose_device(device)
    models = {subject.name: subject.open().to(place) for subject in subjects}
    averaged = [number * len(store) // chosen.average for number in range(chosen.average)]
    looked = Looked(
        subjects=subjects,
        models=models,
        store=store,
        statistics={
            name: average_statistics(model, store, averaged, masks=chosen.masks, name=name)
            for name, model in models.items()
        },
        averaged=chosen.average,
        masks=chosen.masks,
    )
    pictures = paint(painter, center_crops(store, chosen.images)[0])
    with folder_aside(out) as folder:
        write_statistics(folder, looked)
        maps = write_maps(
            folder, looked, pictures, images=chosen.images, layers=chosen.layers, heads=chosen.heads, steps=chosen.steps
        )
        write_page(folder, looked, maps, write_curves(folder, looked))
    return looked.statistics


def _open_images(
    tokens: Path, tokenizer: Path, subjects: Sequence[Subject], device: str
) -> tuple[TokenStore, Tokenizer]:
    """A store that every model can read, and its tokenizer."""
    store = TokenStore(tokens)
    for subject in subjects:
        try:
            check_store(subject.info, store)
        except UserError as error:
            raise UserError(f"{subject.name} cannot read the images: {error}") from error
    painter = place_tokenizer(tokenizer, device, "float32")
    if painter.fingerprint != store.meta.tokenizer:
        raise UserError(
            f"{tokens} was made by tokenizer {store.meta.tokenizer[:12]}, {tokenizer} is {painter.fingerprint[:12]}: "
            "give the tokenizer that made the store"
        )
    store.verify()
    return store, painter
