"""Compiled blocks on fake CUDA; prints what dynamo counted, as JSON: python -m tests.gpu.graphs."""

from tests.gpu import fake_cuda  # isort: skip -- before torch

import json
import sys
from dataclasses import replace
from functools import partial, partialmethod
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._dynamo.utils import counters

from st_ar.config import TrainConfig
from st_ar.model import decoder
from st_ar.model.decoder import CachedDecoder
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset
from st_ar.selfguided import losses
from st_ar.selfguided.guidance import NO_GUIDANCE, make_teacher, sample_guidance
from st_ar.selfguided.objective import SelfGuided
from st_ar.training import parallel
from st_ar.training.loop import Learner, forward_backward

DEVICE = fake_cuda.DEVICE
COMPILE = nn.Module.compile, torch.compile
Report = dict[str, Any]


def report() -> Report:
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def train(config: TrainConfig, *, shared: str = "none", backend: str = "aot_eager") -> Report:
    """Two steps, forward and backward, of a model of two layers. The blocks are traced, but no kernel is made."""
    model = replace(config.model, n_layers=2)
    config = replace(config, compile=True, model=model, selfguided=replace(config.selfguided, contrast_layer=1))
    counters.clear()
    losses._compiled_cross_entropy.cache_clear()
    with DEVICE:
        network = Transformer(config.model)
        teacher = make_teacher(network, config.selfguided)
        student = SelfGuided(network, config.selfguided).train()
    with mock.patch.object(nn.Module, "compile", partialmethod(COMPILE[0], backend=backend)):
        called = parallel.parallelize(student, teacher, config, shared, DEVICE, torch.bfloat16)
    learner = Learner(called, teacher, config.accumulate, torch.bfloat16)
    shape = (4, config.views, config.model.sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    labels = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    if config.model.condition == "text":
        labels = torch.zeros(4, config.model.text_tokens, config.model.text_dim, device=DEVICE)
    for step in (1, 2):
        guided = config.selfguided.guides(step, 100)
        sample = sample_guidance(config.selfguided, shape, seed=0, step=step) if guided else NO_GUIDANCE
        with mock.patch.object(torch, "compile", partial(COMPILE[1], backend=backend)):
            forward_backward(learner, tokens, labels, sample)
    return report()


def decode(backend: str = "aot_eager") -> Report:
    """Read tokens at positions that need caches of 32, 64 and 96 positions."""
    counters.clear()
    with DEVICE:
        model = Transformer(replace(get_preset("llamagen-b").model, n_layers=2)).to(torch.bfloat16).eval()
        labels = torch.zeros(4, dtype=torch.int64)
    with mock.patch.object(torch, "compile", lambda step: COMPILE[1](step, backend=backend)):
        cached = CachedDecoder(model, 4, compiled=True)
    cached.begin(labels)
    lengths = [cached.seek(position) for position in (1, 40, 80)]
    for length in lengths:
        cached.read(labels, length)
    return report() | {"lengths": lengths}


def broken() -> Report:
    """A block that prints."""
    forward = decoder.Block.forward

    def prints(self: Any, *args: Any) -> torch.Tensor:
        print(end="")
        return forward(self, *args)

    with mock.patch.object(decoder.Block, "forward", prints):
        return train(get_preset("llamagen-b"), backend="eager")


def main() -> None:
    fake_cuda.choose_device()
    parallel.init_device_mesh = fake_cuda.on_host(parallel.init_device_mesh)
    plain, guided, text = (get_preset(name) for name in ("llamagen-b", "st-ar-b", "st-ar-xl-t2i"))
    with fake_cuda.MODE:
        if sys.argv[1:] == ["recomputed"]:
            # without a device there is no state of its random numbers, which the backward pass restores for dropout
            found = {
                kind: train(replace(guided, activation_checkpointing=kind), backend="eager")
                for kind in ("full", "selective")
            }
        else:
            alternating = replace(guided, selfguided=replace(guided.selfguided, every=2))
            found = {"plain": train(plain), "alternating": train(alternating), "text": train(text)}
            found |= {"decode": decode(), "broken": broken()}
            with fake_cuda.ranks(8):
                found["guided, sharded"] = train(guided, shared="fsdp")
    print(json.dumps(found))


if __name__ == "__main__":
    fake_cuda.run(main)
