"""`st-ar train --plan`: its formulas against real modules, files and known costs. tests/gpu/test_memory.py has the memory's."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from st_ar.cli import main
from st_ar.config import WatchConfig
from st_ar.hardware import checkpoint_bytes, find_gpu, flops_per_token, parameters, projector_parameters
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset
from st_ar.selfguided.guidance import Projector
from st_ar.training.loop import train
from st_ar.training.plan import GIB, USABLE, largest_micro_batch, predict_memory, shortage
from tests.data.random_store import random_store
from tests.training.toy_runs import GUIDED_RUN

Capture = pytest.CaptureFixture[str]
XL = get_preset("st-ar-xl")


def test_parameters_are_those_of_the_modules() -> None:
    guided, model = GUIDED_RUN.selfguided, GUIDED_RUN.model
    projector = Projector(32, guided.projector_hidden, guided.projector_depth)
    assert projector_parameters(GUIDED_RUN) == sum(p.numel() for p in projector.parameters())
    for config in (model, replace(model, num_classes=1000, condition="text", text_tokens=4, text_dim=12)):
        weights = sum(p.numel() for p in Transformer(config).parameters())
        assert parameters(config) == weights
    memory = predict_memory(GUIDED_RUN)
    trained = parameters(model) + projector_parameters(GUIDED_RUN)
    assert memory[:3] == (4 * trained, 8 * trained, 4 * parameters(model))
    assert memory.gradients == 4 * trained


def test_a_checkpoint_takes_the_bytes_that_are_planned(tmp_path: Path) -> None:
    config = replace(GUIDED_RUN, model=replace(GUIDED_RUN.model, dim=128), steps=1)
    tokens, *_ = random_store(tmp_path / "tokens", images=20, crops=4)
    folder = train(config, tokens, tmp_path / "run", watching=WatchConfig(track=("none",))) / "checkpoints"
    taken = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert taken == pytest.approx(checkpoint_bytes(config), rel=0.03)


@pytest.mark.parametrize(("size", "gib"), [("l", 120), ("xl", 226)])
def test_512_sequences_take_what_is_known(size: str, gib: int) -> None:
    memory = predict_memory(get_preset(f"st-ar-{size}"))
    assert round(memory.peak / GIB) == gib
    assert memory.activations > 0.94 * memory.peak


def test_ranks_and_micro_batches_share_the_memory() -> None:
    one = predict_memory(XL)
    ddp, fsdp = predict_memory(XL, 8), predict_memory(replace(XL, parallel="fsdp"), 8)
    hybrid = predict_memory(replace(XL, parallel="fsdp", shard_size=4), 8)
    assert (ddp.weights, fsdp.weights, hybrid.weights) == (one.weights, one.weights / 8, one.weights / 4)
    assert ddp.peak == pytest.approx(sum(ddp[:5]))  # gradients are in DDP's buckets
    assert one.peak == pytest.approx(sum(one[:4]))  # they take the place of activations
    assert predict_memory(replace(XL, accumulate=8)).activations < one.activations / 7


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_largest_micro_batch_just_fits(accumulate: int) -> None:
    config, memory = replace(XL, accumulate=accumulate), 79 * GIB
    most = largest_micro_batch(config, 1, memory)
    assert predict_memory(config, images=most).peak <= USABLE * memory < predict_memory(config, images=most + 1).peak
    assert largest_micro_batch(config, 1, 10 * GIB) == 0  # the weights alone do not fit


@pytest.mark.parametrize(
    ("changes", "ranks", "gib", "expected"),
    [
        ({}, 1, 140, "--accumulate 2 (123 GiB) or --activation-checkpointing full (44.3 GiB)"),
        ({}, 1, 300, ""),
        ({"batch_size": 8, "parallel": "ddp"}, 8, 16, "--parallel fsdp (2.74 GiB)"),
        (
            {"batch_size": 8, "parallel": "ddp"},
            8,
            18,
            "--activation-checkpointing selective (15.3 GiB) or --parallel fsdp (2.74 GiB)",
        ),
        ({"parallel": "ddp"}, 8, 12, "--activation-checkpointing full --parallel fsdp (6.44 GiB)"),
        ({"activation_checkpointing": "full"}, 1, 8, "a smaller --batch-size or --model, or more GPUs"),
    ],
)
def test_what_does_not_fit_comes_with_the_settings_to_change(
    changes: dict[str, object], ranks: int, gib: int, expected: str
) -> None:
    found = shortage(replace(XL, **changes), ranks, gib * GIB)
    assert found.partition(f"% of a GPU's {gib} GiB: give ")[2] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("H200", ("H200", 140 * GIB, 989e12)),
        ("h100-pcie", ("H100 PCIe", 79 * GIB, 756e12)),
        ("A100:40", ("A100", 40 * GIB, 312e12)),
    ],
)
def test_a_gpu_is_found_by_its_name(text: str, expected: tuple[str, float, float]) -> None:
    assert find_gpu(text) == expected


def run(capsys: Capture, *arguments: str) -> str:
    main(["train", *arguments])
    return capsys.readouterr().out


def test_a_plan_needs_neither_tokens_nor_a_gpu(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = run(capsys, "st-ar-xl", "--plan", "H100", "--ranks", "64", "--batch-size", "2048")
    assert text.startswith(
        "st-ar-xl, 1,281,167 images (ASSUMED: ImageNet), 64 x H100 of 79 GiB; predicted, not measured\n"
    )
    assert "throughput ASSUMED: 40% of 989 TFLOP/s" in text
    rows = dict(re.split("  +", line) for line in text.splitlines()[4:])
    assert flops_per_token(XL.model) == pytest.approx((1486.4e6, 41.9e6), rel=2e-3)
    assert rows["tokens per second, per GPU and in total"] == "65,160, 4,170,209"
    assert rows["time of the run"] == "13.1 h"
    assert rows["checkpoint"] == "12.5 GB"
    assert rows["disk of the run, with --keep 2"] == "43.7 GB"
    assert list(tmp_path.iterdir()) == []
    slower = run(capsys, "st-ar-xl", "--plan", "H100", "--ranks", "64", "--batch-size", "2048", "--mfu", "0.2")
    assert "26.2 h" in slower


def test_a_plan_counts_the_images_of_a_store(capsys: Capture, tmp_path: Path) -> None:
    tokens, *_ = random_store(tmp_path / "tokens", images=20, crops=4)
    text = run(capsys, "st-ar-photos", "--plan", "A100:1", "--tokens", str(tokens), "--epochs", "32")
    assert text.startswith("st-ar-photos, 20 images, 1 x A100 of 1 GiB; predicted, not measured\n")
    assert "\nsteps, and seconds per step" in text
    assert "10, " in text
    assert "training may take" not in text
    text = run(capsys, "st-ar-photos", "--plan", "A100:1", "--tokens", str(tokens), "--batch-size", "1024")
    assert "\ntraining may take 3.3 GiB, more than 90% of a GPU's 1 GiB: give --accumulate 4" in text


def test_time_is_not_told_of_text_models(capsys: Capture) -> None:
    text = run(capsys, "st-ar-xl-t2i", "--plan", "H200")
    assert "memory of a rank: activations" in text
    assert "tokens a second" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "t", "--out", "o", "--ranks", "8"], "--ranks 8 is for --plan: give both, or leave it out"),
        (["--tokens", "t", "--out", "o", "--mfu", "0.3"], "--mfu 0.3 is for --plan: give both, or leave it out"),
        (["--plan", "H100", "--mfu", "0"], "--mfu must lie in (0, 1], not 0.0"),
        (["--plan", "RTX"], "--plan RTX is not a known GPU: give one of H100 PCIe, H100 NVL, H100, H200 NVL, H200,"),
        (["--plan", ""], "--plan  is not a known GPU"),
        (["--plan", "A100:many"], "--plan A100:many is not a known GPU"),
        (["--plan", "H100", "--ranks", "7"], "--batch-size 256 is not a multiple of the 7 ranks"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(capsys: Capture, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "st-ar-xl", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
