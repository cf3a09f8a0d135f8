"""Training, decoding and feature reading on fake CUDA; prints what the recorder noted, as JSON: python -m tests.gpu.steps."""

from tests.gpu import fake_cuda  # isort: skip -- before torch

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from st_ar.config import VQ_PRESETS, SampleSettings, TrainConfig, VQTrainConfig, WatchConfig
from st_ar.data.store import TokenBatches
from st_ar.data.text import write_text
from st_ar.evaluation.probe_features import read_features
from st_ar.model import transformer
from st_ar.model.generate import TokenSampler
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset
from st_ar.selfguided import objective
from st_ar.training import graph, loop, plan
from st_ar.training.checkpoint import CheckpointExporter, State
from st_ar.training.inputs import Inputs
from st_ar.training.vqgan import VQLearner
from st_ar.training.watch import Watch
from tests.data.random_store import random_store

Report = dict[str, Any]
DEVICE = fake_cuda.DEVICE


def shortened(config: TrainConfig, **model: Any) -> TrainConfig:
    """Two steps of a preset: a plain one, and one that is logged and saved."""
    config = replace(config, model=replace(config.model, **model))
    return replace(config, steps=2, epochs=None, batch_size=8, device="cuda", dtype="bfloat16", compile=False)


def devices(state: State) -> list[str]:
    return sorted({str(tensor.device) for tensor in state.tensors().values()})


def train(config: TrainConfig) -> Report:
    """Run `train` itself; its checkpoints are not written. Returns a report for each step, and the devices of the state."""
    recorder, found = fake_cuda.Recorder(), Report(devices=[], notes=[])
    start_step = Watch.start_step

    def begin(self: Watch, step: int, total: int) -> bool:
        if step > 1:
            found[f"step {step - 1}"] = recorder.report()
        recorder.clear()
        return start_step(self, step, total)

    def save(self: CheckpointExporter, step: int, measured: object) -> None:
        found[f"step {step}"] = recorder.report()
        found["devices"] = devices(self.state)

    model, text = config.model, None
    with tempfile.TemporaryDirectory() as name, mock.patch.object(Watch, "start_step", begin):
        folder, classes = Path(name), model.num_classes if model.condition == "class" else 1
        sizes = {"grid": model.grid, "vocab_size": model.vocab_size, "num_classes": classes}
        random_store(folder / "tokens", images=8, **sizes)
        if model.condition == "text":
            fake_cuda.on_host(write_text)(
                text := folder / "text.safetensors", np.ones((8, 3, model.text_dim), np.float32)
            )
        noted = mock.patch.object(plan, "note", found["notes"].append)
        with noted, mock.patch.object(CheckpointExporter, "save", save), recorder:
            loop.train(config, folder / "tokens", folder / "run", text=text, watching=WatchConfig(track=("none",)))
    return found


def train_with_faults() -> Report:
    """Train with an `.item()` in the loss and another in the loop, on a GPU that is too small."""
    loss, clip = objective.linear_next_token_loss, loop.clip_gradients

    def read_loss(*args: Any, **options: Any) -> torch.Tensor:
        value = loss(*args, **options)
        value.item()
        return value

    def read_norm(*args: Any) -> torch.Tensor:
        norm = clip(*args)
        norm.item()
        return norm

    with (
        mock.patch.object(objective, "linear_next_token_loss", read_loss),
        mock.patch.object(loop, "clip_gradients", read_norm),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=SimpleNamespace(total_memory=32 << 20)),
    ):
        return train(shortened(get_preset("st-ar-photos"), n_layers=2))


def train_with_one_row() -> Report:
    """Train with the masked keys as one row."""
    with mock.patch.object(transformer, "CAUSAL_KEY_BIAS", True):
        return train(shortened(get_preset("st-ar-b"), n_layers=6))


def train_as_a_graph() -> Report:
    """Train with a CUDA graph that is recorded in the first step."""
    with mock.patch.object(graph, "WARM_UP", 0):
        return train(replace(shortened(get_preset("st-ar-photos")), cuda_graph=True))


def decode(preset: str = "llamagen-b", **model: Any) -> Report:
    """Draw tokens with guidance and filters, over two lengths of the cache, each a CUDA graph that is recorded and not replayed."""
    with DEVICE:
        network = Transformer(replace(get_preset(preset).model, **model)).to(torch.bfloat16).eval()
        labels = torch.zeros(2, dtype=torch.int64)
    with mock.patch.object(torch.cuda, "Stream", side_effect=torch.cuda.Stream) as streams:
        sampler = TokenSampler(network, 2, SampleSettings(cfg_scale=2.0, top_k=100, top_p=0.9))
        with fake_cuda.Recorder() as recorder:
            sampler.draw(labels, np.arange(2), 0, num_tokens=34)
    return recorder.report() | {"graphs": len(sampler.graphs), "streams": streams.call_count}


