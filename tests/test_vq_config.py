"""The settings of VQ-GANs: presets that build, mistakes that name their flags, settings that survive JSON."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from st_ar.config import VQ_PRESETS, AdversaryConfig, OptimConfig, VQConfig, VQTrainConfig
from st_ar.errors import UserError
from st_ar.settings import from_dict, to_dict
from st_ar.training.vqgan import VQGAN, Discriminator
from tests.toys import FIXTURES

# Presets


@pytest.mark.parametrize("name", VQ_PRESETS)
def test_every_preset_builds_its_networks(name: str) -> None:
    config = VQ_PRESETS[name]()
    with torch.device("meta"):
        gan, judge = VQGAN(config.model), Discriminator(config.adversary)
        made = gan.painter(gan.reader(torch.empty(2, 3, config.size, config.size)))
        verdicts = judge(made)
    grid = config.size // config.model.patch
    assert made.shape == (2, 3, config.size, config.size)
    assert gan.reader(torch.empty(1, 3, config.size, config.size, device="meta")).shape[2:] == (grid, grid)
    assert min(verdicts.shape[2:]) >= 1
    assert gan.codebook.shape == (config.model.codebook_size, 8)


@pytest.mark.parametrize(("preset", "published"), [("vq-16", "VQ-16"), ("vq-8", "VQ-8")])
def test_the_large_presets_have_the_published_layouts(preset: str, published: str) -> None:
    layout = json.loads((FIXTURES / "llamagen_layouts.json").read_text())[published]
    layout.pop("quantize.codebook_used")
    with torch.device("meta"):
        gan = VQGAN(VQ_PRESETS[preset]().model)
    found = {**gan.reader.state_dict(), **gan.painter.state_dict(), "quantize.embedding.weight": gan.codebook}
    assert {name: list(tensor.shape) for name, tensor in found.items()} == layout


@pytest.mark.parametrize(
    ("name", "size", "grid", "codes"),
    [
        ("vq-16", 256, 16, 16384),
        ("vq-8", 256, 32, 16384),
        ("vq-cifar10", 32, 8, 1024),
        ("vq-cifar10-16x16", 32, 16, 1024),
    ],
)
def test_a_preset_makes_the_tokens_it_promises(name: str, size: int, grid: int, codes: int) -> None:
    config = VQ_PRESETS[name]()
    assert (config.size, config.size // config.model.patch, config.model.codebook_size) == (size, grid, codes)


def test_llamagens_recipe() -> None:
    config = VQ_PRESETS["vq-16"]()
    assert (config.batch_size, config.epochs, config.steps) == (128, 40, None)
    assert (config.adversary.start, config.adversary.weight, config.adversary.adaptive) == (20_000, 0.5, True)
    assert (config.codebook_weight, config.commitment, config.perceptual_weight) == (1.0, 0.25, 1.0)
    assert config.optim == OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    assert config.total_steps(1_281_167) == 400_365  # 40 * 1,281,167 / 128
    assert replace(config, model=VQ_PRESETS["vq-8"]().model) == VQ_PRESETS["vq-8"]()


@pytest.mark.parametrize("name", VQ_PRESETS)
def test_every_preset_is_described_and_survives_json(name: str) -> None:
    assert VQ_PRESETS[name].__doc__
    config = VQ_PRESETS[name]()
    saved = json.loads(json.dumps(to_dict(config)))
    assert saved["model"]["multipliers"] == list(config.model.multipliers)
    assert from_dict(VQTrainConfig, saved, "config.json") == config


def test_settings_are_read_without_torch() -> None:
    code = "import sys, st_ar.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


# JSON


@given(
    multipliers=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    start=st.integers(0, 10**6),
    weight=st.floats(0, 10),
    steps=st.one_of(st.none(), st.integers(1, 10**6)),
    adaptive=st.booleans(),
)
def test_json_gives_the_same_settings_back(
    multipliers: list[int], betas: tuple[float, float], start: int, weight: float, steps: int | None, adaptive: bool
) -> None:
    config = VQTrainConfig(
        model=VQConfig(channels=8, multipliers=tuple(multipliers)),
        adversary=AdversaryConfig(start=start, weight=weight, adaptive=adaptive, channels=4, layers=1),
        optim=OptimConfig(betas=betas),
        steps=steps,
        epochs=None if steps else 2.5,
        size=16,
    )
    again = from_dict(VQTrainConfig, json.loads(json.dumps(to_dict(config))), "config.json")
    assert again == config
    assert isinstance(again.model.multipliers, tuple)
    assert isinstance(again.optim.betas, tuple)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"colour": 1}, r"config\.json: unknown settings \['colour'\]"),
        ({"model": {"depth": 1}}, r"config\.json: unknown settings \['depth'\]"),
        ({"adversary": 3}, r"config\.json: the settings of AdversaryConfig are no JSON object"),
        ({"size": 0}, "--size"),
    ],
)
def test_damaged_settings_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        from_dict(VQTrainConfig, to_dict(VQ_PRESETS["vq-cifar10"]()) | change, "config.json")


# Validation

MISTAKES: list[tuple[type, dict[str, Any], str]] = [
    *(
        (VQConfig, {name: 0}, f"--model.{name.replace('_', '-')} must be at least 1, not 0")
        for name in ("channels", "z_channels", "codebook_size", "codebook_dim", "residual_blocks")
    ),
    (VQConfig, {"multipliers": ()}, "--model.multipliers must be numbers of at least 1"),
    (VQConfig, {"multipliers": (1, 0)}, "--model.multipliers must be numbers of at least 1"),
    (VQConfig, {"channels": 24, "multipliers": (1, 2)}, "--model.channels 24 times --model.multipliers 2 is 48: .* 32"),
    (VQConfig, {"codebook_size": 65537}, "--model.codebook-size 65537 does not fit .*: at most 65536"),
    (AdversaryConfig, {"start": -1}, "--adversary.start must be 0 or more, not -1"),
    (AdversaryConfig, {"weight": -0.1}, "--adversary.weight must be 0 or more, not -0.1"),
    (AdversaryConfig, {"weight": float("inf")}, "--adversary.weight must be a finite number, not inf"),
    (AdversaryConfig, {"weight": float("nan")}, "--adversary.weight must be a finite number, not nan"),
    (AdversaryConfig, {"channels": 0}, "--adversary.channels must be at least 1, not 0"),
    (AdversaryConfig, {"layers": 0}, "--adversary.layers must be at least 1, not 0"),
    (AdversaryConfig, {"channels": 24}, "--adversary.channels 24 gives a layer 48 channels: .* 32"),
    (VQTrainConfig, {"steps": 1, "epochs": 1.0}, "give --steps or --epochs, not both"),
    (VQTrainConfig, {"steps": None}, "give --steps or --epochs: how long"),
    (VQTrainConfig, {"steps": 0}, "--steps must be at least 1, not 0"),
    (VQTrainConfig, {"steps": None, "epochs": 0.0}, "--epochs must be above 0, not 0.0"),
    *(
        (VQTrainConfig, {name: 0}, f"--{name.replace('_', '-')} must be at least 1, not 0")
        for name in (
            *("size", "batch_size", "log_every", "evaluate_every", "evaluate_images", "checkpoint_every", "keep"),
        )
    ),
    *(
        (VQTrainConfig, {name: value}, f"--{name.replace('_', '-')} must be {words}, not {value}")
        for name in ("l1_weight", "l2_weight", "perceptual_weight", "codebook_weight", "commitment")
        for value, words in ((-1.0, "0 or more"), (float("nan"), "a finite number"), (float("inf"), "a finite number"))
    ),
    (VQTrainConfig, {"l1_weight": 0, "l2_weight": 0}, "--l1-weight, --l2-weight or --perceptual-weight"),
    (VQTrainConfig, {"crop_range": 0.9}, r"--crop-range must lie in \[1, 2\], not 0.9"),
    (VQTrainConfig, {"crop_range": float("nan")}, "--crop-range must be a finite number, not nan"),
    (VQTrainConfig, {"revive_after": -1}, r"--revive-after must be 0 \(never\) or more, not -1"),
    (VQTrainConfig, {"ema_decay": 1.0}, r"--ema-decay must lie in \[0, 1\), not 1.0"),
    (VQTrainConfig, {"seed": -1}, "--seed must be 0 or more, not -1"),
    (VQTrainConfig, {"dtype": "float16"}, "--dtype must be one of auto, float32, bfloat16, not 'float16'"),
    (VQTrainConfig, {"device": "tpu"}, "--device must be one of auto, cpu, cuda, not 'tpu'"),
    (VQTrainConfig, {"size": 100}, "--size 100 is no whole number of 16-pixel codes: --model.multipliers has 5 levels"),
    (VQTrainConfig, {"size": 8, "model": VQConfig(multipliers=(1,))}, "--size 8 is too small: SSIM"),
    (VQTrainConfig, {"size": 16, "adversary": AdversaryConfig(start=0)}, "--adversary.layers 3 leaves 2 of 16 pixels"),
]


@pytest.mark.parametrize(("cls", "changes", "match"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_names_its_flag(cls: type, changes: dict[str, Any], match: str) -> None:
    required: dict[str, Any] = {"steps": 10} if cls is VQTrainConfig else {}
    cls(**required)
    with pytest.raises(UserError, match=match):
        cls(**required | changes)


def test_a_discriminator_that_is_never_heard_may_be_too_large() -> None:
    assert VQTrainConfig(size=16, steps=10, adversary=AdversaryConfig(start=10)).adversary.layers == 3
    with pytest.raises(UserError, match=r"--adversary.layers"):
        VQTrainConfig(size=16, steps=11, adversary=AdversaryConfig(start=10))


@given(channels=st.integers(1, 70), layers=st.integers(1, 4))
def test_a_discriminator_builds_whenever_its_settings_are_accepted(channels: int, layers: int) -> None:
    def build() -> Discriminator:
        return Discriminator(AdversaryConfig(channels=channels, layers=layers))

    with torch.device("meta"):
        if any((channels * 2**i) % 32 and channels * 2**i > 32 for i in range(1, min(layers, 3) + 1)):
            with pytest.raises(UserError, match=r"--adversary\.channels"):
                build()
        else:
            assert build()(torch.empty(1, 3, 64, 64)).shape[1] == 1


@given(channels=st.integers(1, 100), multipliers=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_a_network_builds_whenever_its_settings_are_accepted(channels: int, multipliers: list[int]) -> None:
    def build() -> VQGAN:
        return VQGAN(VQConfig(channels=channels, multipliers=tuple(multipliers), z_channels=3, residual_blocks=1))

    with torch.device("meta"):
        if any((channels * m) % 32 and channels * m > 32 for m in multipliers):
            with pytest.raises(UserError, match=r"--model\.channels"):
                build()
        else:
            assert build().reader(torch.empty(1, 3, 16, 16)).shape[1] == 8


def test_epochs_are_counted_in_images() -> None:
    config = VQTrainConfig(epochs=1.5, batch_size=6)
    assert [config.total_steps(images) for images in (1, 20, 1000)] == [1, 5, 250]
    assert VQTrainConfig(steps=7).total_steps(1000) == 7
