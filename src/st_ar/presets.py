"""Training presets: functions that derive from one another, collected in `PRESETS`."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import replace

from st_ar.config import ModelConfig, OptimConfig, SelfGuidedConfig, TrainConfig
from st_ar.errors import UserError

PRESETS: dict[str, Callable[[], TrainConfig]] = {}
"""Name on the command line -> function."""


def preset(function: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
    """Register a preset under its function's name, with hyphens."""
    PRESETS[function.__name__.replace("_", "-")] = function
    return function


def get_preset(name: str) -> TrainConfig:
    """Return a preset by name.

    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise unknown_preset(name, PRESETS)
    return PRESETS[name]()


def unknown_preset(name: str, presets: Iterable[str]) -> UserError:
    """Return the error for a name that is not a preset."""
    near = difflib.get_close_matches(name, presets := list(presets), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return UserError(f"unknown preset {name!r}: {hint}The presets are {', '.join(presets)}")


def self_guided(base: TrainConfig, contrast_layer: int | None) -> TrainConfig:
    """Add the paper's self-guidance to a plain preset: two views, r 0.25, alpha 1, beta 0.5, K 4."""
    return replace(base, views=2, selfguided=SelfGuidedConfig(contrast_layer=contrast_layer))


def _variant(name: str, base: Callable[[], TrainConfig], doc: str, **changes: object) -> None:
    """Register the preset `name`: `base` with changes to its self-guidance."""

    def build() -> TrainConfig:
        config = base()
        return replace(config, selfguided=replace(config.selfguided, **changes))

    build.__name__, build.__doc__ = name.replace("-", "_"), doc
    preset(build)


# LlamaGen's models at 256 px (arXiv 2406.06525), 300 epochs


@preset
def llamagen_b() -> TrainConfig:
    """LlamaGen-B, 111M parameters, class-conditional ImageNet at 256 px."""
    return TrainConfig(model=ModelConfig(dim=768, n_layers=12, n_heads=12), epochs=300)


@preset
def llamagen_l() -> TrainConfig:
    """LlamaGen-L, 343M parameters."""
    return replace(llamagen_b(), model=ModelConfig(dim=1024, n_layers=24, n_heads=16))


@preset
def llamagen_xl() -> TrainConfig:
    """LlamaGen-XL, 775M parameters."""
    return replace(llamagen_b(), model=ModelConfig(dim=1280, n_layers=36, n_heads=20))


@preset
def llamagen_xxl() -> TrainConfig:
    """LlamaGen-XXL, 1.4B parameters."""
    return replace(llamagen_b(), model=ModelConfig(dim=1536, n_layers=48, n_heads=24))


@preset
def llamagen_3b() -> TrainConfig:
    """LlamaGen-3B, 3.1B parameters."""
    return replace(llamagen_b(), model=ModelConfig(dim=3200, n_layers=24, n_heads=32))


@preset
def llamagen_xl_t2i() -> TrainConfig:
    """LlamaGen-XL for captions (120 x 2048 features), 775M parameters."""
    base = llamagen_xl()
    return replace(base, model=replace(base.model, condition="text"))


# ST-AR (arXiv 2509.15185)


@preset
def st_ar_b() -> TrainConfig:
    """ST-AR on LlamaGen-B, contrast at layer 6."""
    return self_guided(llamagen_b(), 6)


@preset
def st_ar_l() -> TrainConfig:
    """ST-AR on LlamaGen-L, contrast at layer 18."""
    return self_guided(llamagen_l(), 18)


@preset
def st_ar_xl() -> TrainConfig:
    """ST-AR on LlamaGen-XL, contrast at layer 18."""
    return self_guided(llamagen_xl(), 18)


@preset
def st_ar_xl_t2i() -> TrainConfig:
    """ST-AR on LlamaGen-XL for captions, contrast at layer 18."""
    return self_guided(llamagen_xl_t2i(), 18)


# The ablations of the paper's Tables 3 to 6: B, 50 epochs. Rows with the default settings are `st-ar-b-50`.


@preset
def llamagen_b_50() -> TrainConfig:
    """Table 3, no losses: LlamaGen-B for 50 epochs."""
    return replace(llamagen_b(), epochs=50)