def train_vqgan(config: VQTrainConfig) -> Report:
    """A step of a VQ-GAN's training with the discriminator. No codes are revived in it."""
    config = replace(config, adversary=replace(config.adversary, start=0), dtype="bfloat16", perceptual_weight=0.0)
    learner = VQLearner(config, DEVICE)
    learner.share()
    images = torch.rand(2, 3, config.size, config.size, device=DEVICE).contiguous(memory_format=learner.layout)
    with fake_cuda.Recorder() as recorder:
        learner.step(images, 2, 1e-4)
    return recorder.report() | {"devices": devices(learner.state(2))}


def read(tokens: torch.Tensor) -> Report:
    """Features of two layers."""
    with DEVICE:
        model = Transformer(replace(get_preset("llamagen-b").model, n_layers=4)).eval()
    with fake_cuda.Recorder() as recorder:
        read_features(model, tokens, [2, 4], [128, 256], torch.bfloat16)
    return recorder.report()


FAULTS: dict[str, Callable[[torch.Tensor], object]] = {
    "wait: item": lambda x: x.sum().item(),
    "wait: bool": lambda x: bool((x > 0).all()),
    "wait: nonzero": lambda x: x.nonzero(),
    "wait: index by mask": lambda x: x[x > 0],
    "wait: set by mask": lambda x: x.index_put_([x > 0], x[0]),
    "copy: to host": lambda x: x.cpu(),
    "copy: from host": lambda x: torch.zeros(3).to(DEVICE, non_blocking=True),
    "copy: from host, pinned": lambda x: torch.zeros(3).pin_memory().to(DEVICE),
    "copy: literal": lambda x: torch.tensor([1.0, 2.0], device=DEVICE),
    "mixed: index from host": lambda x: x[torch.zeros(2, dtype=torch.int64)],
    "float64: cast": lambda x: x.double().sum(),
    "none: pinned": lambda x: torch.zeros(3).pin_memory().to(DEVICE, non_blocking=True),
    "none: fill by mask": lambda x: x.masked_fill_(x > 0, 0.0),
    "none: set by mask": lambda x: x.__setitem__(x > 0, 0.0),
    "none: scalar": lambda x: x * torch.tensor(2.0),
    "none: index": lambda x: x[torch.zeros(2, dtype=torch.int64, device=DEVICE)],
}


def fault(action: Callable[[torch.Tensor], object]) -> list[str]:
    """The kinds that are noted of an action. One whose result has an unknown shape cannot go on after that."""
    x = torch.zeros(4, device=DEVICE)
    with (
        fake_cuda.Recorder() as recorder,
        contextlib.suppress(torch._subclasses.fake_tensor.DynamicOutputShapeException),
    ):
        action(x)
    return [kind for kind, noted in recorder.noted.items() if noted and kind != "moved"]


def main() -> None:
    for kind, name in ((Inputs, "__init__"), (Inputs, "describe"), (TokenBatches, "batch")):
        setattr(kind, name, fake_cuda.on_host(getattr(kind, name)))
    torch.cuda.is_available = lambda: True  # for `train`, which chooses the device itself
    fake_cuda.choose_device()
    tiny, text = get_preset("st-ar-photos"), get_preset("st-ar-xl-t2i")
    shown = replace(tiny, accumulate=2, selfguided=replace(tiny.selfguided, mask_own_position=False))
    with fake_cuda.MODE:
        found = {
            "plain tiny": train(shortened(get_preset("llamagen-photos"))),
            "guided tiny": train(shortened(tiny)),
            "guided tiny, own position, 2 micro-batches": train(shortened(shown)),
            "plain B": train(shortened(get_preset("llamagen-b"), n_layers=4)),
            "guided B": train(shortened(get_preset("st-ar-b"), n_layers=6)),
            "guided text": train(shortened(replace(text, selfguided=tiny.selfguided), n_layers=2)),
            "faults": train_with_faults(),
            "guided B, one row": train_with_one_row(),
            "guided tiny, as a graph": train_as_a_graph(),
            "plain 3B": train(shortened(get_preset("llamagen-3b"), n_layers=2)),
            "decode": decode(),
            "decode 3B": decode("llamagen-3b", n_layers=2),
            "vq-16": train_vqgan(VQ_PRESETS["vq-16"]()),
            "read": read(torch.zeros(4, 256, dtype=torch.int64)),
            "read from the device": read(torch.zeros(4, 256, dtype=torch.int64, device=DEVICE)),
            "noted": {name: fault(action) for name, action in FAULTS.items()},
        }
    print(json.dumps(found))


if __name__ == "__main__":
    fake_cuda.run(main)
