"""The settings of VQ-GANs: presets that build, mistakes that name their flags, settings that survive JSON."""

import dataclasses
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from st_ar.config import (
    PLAIN,
    VQ_PRESETS,
    AdversaryConfig,
    ModelConfig,
    OptimConfig,
    SelfGuidedConfig,
    TrainConfig,
    VQConfig,
    VQTrainConfig,
    WatchConfig,
)
from st_ar.errors import UserError
from st_ar.presets import PRESETS
from st_ar.settings import differences, from_dict, to_dict
from st_ar.training.vqgan import VQGAN, Discriminator
from tests.toys import FIXTURES

MODEL: dict[str, Any] = {"dim": 16, "n_layers": 4, "n_heads": 2, "grid": 3}
REQUIRED: dict[type, dict[str, Any]] = {
    ModelConfig: MODEL,
    SelfGuidedConfig: {},
    OptimConfig: {},
    TrainConfig: {"model": ModelConfig(**MODEL), "steps": 10},
}
PREFIX: dict[type, str] = {
    ModelConfig: "--model.",
    SelfGuidedConfig: "--selfguided.",
    OptimConfig: "--optim.",
    TrainConfig: "--",
}


def build(cls: type, **changes: Any) -> Any:
    return cls(**REQUIRED[cls] | changes)


def flag(cls: type, name: str) -> str:
    return PREFIX[cls] + name.replace("_", "-")


# Defaults


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        # what the paper leaves open
        (SelfGuidedConfig, "temperature", 0.2),
        (SelfGuidedConfig, "reduction", "mean"),
        (SelfGuidedConfig, "negatives", "global"),
        (SelfGuidedConfig, "projector_depth", 3),
        (SelfGuidedConfig, "projector_hidden", 2048),
        (SelfGuidedConfig, "mask_own_position", True),
        (SelfGuidedConfig, "mim_features", "before_norm"),
        (SelfGuidedConfig, "ema_warmup", True),
        (OptimConfig, "betas", (0.9, 0.95)),
        # section 4: what it gives
        (SelfGuidedConfig, "mask_ratio", 0.25),
        (SelfGuidedConfig, "positions", 4),
        (SelfGuidedConfig, "alpha", 1.0),
        (SelfGuidedConfig, "beta", 0.5),
        (SelfGuidedConfig, "ema_decay", 0.9999),
        (SelfGuidedConfig, "step_loss", True),
        (SelfGuidedConfig, "view_loss", True),
        (OptimConfig, "lr", 1e-4),
        (OptimConfig, "weight_decay", 0.05),
        (OptimConfig, "grad_clip", 1.0),
        (OptimConfig, "schedule", "constant"),
        (OptimConfig, "warmup_steps", 0),
        (TrainConfig, "batch_size", 256),
        (TrainConfig, "class_dropout", 0.1),
        # LLAMAGEN.md
        (ModelConfig, "vocab_size", 16384),
        (ModelConfig, "num_classes", 1000),
        (ModelConfig, "token_dropout", 0.1),
        (ModelConfig, "residual_dropout", 0.1),
        (ModelConfig, "ffn_dropout", 0.1),
        (ModelConfig, "drop_path", 0.0),
        (ModelConfig, "rope_base", 10000.0),
        (ModelConfig, "norm_eps", 1e-5),
    ],
)
def test_default_is_the_one_documented(cls: type, name: str, value: object) -> None:
    assert getattr(build(cls), name) == value


def test_contrast_layer_is_half_the_depth_unless_given() -> None:
    assert SelfGuidedConfig().contrast_layer is None
    assert [SelfGuidedConfig().layer(depth) for depth in (12, 24, 36, 3, 1)] == [6, 12, 18, 1, 1]
    assert SelfGuidedConfig(contrast_layer=18).layer(24) == 18


