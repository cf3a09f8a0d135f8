import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_ar.config import PLAIN, ModelConfig, OptimConfig, SelfGuidedConfig, TrainConfig
from st_ar.errors import UserError
from st_ar.presets import PRESETS
from st_ar.settings import differences, from_dict, to_dict

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
    return [(cls, field.name) for cls in REQUIRED for field in dataclasses.fields(cls) if field.type in kinds]


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
