"""`st-ar train --plan` predicts the memory of training steps, which run on fake CUDA.

Proven: the peak of tensors in eager steps, and what compiled blocks keep. Not proven: full recomputation of compiled blocks, which
needs the state of a GPU's random numbers, the gradients inside compiled backward passes, and what allocator and kernels add.
"""

from dataclasses import replace

import pytest

from st_ar.config import TrainConfig
from st_ar.presets import get_preset
from st_ar.training.plan import predict_memory
from tests.gpu.conftest import Script

KINDS = ("none", "selective", "full")
TINY = ["st-ar-photos,16,none", "st-ar-photos,16,full", "llamagen-photos,64,selective,4"]
SIZES = {"photos": (16, 128), "b": (16, 64), "l": (8, 32), "xl": (8, 32)}
FULL = [
    [f"{net}-{size},{images},{kind}" for images in SIZES[size] for kind in KINDS]
    for net in ("llamagen", "st-ar")
    for size in SIZES
] + [["st-ar-xl-t2i,8,none", "llamagen-xl,64,none,8", "st-ar-l,64,selective,4"]]


def config_of(name: str) -> TrainConfig:
    preset, images, kind, *parts = name.split(",")
    config = replace(get_preset(preset), batch_size=int(images), activation_checkpointing=kind)
    return replace(config, accumulate=int(*parts or "1"))


def wrong(found: dict[str, int]) -> dict[str, float]:
    """Predicted peaks over real ones, where they differ by more than a tenth."""
    ratios = {name: predict_memory(config_of(name), compiled=False).peak / peak for name, peak in found.items()}
    return {name: ratio for name, ratio in ratios.items() if not 0.9 < ratio < 1.1}


@pytest.mark.slow
def test_the_peak_of_a_small_run_is_predicted(run_script: Script) -> None:
    found = run_script("memory", *TINY)
    assert found.keys() == set(TINY)
    assert wrong(found) == {}


@pytest.mark.slow
@pytest.mark.parametrize("runs", FULL, ids=lambda runs: runs[0])
def test_the_peak_of_each_size_is_predicted(run_script: Script, runs: list[str]) -> None:
    found = run_script("memory", *runs)
    assert found.keys() == set(runs)
    assert wrong(found) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llamagen-photos,16,none", "st-ar-b,16,none", "st-ar-l,8,selective"])
def test_what_a_compiled_block_keeps_is_predicted(run_script: Script, name: str) -> None:
    [kept] = run_script("memory", f"{name},compiled").values()
    config = config_of(name)
    model, guided = config.model, replace(config.selfguided, contrast_layer=1)
    deeper = replace(config, model=replace(model, n_layers=model.n_layers + 1), selfguided=guided)
    more = predict_memory(deeper).activations - predict_memory(config).activations
    entry = config.batch_size * config.views * model.sequence_length * model.dim * 4
    assert more == pytest.approx(kept + entry, rel=0.01)