def test_plain_training_has_no_mask_no_teacher_pass_and_no_contrast() -> None:
    assert TrainConfig(model=ModelConfig(**MODEL), steps=1).selfguided == PLAIN
    assert (PLAIN.mask_ratio, PLAIN.alpha, PLAIN.beta) == (0, 0, 0)
    assert not PLAIN.needs_teacher
    assert not PLAIN.contrast


@pytest.mark.parametrize(("alpha", "beta", "teacher"), [(0, 0, False), (1, 0, True), (0, 0.5, True), (1, 0.5, True)])
def test_teacher_is_needed_for_any_of_its_losses(alpha: float, beta: float, teacher: bool) -> None:
    config = SelfGuidedConfig(alpha=alpha, beta=beta)
    assert config.needs_teacher == teacher
    assert config.contrast == (beta > 0)


@given(grid=st.integers(1, 30), heads=st.integers(1, 20), quarter=st.integers(1, 40), classes=st.integers(1, 1000))
def test_derived_sizes(grid: int, heads: int, quarter: int, classes: int) -> None:
    config = ModelConfig(dim=4 * quarter * heads, n_layers=1, n_heads=heads, grid=grid, num_classes=classes)
    assert config.head_dim == 4 * quarter
    assert config.sequence_length == grid * grid
    assert config.null_class == classes
    wanted = int(2 * 4 * config.dim / 3)
    assert config.hidden_dim % 256 == 0
    assert wanted <= config.hidden_dim < wanted + 256


# Validation

# Values out of range: the class, the changes, and the setting that the message must name.
COUNTS = ("dim", "n_layers", "n_heads", "vocab_size", "grid", "num_classes", "text_tokens", "text_dim")
OUT_OF_RANGE: list[tuple[type, dict[str, Any], str]] = [
    *((ModelConfig, {name: 0}, name) for name in COUNTS),
    *((ModelConfig, {name: -1}, name) for name in COUNTS),
    *((ModelConfig, {name: 1.0}, name) for name in ("token_dropout", "residual_dropout", "ffn_dropout")),
    *((ModelConfig, {name: -0.1}, name) for name in ("token_dropout", "residual_dropout", "ffn_dropout")),
    (ModelConfig, {"drop_path": 1.0, "residual_dropout": 0.0, "ffn_dropout": 0.0}, "drop_path"),
    (ModelConfig, {"rope_base": 0.0}, "rope_base"),
    (ModelConfig, {"norm_eps": -1e-5}, "norm_eps"),
    (SelfGuidedConfig, {"mask_ratio": 1.0}, "mask_ratio"),
    (SelfGuidedConfig, {"mask_ratio": -0.1}, "mask_ratio"),
    (SelfGuidedConfig, {"alpha": -1.0}, "alpha"),
    (SelfGuidedConfig, {"alpha": math.inf}, "alpha"),
    (SelfGuidedConfig, {"beta": -0.5}, "beta"),
    (SelfGuidedConfig, {"beta": math.inf}, "beta"),
    (SelfGuidedConfig, {"temperature": 0.0}, "temperature"),
    (SelfGuidedConfig, {"masked_share": -0.1}, "masked_share"),
    (SelfGuidedConfig, {"masked_share": 1.1}, "masked_share"),
    (SelfGuidedConfig, {"first_position": -1}, "first_position"),
    (SelfGuidedConfig, {"every": 0}, "every"),
    (SelfGuidedConfig, {"until": -0.1}, "until"),
    (SelfGuidedConfig, {"until": 1.1}, "until"),
    (SelfGuidedConfig, {"positions": 0}, "positions"),
    (SelfGuidedConfig, {"projector_depth": 0}, "projector_depth"),
    (SelfGuidedConfig, {"projector_hidden": 0}, "projector_hidden"),
    (SelfGuidedConfig, {"ema_decay": 1.0}, "ema_decay"),
    (SelfGuidedConfig, {"ema_decay": -0.1}, "ema_decay"),
    (OptimConfig, {"lr": 0.0}, "lr"),
    (OptimConfig, {"betas": (0.9, 1.0)}, "betas"),
    (OptimConfig, {"betas": (-0.1, 0.95)}, "betas"),
    (OptimConfig, {"weight_decay": -0.1}, "weight_decay"),
    (OptimConfig, {"grad_clip": -1.0}, "grad_clip"),
    (OptimConfig, {"warmup_steps": -1}, "warmup_steps"),
    (OptimConfig, {"decay_fraction": 0.0}, "decay_fraction"),
    (OptimConfig, {"decay_fraction": 1.1}, "decay_fraction"),
    (OptimConfig, {"final_lr": -0.1}, "final_lr"),
    (OptimConfig, {"final_lr": 1.1}, "final_lr"),
    (TrainConfig, {"steps": 0}, "steps"),
    (TrainConfig, {"steps": None, "epochs": 0.0}, "epochs"),
    *(
        (TrainConfig, {name: 0}, name)
        for name in ("batch_size", "views", "accumulate", "log_every", "checkpoint_every", "keep", "validation_images")
    ),
    (TrainConfig, {"class_dropout": 1.0}, "class_dropout"),
    (TrainConfig, {"class_dropout": -0.1}, "class_dropout"),
    (TrainConfig, {"seed": -1}, "seed"),
    (TrainConfig, {"rank_timeout": 0}, "rank_timeout"),
    (TrainConfig, {"keep_every": -1}, "keep_every"),
    (TrainConfig, {"skip_nonfinite": -1}, "skip_nonfinite"),
]

