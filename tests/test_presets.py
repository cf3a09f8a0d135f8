from typing import Any

import pytest
import torch

from st_ar.config import PLAIN, SelfGuidedConfig, TrainConfig
from st_ar.errors import UserError
from st_ar.model.transformer import Transformer
from st_ar.presets import PRESETS, get_preset
from st_ar.selfguided.objective import SelfGuided
from st_ar.settings import differences, to_dict

# Tables 3 to 6 of the paper: ST-AR-B for 50 epochs, and what each row changes.
ABLATIONS: dict[str, dict[str, tuple[Any, Any]]] = {
    "st-ar-b-50-mim": {"selfguided.beta": (0.5, 0.0)},
    "st-ar-b-50-mim-step": {"selfguided.view_loss": (True, False)},
    "st-ar-b-50-mim-view": {"selfguided.step_loss": (True, False)},
    "st-ar-b-50-r15": {"selfguided.mask_ratio": (0.25, 0.15)},
    "st-ar-b-50-r35": {"selfguided.mask_ratio": (0.25, 0.35)},
    "st-ar-b-50-r45": {"selfguided.mask_ratio": (0.25, 0.45)},
    "st-ar-b-50-layer3": {"selfguided.contrast_layer": (6, 3)},
    "st-ar-b-50-layer9": {"selfguided.contrast_layer": (6, 9)},
    "st-ar-b-50-layer12": {"selfguided.contrast_layer": (6, 12)},
    "st-ar-b-50-k2": {"selfguided.positions": (4, 2)},
    "st-ar-b-50-k8": {"selfguided.positions": (4, 8)},
    "st-ar-b-50-k16": {"selfguided.positions": (4, 16)},
}


def changed(old: str, new: str) -> dict[str, tuple[Any, Any]]:
    return differences(to_dict(get_preset(old)), to_dict(get_preset(new)))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name: str) -> None:
    config = get_preset(name)
    assert isinstance(config, TrainConfig)
    assert config == PRESETS[name]()
    with torch.device("meta"):
        student = SelfGuided(Transformer(config.model), config.selfguided)
    assert len(student.model.layers) == config.model.n_layers
    assert student.middle <= config.model.n_layers
    assert (student.projector is None) == (not config.selfguided.contrast)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_described_and_has_a_name_for_the_command_line(name: str) -> None:
    assert PRESETS[name].__doc__
    assert name == name.lower()
    assert "_" not in name


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_name_says_whether_it_is_self_guided(name: str) -> None:
    config = get_preset(name)
    assert name.startswith("llamagen-") == (config.selfguided == PLAIN)
    assert name.startswith("st-ar-") == config.selfguided.needs_teacher


@pytest.mark.parametrize(
    ("size", "layers", "heads", "dim"),
    [("b", 12, 12, 768), ("l", 24, 16, 1024), ("xl", 36, 20, 1280), ("xxl", 48, 24, 1536), ("3b", 24, 32, 3200)],
)
def test_llamagen_sizes(size: str, layers: int, heads: int, dim: int) -> None:
    config = get_preset(f"llamagen-{size}")
    assert (config.model.n_layers, config.model.n_heads, config.model.dim) == (layers, heads, dim)
    assert (config.model.vocab_size, config.model.sequence_length, config.model.num_classes) == (16384, 256, 1000)
    assert (config.views, config.selfguided) == (1, PLAIN)


@pytest.mark.parametrize(("size", "layer", "depth"), [("b", 6, 12), ("l", 18, 24), ("xl", 18, 36)])
def test_st_ar_has_the_papers_hyperparameters(size: str, layer: int, depth: int) -> None:
    config = get_preset(f"st-ar-{size}")
    guided, optim = config.selfguided, config.optim
    assert (guided.contrast_layer, config.model.n_layers) == (layer, depth)
    assert (guided.mask_ratio, guided.positions, config.views) == (0.25, 4, 2)
    assert (guided.alpha, guided.beta, guided.ema_decay) == (1.0, 0.5, 0.9999)
    assert (guided.step_loss, guided.view_loss) == (True, True)
    assert (optim.lr, optim.betas, optim.weight_decay, optim.grad_clip) == (1e-4, (0.9, 0.95), 0.05, 1.0)
    assert (optim.schedule, optim.warmup_steps) == ("constant", 0)
    assert (config.batch_size, config.class_dropout, config.epochs) == (256, 0.1, 300)


@pytest.mark.parametrize("size", ["b", "l", "xl", "xl-t2i"])
def test_st_ar_differs_from_llamagen_in_self_guidance_and_views_only(size: str) -> None:
    found = changed(f"llamagen-{size}", f"st-ar-{size}")
    assert found.pop("views") == (1, 2)
    assert {name.split(".")[0] for name in found} == {"selfguided"}


@pytest.mark.parametrize("method", ["llamagen", "st-ar"])
def test_the_t2i_presets_differ_in_the_condition_only(method: str) -> None:
    assert changed(f"{method}-xl", f"{method}-xl-t2i") == {"model.condition": ("class", "text")}
    model = get_preset(f"{method}-xl-t2i").model
    assert (model.text_tokens, model.text_dim, model.condition_length) == (120, 2048, 120)


@pytest.mark.parametrize("name", ["llamagen-b", "st-ar-b"])
def test_the_ablations_base_is_50_epochs(name: str) -> None:
    assert changed(name, f"{name}-50") == {"epochs": (300, 50)}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_row_changes_what_its_table_says_and_nothing_else(name: str) -> None:
    assert changed("st-ar-b-50", name) == ABLATIONS[name]


def test_there_is_a_preset_for_every_ablation_row_and_no_other() -> None:
    assert {name for name in PRESETS if name.startswith("st-ar-b-50-")} == set(ABLATIONS)


@pytest.mark.parametrize("data", ["photos", "digits"])
def test_the_embedded_data_compare_self_guidance_on_the_same_views(data: str) -> None:
    found = changed(f"llamagen-{data}", f"st-ar-{data}")
    assert {name.split(".")[0] for name in found} == {"selfguided"}
    guided = get_preset(f"st-ar-{data}").selfguided
    defaults = SelfGuidedConfig()
    assert (guided.mask_ratio, guided.alpha, guided.beta) == (defaults.mask_ratio, defaults.alpha, defaults.beta)


@pytest.mark.parametrize("size", ["b", "l", "xl", "photos", "digits", "cifar10"])
def test_the_cheaper_recipes_change_the_papers_method_in_what_their_names_say(size: str) -> None:
    unmasked = {"selfguided.mask_ratio": (0.25, 0.0), "selfguided.alpha": (1.0, 0.0)}
    assert changed(f"st-ar-{size}", f"st-ar-{size}-view") == unmasked | {"selfguided.step_loss": (True, False)}
    assert changed(f"st-ar-{size}", f"st-ar-{size}-every2") == unmasked | {"selfguided.every": (1, 2)}


@pytest.mark.parametrize(
    ("wrong", "near"), [("st-ar-bb", "st-ar-b"), ("llamagen_xl", "llamagen-xl"), ("ST-AR-XL", None)]
)
def test_an_unknown_preset_is_answered_with_the_nearest(wrong: str, near: str | None) -> None:
    with pytest.raises(UserError) as caught:
        get_preset(wrong)
    message = str(caught.value)
    assert f"unknown preset {wrong!r}" in message
    assert near is None or f"did you mean {near}?" in message
    assert all(name in message for name in PRESETS)


def test_a_name_near_to_none_is_answered_with_the_list_alone() -> None:
    with pytest.raises(UserError) as caught:
        get_preset("zzz")
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in PRESETS)
