"""At which size the paper is reproduced: as it is, or on a small data set with small models and a budget."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from st_ar.config import TrainConfig
from st_ar.presets import get_preset
from st_ar.reproduce.paper import Recipe, Size
from st_ar.settings import differences, to_dict

ScaleName = Literal["tiny", "small", "imagenet"]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How a recipe becomes settings, and a data set becomes tokens."""

    plain: str
    """Preset of AR at size B."""
    guided: str
    """Preset of ST-AR at size B."""
    shapes: Mapping[Size, Mapping[str, int]]
    """Width, layers and heads of each size, where they are not the preset's; empty: presets by size."""
    images: str | None
    """Image source of the training images, if the scale has one of its own."""
    test_images: str | None
    tokenizer: tuple[str, ...] | None
    """Preset and options of the tokenizer to train; none: one has to be given."""
    size: tuple[str, ...] = ()
    """Option that says how large images are that are not the scale's own, if not as their source has it."""
    crops: tuple[str, ...] = ()
    """Options of `st-ar tokenize` for the training images' crops, if the images are not the scale's own."""
    samples: tuple[str, ...] = ("--num", "1024")
    """Options of `st-ar sample` that say how many images."""
    extractor: str = "efficientnet"
    probe: tuple[str, ...] = ()
    """Options of `st-ar probe`."""
    features: float = 0.0
    """Bytes that the probes' features may take in their cache, where that is worth counting."""
    image_count: int | None = None
    """Training images, where the length of a run follows from them."""
    sample_count: int = 1024
    """How many images that makes, for the disk's sake."""
    side: int = 32
    """Pixels of an image's side."""

    def config(
        self,
        recipe: Recipe,
        seed: int,
        *,
        steps: int | None = None,
        stretch: float = 1.0,
        fit: Mapping[str, int] | None = None,
    ) -> tuple[str, TrainConfig]:
        """A recipe's preset and settings.

        Args:
            steps: optimizer steps of 50 epochs, if not the preset's; 300 epochs get six times as many.
            stretch: how many times as long the run is.
            fit: settings of the model that the data or the tokenizer ask for (num_classes, vocab_size, grid).
        """
        name = self.guided if recipe.guided else self.plain
        if not self.shapes:
            name = name.removesuffix("-b") + f"-{recipe.size.lower()}"
        config = replace(get_preset(name), seed=seed)
        model = replace(config.model, **self.shapes.get(recipe.size, {}), **(fit or {}))
        if config.steps is not None:
            whole = (steps or config.steps) * recipe.epochs / 50 * stretch
            config = replace(config, steps=max(1, round(whole)))
        else:
            config = replace(config, epochs=recipe.epochs * stretch)
        guided = replace(config.selfguided, **recipe.changes)
        if recipe.contrast is not None:
            guided = replace(guided, contrast_layer=max(1, round(recipe.contrast * model.n_layers)))
        run = {"views": recipe.views or config.views, "accumulate": recipe.accumulate}
        return name, replace(config, model=model, selfguided=guided, **run)


SCALES: dict[ScaleName, Scale] = {
    "tiny": Scale(
        plain="llamagen-photos",
        guided="st-ar-photos",
        shapes={
            "L": {"dim": 192, "n_layers": 6, "n_heads": 6},
            "XL": {"dim": 256, "n_layers": 8, "n_heads": 8},
            "B": {},
        },
        images="photos:train",
        test_images="photos:test",
        tokenizer=("kmeans",),
        size=("--size", "32"),
        crops=("--crop-range", "1.125"),
        probe=("--train-crops", "4"),
    ),
    "small": Scale(
        plain="llamagen-cifar10",
        guided="st-ar-cifar10",
        shapes={
            "L": {"dim": 384, "n_layers": 8, "n_heads": 12},
            "XL": {"dim": 512, "n_layers": 12, "n_heads": 16},
            "B": {},
        },
        images=None,
        test_images=None,
        tokenizer=("vq-cifar10",),
        size=("--size", "32"),
        crops=("--crop-range", "1.125"),
        samples=("--num", "10000"),
        sample_count=10_000,
        probe=("--train-crops", "4"),
    ),
    "imagenet": Scale(
        plain="llamagen-b",
        guided="st-ar-b",
        shapes={},
        images=None,
        test_images=None,
        tokenizer=None,
        samples=("--per-class", "50"),
        sample_count=50_000,
        extractor="inception",
        probe=("--cache-dtype", "float16", "--cache-limit", "280"),  # all ten crops: 263 GB of XL's, 157 GB of B's
        features=280e9,
        image_count=1_281_167,
        side=256,
    ),
}


def options(preset: str, config: TrainConfig) -> list[str]:
    """What `st-ar train PRESET` must be given for these settings."""
    given: list[str] = []
    for name, (_, value) in differences(to_dict(get_preset(preset)), to_dict(config)).items():
        group, _, last = name.rpartition(".")
        prefix, last = (f"{group}." if group else ""), last.replace("_", "-")
        if isinstance(value, bool):
            given.append(f"--{prefix}{'' if value else 'no-'}{last}")
        elif value is not None:
            given += [f"--{prefix}{last}", *map(str, value if isinstance(value, list) else [value])]
    return given