# Settings that do not go together: the message must name each of their flags.
DO_NOT_GO_TOGETHER: list[tuple[type, dict[str, Any], str]] = [
    (ModelConfig, {"dim": 18, "n_heads": 4}, "dim"),
    (ModelConfig, {"dim": 18, "n_heads": 4}, "n_heads"),
    (ModelConfig, {"dim": 12, "n_heads": 2}, "n_heads"),
    (ModelConfig, {"text_tokens": 4}, "text_tokens"),
    (ModelConfig, {"text_dim": 4}, "text_dim"),
    (ModelConfig, {"condition": "text", "num_classes": 4}, "num_classes"),
    (ModelConfig, {"drop_path": 0.1}, "drop_path"),
    (ModelConfig, {"drop_path": 0.1, "residual_dropout": 0.0}, "ffn_dropout"),
    (ModelConfig, {"drop_path": 0.1, "ffn_dropout": 0.0}, "residual_dropout"),
    (SelfGuidedConfig, {"step_loss": False, "view_loss": False}, "step_loss"),
    (SelfGuidedConfig, {"step_loss": False, "view_loss": False}, "view_loss"),
    (SelfGuidedConfig, {"step_loss": False, "view_loss": False}, "beta"),
    (SelfGuidedConfig, {"positions": 1}, "positions"),
    (SelfGuidedConfig, {"positions": 1}, "step_loss"),
    (TrainConfig, {"batch_size": 10, "accumulate": 3}, "batch_size"),
    (TrainConfig, {"batch_size": 10, "accumulate": 3}, "accumulate"),
    (TrainConfig, {"shard_size": 2}, "shard_size"),
    (TrainConfig, {"shard_size": 2, "parallel": "ddp"}, "parallel"),
    (TrainConfig, {"shard_size": 1, "parallel": "fsdp"}, "shard_size"),
    (TrainConfig, {"views": 1, "selfguided": SelfGuidedConfig()}, "views"),
    (TrainConfig, {"views": 1, "selfguided": SelfGuidedConfig()}, "--selfguided.view-loss"),
    (TrainConfig, {"views": 2, "batch_size": 1, "selfguided": SelfGuidedConfig()}, "batch_size"),
    (TrainConfig, {"views": 2, "batch_size": 1, "selfguided": SelfGuidedConfig()}, "--selfguided.beta"),
]


def refused_id(value: object) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


