"""Memory of training steps on fake CUDA, in bytes, as JSON: python -m tests.gpu.memory.

Eager steps are run, and their tensors counted. Of compiled blocks it gives what one keeps for its backward pass, by AOTAutograd's
partition after Inductor's passes.
"""

from tests.gpu import fake_cuda, ranks  # isort: skip -- before torch

import json
import sys
from dataclasses import replace
from functools import partialmethod
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from st_ar.config import TrainConfig
from st_ar.presets import get_preset
from st_ar.selfguided.guidance import sample_guidance
from st_ar.training import parallel
from st_ar.training.loop import Learner, forward_backward
from st_ar.training.optim import adamw, clip_gradients

DEVICE = fake_cuda.DEVICE
COMPILE = nn.Module.compile


def train(config: TrainConfig, *, steps: int = 2, memory: Any = None) -> int:
    """Train on one device; returns the peak."""
    student, teacher = ranks.build(config)
    module = parallel.parallelize(student, teacher, config, "none", DEVICE, torch.bfloat16)
    learner, optimizer = Learner(module, teacher, config.accumulate, torch.bfloat16), adamw(student, config.optim)
    model, shape = config.model, (config.batch_size, config.views, config.model.sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    labels = torch.zeros(config.batch_size, dtype=torch.int64, device=DEVICE)
    if model.condition == "text":
        labels = torch.zeros(config.batch_size, model.text_tokens, model.text_dim, device=DEVICE)
    for each in (student, teacher):
        for tensor in [*each.parameters(), *each.buffers()]:
            memory and memory.add(tensor)
    for step in range(1, steps + 1):
        forward_backward(learner, tokens, labels, sample_guidance(config.selfguided, shape, seed=0, step=step))
        if memory:
            clip_gradients(student.parameters(), 1.0)
            optimizer.step()
            teacher.update(student.model, step)
        optimizer.zero_grad()
    return memory.peak if memory else 0


def eager(config: TrainConfig) -> int:
    with ranks.Memory() as memory:
        return train(replace(config, compile=False), memory=memory)


def compiled_block(config: TrainConfig) -> int:
    """Bytes that the student's compiled block keeps, without its input."""
    import torch._inductor.config
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._inductor import compile_fx
    from torch._inductor.virtualized import V

    torch._inductor.config.joint_graph_constant_folding = False
    kept: list[int] = []

    def partition(graph: Any, inputs: Any, **options: Any) -> Any:
        with V.set_fake_mode(fake_cuda.MODE):
            forward, backward = compile_fx.partition_fn(graph, inputs, **options)
        (output,) = forward.graph.find_nodes(op="output")
        saved = [node for node in output.args[0][options["num_fwd_outputs"] :] if node.op != "placeholder"]
        values = [node.meta["val"] for node in saved]
        kept.append(sum(value.nbytes for value in values if isinstance(value, Tensor)))
        return forward, backward

    backend = aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        partition_fn=partition,
        decompositions=compile_fx.select_decomp_table(),
    )
    with mock.patch.object(nn.Module, "compile", partialmethod(COMPILE, backend=backend)):
        train(replace(config, compile=True), steps=1)
    (size,) = kept
    return size


def main(names: list[str]) -> None:
    """PRESET,IMAGES,KIND or PRESET,IMAGES,KIND,compiled or PRESET,IMAGES,KIND,MICRO-BATCHES."""
    fake_cuda.choose_device()
    found = {}
    with fake_cuda.MODE:
        for name in names:
            preset, images, kind, *rest = name.split(",")
            config = replace(get_preset(preset), batch_size=int(images), activation_checkpointing=kind)
            if rest == ["compiled"]:
                found[name] = compiled_block(config)
            else:
                found[name] = eager(replace(config, accumulate=int(*rest or "1")))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