@preset
def st_ar_b_50() -> TrainConfig:
    """Table 3, all losses; Table 4, mask ratio 0.25; Table 5, contrast at layer 6; Table 6, 4 positions."""
    return replace(st_ar_b(), epochs=50)


_variant("st-ar-b-50-mim", st_ar_b_50, "Table 3, MIM only.", beta=0.0)
_variant("st-ar-b-50-mim-step", st_ar_b_50, "Table 3, MIM and inter-step contrast.", view_loss=False)
_variant("st-ar-b-50-mim-view", st_ar_b_50, "Table 3, MIM and inter-view contrast.", step_loss=False)
for _percent in (15, 35, 45):
    _variant(f"st-ar-b-50-r{_percent}", st_ar_b_50, f"Table 4, mask ratio {_percent / 100}.", mask_ratio=_percent / 100)
for _layer in (3, 9, 12):
    _variant(f"st-ar-b-50-layer{_layer}", st_ar_b_50, f"Table 5, contrast at layer {_layer}.", contrast_layer=_layer)
for _positions in (2, 8, 16):
    _variant(f"st-ar-b-50-k{_positions}", st_ar_b_50, f"Table 6, {_positions} positions.", positions=_positions)


# The embedded photographs (32 px, 8 x 8 tokens of 256 codes): the models of quickstart, minutes on a CPU


@preset
def llamagen_photos() -> TrainConfig:
    """Embedded photographs, 1.1M parameters, no self-guidance; two views per image, as the control of st-ar-photos."""
    return TrainConfig(
        model=ModelConfig(
            dim=128,
            n_layers=4,
            n_heads=4,
            vocab_size=256,
            grid=8,
            num_classes=16,
            token_dropout=0.0,
            residual_dropout=0.0,
            ffn_dropout=0.0,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=30, schedule="trapezoid"),
        steps=200,
        batch_size=64,
        views=2,
        checkpoint_every=100,
    )


@preset
def st_ar_photos() -> TrainConfig:
    """ST-AR on the embedded photographs: the data, steps and tokens of llamagen-photos."""
    return replace(llamagen_photos(), selfguided=SelfGuidedConfig(projector_hidden=512, ema_decay=0.999))


@preset
def llamagen_digits() -> TrainConfig:
    """llamagen-photos for the embedded digits."""
    base = llamagen_photos()
    return replace(base, model=replace(base.model, num_classes=10))


@preset
def st_ar_digits() -> TrainConfig:
    """st-ar-photos for the embedded digits."""
    return replace(llamagen_digits(), selfguided=st_ar_photos().selfguided)


# CIFAR-10 (32 px, 8 x 8 tokens of vq-cifar10's 1,024 codes)


@preset
def llamagen_cifar10() -> TrainConfig:
    """CIFAR-10, 3.1M parameters, no self-guidance; two views per image, as the control of st-ar-cifar10."""
    base = llamagen_photos()
    model = replace(base.model, dim=192, n_layers=6, n_heads=6, vocab_size=1024, num_classes=10)
    optim = replace(base.optim, warmup_steps=100)
    return replace(base, model=model, optim=optim, steps=1500, checkpoint_every=500)


@preset
def st_ar_cifar10() -> TrainConfig:
    """ST-AR on CIFAR-10: the data, steps and tokens of llamagen-cifar10."""
    return replace(llamagen_cifar10(), selfguided=st_ar_photos().selfguided)


# Cheaper variants of the paper's method. docs/results/index.md has their gain and cost.
for _name in ("st-ar-b", "st-ar-l", "st-ar-xl", "st-ar-photos", "st-ar-digits", "st-ar-cifar10"):
    _base, _contrast = PRESETS[_name], {"alpha": 0.0, "mask_ratio": 0.0}
    _variant(
        f"{_name}-view",
        _base,
        "Inter-view contrast alone, nothing masked: a cheaper recipe.",
        step_loss=False,
        **_contrast,
    )
    _variant(
        f"{_name}-every2",
        _base,
        "Both contrasts in every second step, nothing masked: a cheaper recipe.",
        every=2,
        **_contrast,
    )
