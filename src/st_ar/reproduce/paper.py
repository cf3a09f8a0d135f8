"""The rows of the paper's tables and figures with their numbers (arXiv 2509.15185; class-conditional ImageNet, 256 px), and scales."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from st_ar.config import RunConfig, TrainConfig
from st_ar.presets import get_preset
from st_ar.settings import differences, to_dict

Size = Literal["B", "L", "XL"]
Name = Literal[
    "table1",
    "table2",
    "table3",
    "table4",
    "table5",
    "table6",
    "fig1",
    "fig2",
    "fig4",
    "fig5",
    "questions",
    "cheaper",
    "remedies",
    "evidence",
    "length",
    "classes",
]

DEPTH = 12
"""Layers of B. Table 5's contrast layers count these."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run: model size, length, and changes to the paper's self-guidance."""

    size: Size = "B"
    epochs: int = 50
    guided: bool = True
    views: int | None = None
    """Views of each image; None for the method's (1 for AR, 2 for ST-AR)."""
    contrast: float | None = None
    """Depth of the contrast layer as a share of the layers; None for the preset's."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of self-guidance (SelfGuidedConfig) that differ from the preset's."""
    accumulate: int = 1
    """Micro-batches of a step."""
    centered: bool = False
    """Train only on the centre crops and their mirror images, not on ten crops."""
    equal_time: Literal["", "ST-AR", "contrast", "contrast-every-2"] = ""
    """Match the training time, not the steps, of this form of self-guidance (EQUAL_TIMES) at this size and length."""
    keeps: bool = False
    """Keep the weights after each quarter of the run."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table or a curve of a figure."""

    label: str
    recipe: Recipe
    paper: Mapping[str, float] = field(default_factory=dict)
    """The paper's numbers by column; empty for a row that the paper does not have."""
    quarter: int = 4
    """Number of quarters of the run after which the weights are measured; 4 is its end."""
    method: str = ""
    """The row's curve in a figure over the length of training."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or a figure of the paper."""

    title: str
    rows: tuple[Row, ...]
    metrics: tuple[str, ...] = ()
    """Columns: fid, sfid, is, precision, recall, probe, attention, classes."""
    guidance: bool = False
    """Sample with each size's published guidance scale."""
    figure: Literal["", "understanding", "attention", "probe", "length"] = ""
    depths: tuple[float, ...] = ()
    """Depths of the attention maps as shares of the layers; half the depth if empty."""


QUARTERS = (0.25, 0.5, 0.75, 1.0)
ADM = ("fid", "sfid", "is", "precision", "recall")
CONTRAST: dict[str, Any] = {"alpha": 0.0, "mask_ratio": 0.0}
EQUAL_TIMES: dict[str, dict[str, Any]] = {
    "ST-AR": {},
    "contrast": CONTRAST,
    "contrast-every-2": CONTRAST | {"every": 2},
}
"""Changes to the paper's self-guidance, by Recipe.equal_time."""
AR_ONCE = Recipe(guided=False, views=1)
CONTROL = Row(label="AR, 2 views (control)", recipe=Recipe(guided=False, views=2))
EQUAL_TIME = Row(label="AR, 2 views, for the time of ST-AR", recipe=Recipe(guided=False, views=2, equal_time="ST-AR"))


def _row(size: Size, epochs: int, guided: bool, *paper: float) -> Row:
    """Return a row of Table 1 or 2. `paper` begins the columns of ADM."""
    name = f"{'ST-AR' if guided else 'LlamaGen'}-{size}, {epochs} epochs"
    recipe = Recipe(size=size, epochs=epochs, guided=guided, views=None if guided else 1)
    return Row(label=name, recipe=recipe, paper=dict(zip(ADM, paper, strict=False)))


def _ablated(
    label: str, paper: Mapping[str, float] | None = None, contrast: float | None = None, **changes: Any
) -> Row:
    return Row(label=label, recipe=Recipe(contrast=contrast, changes=changes), paper=paper or {})


