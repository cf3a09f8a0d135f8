"""Runs small enough to be made in a second, with every random thing switched on, and what they leave."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from st_ar.config import ModelConfig, OptimConfig, SelfGuidedConfig, TrainConfig
from st_ar.model.transformer import Transformer
from st_ar.selfguided.guidance import make_teacher
from st_ar.selfguided.objective import SelfGuided
from st_ar.training.checkpoint import Checkpoints, State
from st_ar.training.optim import adamw
from tests.disk import contents

# LlamaGen's dropouts and class dropout are on: they are ModelConfig's and TrainConfig's defaults.
PLAIN_RUN = TrainConfig(
    model=ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=16, grid=4, num_classes=3),
    optim=OptimConfig(lr=3e-3),
    steps=12,
    batch_size=6,
    log_every=1,
    checkpoint_every=4,
    dtype="float32",
    device="cpu",
)
GUIDED_RUN = replace(PLAIN_RUN, views=2, selfguided=SelfGuidedConfig(projector_hidden=24, positions=3, ema_decay=0.9))


def log_of(run: Path) -> list[dict[str, float]]:
    """The log without its columns that depend on the machine."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    machine = ("tokens_per_second", "memory_gb")
    return [{key: value for key, value in entry.items() if key not in machine} for entry in entries]


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def assert_same_result(run: Path, expected: Path) -> None:
    """Equal bytes in live and averaged weights and what is said of them, and equal logs."""
    found, wanted = contents(run / "export"), contents(expected / "export")
    assert sorted(found) == ["config.json", "ema.safetensors", "model.safetensors"]
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert log_of(run) == log_of(expected)


def saved_state(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    model = Transformer(GUIDED_RUN.model)
    teacher = make_teacher(model, GUIDED_RUN.selfguided)
    student = SelfGuided(model, GUIDED_RUN.selfguided)
    state = State({"student": student, "ema": teacher.model}, student, adamw(student, GUIDED_RUN.optim))
    Checkpoints(run / "checkpoints", keep=1).restore(step, state)
    return {name: tensor.clone() for name, tensor in state.tensors().items()}