@pytest.mark.parametrize(("cls", "changes", "name"), OUT_OF_RANGE, ids=refused_id)
def test_a_value_out_of_range_is_refused_with_its_flag_and_value(cls: type, changes: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError) as caught:
        build(cls, **changes)
    assert f"{flag(cls, name)} must be" in str(caught.value) or f"{flag(cls, name)} must lie in" in str(caught.value)
    assert str(caught.value).endswith(f"not {changes[name]}")


@pytest.mark.parametrize(("cls", "changes", "name"), DO_NOT_GO_TOGETHER, ids=refused_id)
def test_settings_that_do_not_go_together_are_refused_with_their_flags(
    cls: type, changes: dict[str, Any], name: str
) -> None:
    with pytest.raises(UserError) as caught:
        build(cls, **changes)
    assert (name if name.startswith("--") else flag(cls, name)) in str(caught.value)


def numeric_fields(*kinds: object) -> list[tuple[type, str]]:
    return [(cls, name) for cls in REQUIRED for name, hint in get_type_hints(cls).items() if hint in kinds]


def test_every_numeric_setting_has_a_value_that_is_refused() -> None:
    tried = {(cls, name) for cls, changes, _ in OUT_OF_RANGE for name in changes}
    tried.add((SelfGuidedConfig, "contrast_layer"))  # below: it depends on the model
    tried.add((TrainConfig, "shard_size"))  # it depends on --parallel
    assert set(numeric_fields(int, float, int | None, float | None)) <= tried


@pytest.mark.parametrize(("cls", "name"), numeric_fields(float), ids=refused_id)
def test_not_a_number_is_refused_everywhere(cls: type, name: str) -> None:
    with pytest.raises(UserError, match=rf"{flag(cls, name)}\b.*nan"):
        build(cls, **{name: math.nan})


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (ModelConfig, "condition"),
        (SelfGuidedConfig, "reduction"),
        (SelfGuidedConfig, "negatives"),
        (SelfGuidedConfig, "mim_features"),
        (OptimConfig, "schedule"),
        (TrainConfig, "dtype"),
        (TrainConfig, "device"),
    ],
    ids=refused_id,
)
def test_a_word_that_is_no_choice_is_refused(cls: type, name: str) -> None:
    # a misspelling in Python or in a run's config.json must not fall through to the last branch in silence
    with pytest.raises(UserError, match=rf"{flag(cls, name)}\b.*mispelt"):
        build(cls, **{name: "mispelt"})


@pytest.mark.parametrize("layer", [0, 5, -1])
def test_a_contrast_layer_that_the_model_lacks_is_refused(layer: int) -> None:
    guided = SelfGuidedConfig(contrast_layer=layer)
    with pytest.raises(UserError, match=rf"--selfguided.contrast-layer {layer} .*give 1 to 4"):
        build(TrainConfig, selfguided=guided, views=2)


def test_more_positions_than_tokens_are_refused() -> None:
    build(TrainConfig, selfguided=SelfGuidedConfig(positions=9), views=2)
    with pytest.raises(UserError, match=r"--selfguided.positions 10 is more than the 9 tokens"):
        build(TrainConfig, selfguided=SelfGuidedConfig(positions=10), views=2)
    build(TrainConfig, selfguided=SelfGuidedConfig(positions=4, first_position=5), views=2)
    with pytest.raises(UserError, match=r"positions 5 is more than the 4 tokens .*first-position 5"):
        build(TrainConfig, selfguided=SelfGuidedConfig(positions=5, first_position=5), views=2)


def test_steps_with_self_guidance_are_counted_from_the_first() -> None:
    guided = SelfGuidedConfig(every=3, until=0.7)
    assert [step for step in range(1, 13) if guided.guides(step, 12)] == [1, 4, 7]
    assert all(SelfGuidedConfig().guides(step, 5) for step in range(1, 6))
    assert not any(SelfGuidedConfig(until=0.0).guides(step, 5) for step in range(1, 6))