def _contrast(variant: str = "", contrast: float | None = None, **changes: Any) -> Row:
    return _ablated(f"contrast alone, nothing masked{variant}", None, contrast, **CONTRAST, **changes)


def _quarters(method: str, recipe: Recipe) -> tuple[Row, ...]:
    """Return a row for each quarter of one run."""
    kept = replace(recipe, keeps=True)
    return tuple(
        Row(label=f"{method}, after {quarter}/4", recipe=kept, quarter=quarter, method=method)
        for quarter in range(1, 5)
    )


EXPERIMENTS: dict[Name, Experiment] = {
    "table1": Experiment(
        title="Table 1: without guidance",
        rows=(
            _row("B", 50, False, 31.35, 8.75, 39.58, 0.57, 0.61),
            _row("B", 50, True, 26.58, 7.70, 49.91, 0.60, 0.62),
            _row("B", 300, False, 26.26, 9.22, 48.07, 0.59, 0.62),
            _row("B", 300, True, 18.44, 6.71, 66.18, 0.64, 0.62),
            _row("L", 50, False, 21.81, 8.77, 59.18, 0.62, 0.64),
            _row("L", 50, True, 12.59, 6.79, 91.19, 0.65, 0.64),
            _row("L", 300, False, 13.45, 8.32, 82.29, 0.66, 0.64),
            _row("L", 300, True, 9.38, 6.64, 112.71, 0.70, 0.65),
            _row("XL", 50, False, 19.42, 8.91, 66.20, 0.61, 0.67),
            _row("XL", 50, True, 9.81, 6.94, 109.77, 0.71, 0.63),
            _row("XL", 300, True, 6.20, 6.47, 147.47, 0.73, 0.65),
        ),
        metrics=ADM,
    ),
    "table2": Experiment(
        title="Table 2: with classifier-free guidance",
        rows=(
            _row("B", 300, False, 5.46),
            _row("B", 300, True, 4.09),
            _row("L", 300, False, 3.81),
            _row("L", 300, True, 2.98),
            _row("XL", 50, False, 3.39),
            _row("XL", 50, True, 2.72),
            _row("XL", 300, True, 2.37),
        ),
        metrics=ADM,
        guidance=True,
    ),
    "table3": Experiment(
        title="Table 3: the losses",
        rows=(
            Row(label="AR, 1 view", recipe=AR_ONCE, paper={"fid": 31.35, "probe": 18.68}),
            CONTROL,
            EQUAL_TIME,
            _ablated("+ MIM", {"fid": 30.58, "probe": 22.71}, beta=0.0),
            _ablated("+ MIM + step", {"fid": 28.02, "probe": 27.73}, view_loss=False),
            _ablated("+ MIM + view", {"fid": 27.78, "probe": 38.31}, step_loss=False),
            _ablated("+ MIM + step + view (ST-AR)", {"fid": 26.58, "probe": 45.27}),
        ),
        metrics=("fid", "probe"),
    ),
    "table4": Experiment(
        title="Table 4: the mask ratio r",
        rows=tuple(
            _ablated(f"r = {ratio}", {"fid": fid}, **({} if ratio == 0.25 else {"mask_ratio": ratio}))
            for ratio, fid in ((0.15, 28.62), (0.25, 26.58), (0.35, 26.36), (0.45, 27.50))
        ),
        metrics=("fid", "probe"),
    ),
    "table5": Experiment(
        title="Table 5: the depth of the contrast",
        rows=tuple(
            _ablated(f"layer {layer} of {DEPTH}", {"fid": fid}, contrast=None if layer == 6 else layer / DEPTH)
            for layer, fid in ((3, 27.34), (6, 26.58), (9, 28.76), (12, 29.45))
        ),
        metrics=("fid", "probe"),
    ),
    "table6": Experiment(
        title="Table 6: the positions K",
        rows=tuple(
            _ablated(f"K = {count}", {"fid": fid}, **({} if count == 4 else {"positions": count}))
            for count, fid in ((2, 27.50), (4, 26.58), (8, 26.54), (16, 25.78))
        ),
        metrics=("fid", "probe"),
    ),
    "fig1": Experiment(
        title="Figure 1: what plain autoregressive training learns",
        rows=(Row(label="AR, 1 view", recipe=AR_ONCE),),
        figure="understanding",
        depths=QUARTERS,
    ),
    "fig2": Experiment(
        title="Figure 2: attention of plain autoregressive training, by layer and step",
        rows=(Row(label="AR, 1 view", recipe=AR_ONCE),),
        figure="attention",
        depths=QUARTERS,
    ),
    "fig4": Experiment(
        title="Figure 4: linear probing over the steps",
        rows=(
            Row(label="AR, 1 view", recipe=AR_ONCE, paper={"probe": 18.68}),
            CONTROL,
            EQUAL_TIME,
            Row(label="ST-AR", recipe=Recipe(), paper={"probe": 45.27}),
        ),
        figure="probe",
    ),
    "fig5": Experiment(
        title="Figure 5: attention of the final layer with self-guided training",
        rows=(Row(label="AR, 1 view", recipe=AR_ONCE), Row(label="ST-AR", recipe=Recipe())),
        figure="attention",
        depths=(1.0,),
    ),
    "questions": Experiment(
        title="What the paper leaves open",
        rows=(
            Row(label="ST-AR, our defaults", recipe=Recipe()),
            CONTROL,
            _ablated("sum over pairs, as printed", reduction="sum"),
            _ablated("contrast temperature 0.1", temperature=0.1),
            _ablated("contrast temperature 0.5", temperature=0.5),
            Row(label="local negatives, 4 micro-batches", recipe=Recipe(changes={"negatives": "local"}, accumulate=4)),
            _ablated("projector of 2 layers", projector_depth=2),
            _ablated("projector 1024 wide", projector_hidden=1024),
            _ablated("own position visible", mask_own_position=False),
            _ablated("MIM after the final norm", mim_features="after_norm"),
            _ablated("EMA without warm-up", ema_warmup=False),
            _ablated("EMA decay 0.99", ema_decay=0.99),
            _ablated("EMA decay 0.9999", ema_decay=0.9999),
        ),
        metrics=("probe",),
    ),
    "cheaper": Experiment(
        title="Cheaper self-guidance",
        rows=(
            Row(label="ST-AR", recipe=Recipe()),
            CONTROL,
            _ablated("in every second step", every=2),
            _ablated("in the first half of the run", until=0.5),
            _ablated("in the first 80 % of the run", until=0.8),
            _ablated("half of the sequences masked", masked_share=0.5),
            _ablated("nothing masked", mask_ratio=0.0),
            _ablated("contrast alone", alpha=0.0),
            _contrast(),
            _contrast(", at a third of the depth", contrast=1 / 3),
            _contrast(", in every second step", every=2),
        ),
        metrics=("fid", "probe"),
    ),
    "remedies": Experiment(
        title="Weaker self-guidance",
        rows=(
            Row(label="ST-AR", recipe=Recipe()),
            CONTROL,
            _ablated("half of the sequences masked", masked_share=0.5),
            _ablated("a mask of r = 0.1", mask_ratio=0.1),
            _ablated("own position visible", mask_own_position=False),
            _ablated("a quarter of alpha and beta", alpha=0.25, beta=0.125),
            _ablated("contrast temperature 0.5", temperature=0.5),
            _ablated("contrast temperature 0.5, in the first 80 % of the run", temperature=0.5, until=0.8),
            _ablated("positions from the 17th on", first_position=16),
            _ablated("in the first half of the run", until=0.5),
            _ablated("in the first 80 % of the run", until=0.8),
            _contrast(),
            _contrast(", in the first half of the run", until=0.5),
            _contrast(", in the first 80 % of the run", until=0.8),
            _contrast(", at contrast temperature 0.5", temperature=0.5),
            _contrast(", at half the weight", beta=0.25),
        ),
        metrics=("fid", "precision", "recall", "probe"),
    ),
    "evidence": Experiment(
        title="Does self-guidance help?",
        rows=(
            Row(label="AR, 1 view, centre crops and their mirror images", recipe=replace(AR_ONCE, centered=True)),
            Row(
                label="+ step, 1 view, centre crops and their mirror images",  # which needs no second view
                recipe=Recipe(views=1, centered=True, changes=CONTRAST | {"view_loss": False}),
            ),
            CONTROL,
            EQUAL_TIME,
            _ablated("+ MIM", beta=0.0),
            _ablated("+ step", **CONTRAST, view_loss=False),
            _ablated("+ view", **CONTRAST, step_loss=False),
            _ablated("+ MIM + step", view_loss=False),
            _ablated("+ MIM + view", step_loss=False),
            _ablated("+ MIM + step + view (ST-AR)"),
        ),
        metrics=("fid", "precision", "recall", "probe", "attention"),
    ),
    "length": Experiment(
        title="When does self-guidance help?",
        rows=(
            *_quarters(CONTROL.label, CONTROL.recipe),
            *_quarters("ST-AR", Recipe()),
            *_quarters("contrast alone", Recipe(changes=CONTRAST)),
            *_quarters("inter-view contrast alone", Recipe(changes=CONTRAST | {"step_loss": False})),
        ),
        metrics=("fid", "precision", "recall", "probe"),
        figure="length",
    ),
    "classes": Experiment(
        title="Do samples show the class they were generated for?",
        rows=(
            CONTROL,
            Row(
                label="AR, 2 views, for the time of the contrast alone",
                recipe=Recipe(guided=False, views=2, equal_time="contrast"),
            ),
            Row(
                label="AR, 2 views, for the time of the contrast alone in every second step",
                recipe=Recipe(guided=False, views=2, equal_time="contrast-every-2"),
            ),
            EQUAL_TIME,
            _ablated("+ MIM", beta=0.0),
            _ablated("+ step", **CONTRAST, view_loss=False),
            _ablated("+ view", **CONTRAST, step_loss=False),
            _ablated("+ view, in every second step", **CONTRAST, step_loss=False, every=2),
            _contrast(),
            _contrast(", in every second step", every=2),
            _ablated("+ MIM + step", view_loss=False),
            _ablated("+ MIM + view", step_loss=False),
            _ablated("+ MIM + step + view (ST-AR)"),
            _ablated("half of the sequences masked", masked_share=0.5),
            _ablated("in the first 80 % of the run", until=0.8),
            _contrast(", in the first 80 % of the run", until=0.8),
        ),
        metrics=("classes", "probe"),
    ),
}


