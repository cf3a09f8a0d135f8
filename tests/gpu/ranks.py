"""Sharded training by one of many ranks on fake CUDA; prints shards, collectives and memory, as JSON: python -m tests.gpu.ranks."""

from tests.gpu import fake_cuda  # isort: skip -- before torch

import json
import sys
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from st_ar.config import TrainConfig
from st_ar.distributed import Ranks
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset
from st_ar.selfguided.guidance import EMATeacher, make_teacher, sample_guidance
from st_ar.selfguided.objective import SelfGuided
from st_ar.training import parallel
from st_ar.training.checkpoint import State
from st_ar.training.loop import Learner, forward_backward
from st_ar.training.optim import adamw, clip_gradients

DEVICE = fake_cuda.DEVICE
Report = dict[str, Any]


class Memory(TorchDispatchMode):
    """Counts collectives, and the bytes of the device's tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        self.collectives: Counter[str] = Counter()

    def add(self, tensor: Tensor) -> None:
        tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = tensor.untyped_storage()
        if tensor.is_cuda and id(storage) not in self.sizes:
            self.sizes[id(storage)] = 0
            weakref.finalize(storage, self.drop, id(storage))
            self.set(storage, storage.nbytes())

    def set(self, storage: torch.UntypedStorage, size: int) -> None:
        if id(storage) in self.sizes:
            self.now += size - self.sizes[id(storage)]
            self.sizes[id(storage)] = size
            self.peak = max(self.peak, self.now)

    def drop(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.collectives[func.overloadpacket.__name__.strip("_")] += 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out


def build(config: TrainConfig) -> tuple[SelfGuided, EMATeacher[Transformer]]:
    with DEVICE:
        model = Transformer(config.model)
        return SelfGuided(model, config.selfguided).train(), make_teacher(model, config.selfguided)


def train(config: TrainConfig, world: int, images: int) -> Report:
    """Two steps of rank 0, with `images` images a rank."""
    config = replace(config, batch_size=images * world)
    student, teacher = build(config)
    module = parallel.parallelize(student, teacher, config, config.parallel, DEVICE, torch.bfloat16)
    learner, optimizer = Learner(module, teacher, config.accumulate, torch.bfloat16), adamw(student, config.optim)
    shape = (config.batch_size, config.views, config.model.sequence_length)
    tokens = torch.zeros(images, *shape[1:], dtype=torch.int64, device=DEVICE)
    labels = torch.zeros(images, dtype=torch.int64, device=DEVICE)
    mine = Ranks(rank=0, world=world).share(config.batch_size)
    memory, resize, reduce = Memory(), torch.UntypedStorage.resize_, functional.all_reduce

    def resized(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP frees gathered weights so
        memory.set(storage, size)
        return resize(storage, size)

    def reduced(*args: Any, **options: Any) -> Tensor:  # within an operator of DTensors, which no mode sees
        memory.collectives["allreduce of norms"] += 1
        return reduce(*args, **options)

    with (
        memory,
        mock.patch.object(torch.UntypedStorage, "resize_", resized),
        mock.patch.object(functional, "all_reduce", reduced),
    ):
        for each in (student, teacher):
            for tensor in [*each.parameters(), *each.buffers()]:
                memory.add(tensor)
        for step in (1, 2):
            memory.collectives.clear()
            sample = sample_guidance(config.selfguided, shape, seed=0, step=step, images=mine)
            forward_backward(learner, tokens, labels, sample)
            clip_gradients(student.parameters(), 1.0)
            optimizer.step()
            teacher.update(student.model, step)
            optimizer.zero_grad()
        after = memory.now
    tensors = State({"student": student, "ema": teacher.model}, student, optimizer).tensors()
    shards = {name: list(tensor.to_local().shape) for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    whole = {name: list(tensor.shape) for name, tensor in tensors.items() if name not in shards}
    counted = {"collectives": memory.collectives, "after": after, "peak": memory.peak}
    return {"shards": shards, "whole": whole, **counted}


def unsharded(config: TrainConfig) -> dict[str, list[int]]:
    """Shapes of a checkpoint's tensors without sharding."""
    student, teacher = build(config)
    state = State({"student": student, "ema": teacher.model}, student, adamw(student, config.optim))
    return {name: list(tensor.shape) for name, tensor in state.tensors().items()}


def main(full_size: bool) -> None:
    fake_cuda.choose_device()
    parallel.init_device_mesh = fake_cuda.on_host(parallel.init_device_mesh)
    small, large = (replace(get_preset(name), parallel="fsdp", compile=False) for name in ("st-ar-b", "st-ar-xl"))
    small = replace(
        small, model=replace(small.model, n_layers=3), selfguided=replace(small.selfguided, contrast_layer=2)
    )
    with fake_cuda.MODE:
        if full_size:
            with fake_cuda.ranks(8):
                found = {"8": train(large, 8, 16)}
                for kind in ("selective", "full"):
                    found[f"8, {kind} recomputation"] = train(replace(large, activation_checkpointing=kind), 8, 16)
            with fake_cuda.ranks(64):
                found["64"] = train(large, 64, 16)
        else:
            with fake_cuda.ranks(8):
                found = {"8": train(small, 8, 8), "8 in two groups": train(replace(small, shard_size=4), 8, 8)}
            with fake_cuda.ranks(64):
                found["64"] = train(small, 64, 8)
            found["unsharded"] = unsharded(small)
    print(json.dumps(found))


if __name__ == "__main__":
    main("full-size" in sys.argv)