def test_steps_and_epochs_exclude_one_another() -> None:
    with pytest.raises(UserError, match="give --steps or --epochs, not both"):
        build(TrainConfig, steps=10, epochs=1.0)
    with pytest.raises(UserError, match="give --steps or --epochs: how long"):
        build(TrainConfig, steps=None)


def test_one_image_is_enough_without_contrast() -> None:
    assert build(TrainConfig, batch_size=1, selfguided=SelfGuidedConfig(beta=0.0)).batch_size == 1


def test_local_negatives_need_two_images_in_a_micro_batch() -> None:
    local = SelfGuidedConfig(negatives="local")
    build(TrainConfig, batch_size=4, accumulate=2, views=2, selfguided=local)
    build(TrainConfig, batch_size=4, accumulate=4, views=2, selfguided=SelfGuidedConfig())
    with pytest.raises(UserError, match="--batch-size"):
        build(TrainConfig, batch_size=4, accumulate=4, views=2, selfguided=local)


def test_one_view_is_enough_without_the_view_loss() -> None:
    assert build(TrainConfig, views=1, selfguided=SelfGuidedConfig(view_loss=False)).views == 1
    assert build(TrainConfig, views=1, selfguided=SelfGuidedConfig(beta=0.0)).views == 1


def test_one_position_is_enough_without_the_step_loss() -> None:
    assert SelfGuidedConfig(positions=1, step_loss=False).positions == 1
    assert SelfGuidedConfig(positions=1, beta=0.0).positions == 1


@pytest.mark.parametrize("cls", REQUIRED, ids=refused_id)
def test_configs_are_frozen_and_take_keywords_only(cls: type) -> None:
    config = build(cls)
    name = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    with pytest.raises(TypeError):
        cls(*REQUIRED[cls].values(), 1)


# Length of a run


@pytest.mark.parametrize(
    ("changes", "images", "steps"),
    [
        ({"steps": 70}, 5, 70),
        ({"steps": None, "epochs": 50.0, "batch_size": 256}, 1_281_167, 250_228),
        ({"steps": None, "epochs": 0.5, "batch_size": 10}, 100, 5),
        ({"steps": None, "epochs": 0.01, "batch_size": 10}, 100, 1),
    ],
)
def test_total_steps(changes: dict[str, Any], images: int, steps: int) -> None:
    assert build(TrainConfig, **changes).total_steps(images) == steps


# As plain values


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_the_trip_through_json(name: str) -> None:
    config = PRESETS[name]()
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config))), "config.json") == config


@given(
    temperature=st.floats(0.01, 10),
    positions=st.integers(2, 9),
    layer=st.none() | st.integers(1, 4),
    reduction=st.sampled_from(["mean", "sum"]),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    epochs=st.floats(0.1, 500),
)
def test_a_config_survives_the_trip_through_json(
    temperature: float, positions: int, layer: int | None, reduction: Any, betas: tuple[float, float], epochs: float
) -> None:
    config = TrainConfig(
        model=ModelConfig(**MODEL),
        selfguided=SelfGuidedConfig(
            temperature=temperature, positions=positions, contrast_layer=layer, reduction=reduction
        ),
        optim=OptimConfig(betas=betas),
        epochs=epochs,
        views=2,
    )
    values = json.loads(json.dumps(to_dict(config)))
    assert from_dict(TrainConfig, values, "config.json") == config
    assert to_dict(from_dict(TrainConfig, values, "config.json")) == values