ScaleName = Literal["tiny", "small", "imagenet"]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A size of experiment: the presets, the data, and the options of its commands."""

    plain: str
    """Preset of AR at size B."""
    guided: str
    """Preset of ST-AR at size B."""
    shapes: Mapping[Size, Mapping[str, int]] = field(default_factory=dict)
    """Width, layers and heads of L and XL, where the preset is B's; empty for a preset per size."""
    images: str | None = None
    """Default source of the training images."""
    test_images: str | None = None
    tokenizer: tuple[str, ...] | None = None
    """Preset and options of the tokenizer to train; None if the user must give a tokenizer."""
    size: tuple[str, ...] = ()
    """Size option for other images than the default."""
    crops: tuple[str, ...] = ()
    """Crop options of `st-ar tokenize` for other training images than the default."""
    samples: tuple[str, ...] = ("--num", "1024")
    """Options of `st-ar sample` for the number of images."""
    extractor: str = "efficientnet"
    probe: tuple[str, ...] = ()
    features: float = 0.0
    """Maximum size of the probes' feature cache in bytes, for the disk estimate; 0 leaves it out."""
    image_count: int | None = None
    """Training images, if runs are counted in epochs."""
    sample_count: int = 1024
    """Number of samples, to estimate disk space."""
    side: int = 32

    def config(
        self,
        recipe: Recipe,
        seed: int,
        *,
        steps: int | None = None,
        stretch: float = 1.0,
        fit: Mapping[str, int] | None = None,
    ) -> tuple[str, TrainConfig]:
        """Return a recipe's preset and settings.

        Args:
            steps: optimizer steps of 50 epochs, by default the preset's; 300 epochs take six times as many.
            stretch: factor of the run's length.
            fit: model settings that the data or the tokenizer require (num_classes, vocab_size, grid).
        """
        name = self.guided if recipe.guided else self.plain
        if not self.shapes:
            name = name.removesuffix("-b") + f"-{recipe.size.lower()}"
        config = replace(get_preset(name), seed=seed)
        model = replace(config.model, **self.shapes.get(recipe.size, {}), **(fit or {}))
        if config.steps is not None:
            total = (steps or config.steps) * recipe.epochs / 50 * stretch
            config = replace(config, steps=max(1, round(total)))
        else:
            config = replace(config, epochs=recipe.epochs * stretch)
        guided = replace(config.selfguided, **recipe.changes)
        if recipe.contrast is not None:
            guided = replace(guided, contrast_layer=max(1, round(recipe.contrast * model.n_layers)))
        run = {"views": recipe.views or config.views, "accumulate": recipe.accumulate}
        return name, replace(config, model=model, selfguided=guided, **run)