def test_to_dict_holds_plain_values_under_the_field_names() -> None:
    values = to_dict(build(TrainConfig, seed=4))
    assert values["seed"] == 4
    assert values["model"]["dim"] == 16
    assert values["optim"]["betas"] == [0.9, 0.95]
    assert values["epochs"] is None
    assert set(values) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_settings_that_are_left_out_of_a_file_take_their_defaults() -> None:
    assert from_dict(ModelConfig, dict(MODEL), "config.json") == ModelConfig(**MODEL)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": MODEL, "steps": 1, "stepz": 2}, r"run/config\.json: unknown settings \['stepz'\]"),
        ({"model": MODEL | {"depth": 1}, "steps": 1}, r"run/config\.json: unknown settings \['depth'\]"),
        ({"model": {"dim": 16, "n_heads": 2}, "steps": 1}, r"run/config\.json: .*n_layers"),
        ({"steps": 1}, r"run/config\.json: .*model"),
        ({"model": MODEL | {"dim": "wide"}, "steps": 1}, r"run/config\.json"),
        ({"model": MODEL, "steps": 0}, r"--steps must be at least 1, not 0"),
    ],
    ids=str,
)
def test_a_file_with_wrong_settings_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(TrainConfig, values, "run/config.json")


def test_differences_name_what_changed_with_old_and_new_values() -> None:
    old = to_dict(build(TrainConfig, seed=1))
    new = to_dict(build(TrainConfig, seed=2, optim=OptimConfig(lr=1e-3), model=ModelConfig(**MODEL | {"n_layers": 5})))
    assert differences(old, new) == {"model.n_layers": (4, 5), "optim.lr": (1e-4, 1e-3), "seed": (1, 2)}
    assert differences(old, old) == {}
    assert differences({"a": {"b": 1}}, {"c": 2}) == {"a": ({"b": 1}, None), "c": (None, 2)}


def test_configs_and_presets_do_not_wait_for_torch() -> None:
    check = "import sys, st_ar.config, st_ar.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


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
        ({"adversary": 3}, r"config\.json: the settings of AdversaryConfig are not a JSON object"),
        ({"size": 0}, "--size"),
    ],
)
def test_damaged_settings_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        from_dict(VQTrainConfig, to_dict(VQ_PRESETS["vq-cifar10"]()) | change, "config.json")


# Validation

MISTAKES: list[tuple[type, dict[str, Any], str]] = [
    *(
        (VQConfig, {name: 0}, rf"--model.{name.replace('_', '-')} must lie in \[1, {most}\], not 0")
        for name, most in {
            "channels": 4096,
            "z_channels": 4096,
            "codebook_size": 65536,
            "codebook_dim": 4096,
            "residual_blocks": 64,
        }.items()
    ),
    (VQConfig, {"multipliers": ()}, "--model.multipliers must be 1 to 10 numbers"),
    (VQConfig, {"multipliers": (1, 0)}, r"--model.multipliers must lie in \[1, 64\], not \(1, 0\)"),
    (VQConfig, {"channels": 24, "multipliers": (1, 2)}, "--model.channels 24 times --model.multipliers 2 is 48: .* 32"),
    (VQConfig, {"codebook_size": 65537}, r"--model.codebook-size must lie in \[1, 65536\], not 65537"),
    (AdversaryConfig, {"start": -1}, "--adversary.start must be 0 or more, not -1"),
    (AdversaryConfig, {"weight": -0.1}, "--adversary.weight must be 0 or more, not -0.1"),
    (AdversaryConfig, {"weight": float("inf")}, "--adversary.weight must be a finite number, not inf"),
    (AdversaryConfig, {"weight": float("nan")}, "--adversary.weight must be a finite number, not nan"),
    (AdversaryConfig, {"channels": 0}, r"--adversary.channels must lie in \[1, 4096\], not 0"),
    (AdversaryConfig, {"layers": 0}, r"--adversary.layers must lie in \[1, 10\], not 0"),
    (AdversaryConfig, {"channels": 24}, "--adversary.channels 24 gives a layer 48 channels: .* 32"),
    (VQTrainConfig, {"steps": 1, "epochs": 1.0}, "give --steps or --epochs, not both"),
    (VQTrainConfig, {"steps": None}, "give --steps or --epochs: how long"),
    (VQTrainConfig, {"steps": 0}, "--steps must be at least 1, not 0"),
    (VQTrainConfig, {"steps": None, "epochs": 0.0}, "--epochs must be above 0, not 0.0"),
    *(
        (VQTrainConfig, {name: 0}, f"--{name.replace('_', '-')} must be at least 1, not 0")
        for name in (*("log_every", "evaluate_every", "evaluate_images", "checkpoint_every", "keep"),)
    ),
    *(
        (VQTrainConfig, {name: value}, f"--{name.replace('_', '-')} must be {words}, not {value}")
        for name in ("l1_weight", "l2_weight", "perceptual_weight", "codebook_weight", "commitment")
        for value, words in ((-1.0, "0 or more"), (float("nan"), "a finite number"), (float("inf"), "a finite number"))
    ),
    (VQTrainConfig, {"size": 0}, r"--size must lie in \[1, 4096\], not 0"),
    (VQTrainConfig, {"batch_size": 0}, r"--batch-size must lie in \[1, 1048576\], not 0"),
    (VQTrainConfig, {"l1_weight": 0, "l2_weight": 0}, "--l1-weight, --l2-weight or --perceptual-weight"),
    (VQTrainConfig, {"crop_range": 0.9}, r"--crop-range must lie in \[1, 2\], not 0.9"),
    (VQTrainConfig, {"crop_range": float("nan")}, "--crop-range must be a finite number, not nan"),
    (VQTrainConfig, {"revive_after": -1}, r"--revive-after must be 0 \(never\) or more, not -1"),
    (VQTrainConfig, {"ema_decay": 1.0}, r"--ema-decay must lie in \[0, 1\), not 1.0"),
    (VQTrainConfig, {"seed": -1}, "--seed must lie in \\[0, 18446744073709551615\\], not -1"),
    (VQTrainConfig, {"dtype": "float16"}, "--dtype must be one of auto, float32, bfloat16, not 'float16'"),
    (VQTrainConfig, {"device": "tpu"}, "--device must be one of auto, cpu, cuda, not 'tpu'"),
    (
        VQTrainConfig,
        {"size": 100},
        "--size 100 is not a multiple of a code's 16 pixels: --model.multipliers has 5 levels",
    ),
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


T = Path("tokenizer")


def test_by_default_there_are_only_tensorboards_curves() -> None:
    config = WatchConfig()
    assert config.track == ("tensorboard",)
    assert not any(config.looks_at(step) for step in range(1, 100))


def test_samples_and_probes_are_due_at_their_own_steps() -> None:
    config = WatchConfig(sample_every=6, sample_tokenizer=T, probe_every=4, probe_test_tokens=T)
    assert [step for step in range(1, 13) if config.looks_at(step)] == [4, 6, 8, 12]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"track": ("mlflow",)}, "--track must be some of tensorboard, wandb, trackio, none, not 'mlflow'"),
        ({"track": ("wandb", "wandb")}, "--track wandb wandb has a name twice"),
        ({"track": ("none", "wandb")}, "--track none cannot be combined"),
        ({"sample_every": -1}, "--sample-every must be 0"),
        ({"sample_every": 5}, "--sample-every 5 needs --sample-tokenizer"),
        ({"probe_every": 5}, "--probe-every 5 needs --probe-test-tokens"),
        ({"sample_tokenizer": T}, "--sample-tokenizer does nothing without --sample-every"),
        ({"sample_labels": (0,)}, "--sample-labels does nothing without --sample-every"),
        ({"sample_cfg_scale": 2.0}, "--sample-cfg-scale does nothing without --sample-every"),
        (
            {"sample_every": 5, "sample_tokenizer": T, "sample_cfg_scale": 0.5},
            "--sample-cfg-scale must lie in \\[1, 1000\\]",
        ),
        ({"probe_test_tokens": T}, "--probe-test-tokens does nothing without --probe-every"),
    ],
)
def test_what_would_do_nothing_or_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WatchConfig(**values)