_TINY = Scale(
    plain="llamagen-photos",
    guided="st-ar-photos",
    shapes={
        "L": {"dim": 192, "n_layers": 6, "n_heads": 6},
        "XL": {"dim": 256, "n_layers": 8, "n_heads": 8},
    },
    images="photos:train",
    test_images="photos:test",
    tokenizer=("kmeans",),
    size=("--size", "32"),
    crops=("--crop-range", "1.125"),
    probe=("--train-crops", "4"),
)
SCALES: dict[ScaleName, Scale] = {
    "tiny": _TINY,
    "small": replace(
        _TINY,
        plain="llamagen-cifar10",
        guided="st-ar-cifar10",
        shapes={
            "L": {"dim": 384, "n_layers": 8, "n_heads": 12},
            "XL": {"dim": 512, "n_layers": 12, "n_heads": 16},
        },
        images=None,
        test_images=None,
        tokenizer=("vq-cifar10",),
        samples=("--num", "10000"),
        sample_count=10_000,
    ),
    "imagenet": Scale(
        plain="llamagen-b",
        guided="st-ar-b",
        samples=("--per-class", "50"),
        sample_count=50_000,
        extractor="inception",
        probe=("--cache-dtype", "float16", "--cache-limit", "280"),  # all ten crops: 263 GB of XL's, 157 GB of B's
        features=280e9,
        image_count=1_281_167,
        side=256,
    ),
}


def options(preset: RunConfig, config: RunConfig) -> list[str]:
    """Return the options that turn a preset's settings into these."""
    arguments: list[str] = []
    for name, (_, value) in differences(to_dict(preset), to_dict(config)).items():
        group, _, last = name.rpartition(".")
        prefix, last = (f"{group}." if group else ""), last.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{prefix}{'' if value else 'no-'}{last}")
        elif value is not None:
            arguments += [f"--{prefix}{last}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def resized(recipe: Recipe, size: Size, name: str) -> Recipe:
    """Return a recipe at another size. Table 5's default of half the depth is not the preset's of L and XL."""
    contrast = 0.5 if name == "table5" and recipe.contrast is None else recipe.contrast
    return replace(recipe, size=size, contrast=contrast)
