"""Training on several ranks: DDP, FSDP, activation checkpointing and compilation, applied to the model from outside."""

import contextlib
from collections.abc import Generator
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from st_ar.config import TrainConfig
from st_ar.distributed import data_parallel
from st_ar.errors import UserError
from st_ar.hardware import choose_compile
from st_ar.model.transformer import Transformer
from st_ar.selfguided.guidance import EMATeacher
from st_ar.selfguided.objective import SelfGuided

aten = torch.ops.aten
KEPT = [
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""The operations whose results selective activation checkpointing keeps: matrix products and fused attention, no T x T matrix."""


def choose_parallel(config: TrainConfig, world: int) -> str:
    """Return none, ddp or fsdp for `world` ranks, and refuse settings that do not fit their number."""
    if world == 1:
        if config.parallel in ("ddp", "fsdp"):
            raise UserError(
                f"--parallel {config.parallel} needs several ranks, but there is one: start them with "
                "torchrun --nproc-per-node N $(which st-ar) train .., or leave it out"
            )
        return "none"
    if config.parallel == "none":
        raise UserError(
            f"--parallel none is for one rank, but torchrun has started {world}: give --parallel ddp or fsdp, or start "
            "without torchrun"
        )
    each = world * config.accumulate
    if config.batch_size % each:
        raise UserError(
            f"--batch-size {config.batch_size} is not a multiple of the {world} ranks times --accumulate {config.accumulate}: "
            f"give a multiple of {each}"
        )
    guided = config.selfguided
    if guided.contrast and guided.negatives == "local" and config.batch_size == each:
        raise UserError(
            "with --selfguided.negatives local each micro-batch of each rank needs 2 images or more: give a larger "
            f"--batch-size than {config.batch_size}, or --selfguided.negatives global"
        )
    if config.shard_size is not None and world % config.shard_size:
        raise UserError(
            f"--shard-size {config.shard_size} does not divide the {world} ranks: give a divisor of {world}"
        )
    return "ddp" if config.parallel == "auto" else config.parallel


def parallelize(
    student: SelfGuided,
    teacher: EMATeacher[Transformer],
    config: TrainConfig,
    parallel: str,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """Move student and teacher to the device and share them among the ranks; returns the module to call for the student.

    The order is: activation checkpointing, compilation of each block, sharding or DDP (`parallel`, from `choose_parallel`).
    Parameters keep their names.
    """
    if config.activation_checkpointing != "none":
        for block in student.model.layers:
            _recompute(block, selective=config.activation_checkpointing == "selective")
    if parallel != "fsdp":  # fsdp moves one block after another, since the whole model may not fit
        student.to(device)
        teacher.to(device)
    if choose_compile(config.compile, device):
        torch.compiler.reset()  # torch keeps at most 8 compilations of the blocks' code in a process, over all its runs
        for block in [*student.model.layers, *teacher.model.layers]:
            block.compile()
        student.compiled_loss = device.type == "cuda"
    if parallel == "fsdp":
        world, size = torch.distributed.get_world_size(), config.shard_size
        ranks = {"shard": world} if size in (None, world) else {"replicate": world // size, "shard": size}
        mesh = init_device_mesh(device.type, tuple(ranks.values()), mesh_dim_names=tuple(ranks))
        _shard(student.model, mesh, dtype)
        fully_shard(student, mesh=mesh)
        # The teacher has no backward pass that would free gathered weights, and gathered copies would miss the next EMA update.
        _shard(teacher.model, mesh, dtype)
        fully_shard(teacher.model.norm, mesh=mesh)  # the objective also calls it directly
        fully_shard(teacher.model, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(teacher.model, "features")
    return data_parallel(student, gradient_as_bucket_view=True) if parallel == "ddp" else student


def unwrap(student: nn.Module) -> SelfGuided:
    """Return the student inside the result of `parallelize`."""
    return cast(SelfGuided, student.module if isinstance(student, DistributedDataParallel) else student)


@contextlib.contextmanager
def gradient_sync(student: nn.Module, last: bool) -> Generator[None]:
    """Reduce gradients over the ranks only in the last micro-batch."""
    if isinstance(student, FSDPModule):
        student.set_requires_gradient_sync(last)
    with student.no_sync() if isinstance(student, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield


def _recompute(block: nn.Module, *, selective: bool) -> None:
    """Replace the block's forward instead of wrapping the block, so that parameters keep their names."""
    forward: Any = block.forward
    contexts: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, KEPT)} if selective else {}

    def recomputed(*inputs: Any) -> Any:  # not a partial of `checkpoint`, which torch.compile would skip
        return checkpoint(forward, *inputs, use_reentrant=False, **contexts)

    block.forward = recomputed


def _shard(model: Transformer, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard the blocks and the output head, which is large and idle in a teacher. The caller shards the rest.

    Weights and gradient sums are float32. In bfloat16 the weights are cast before they are gathered, which halves the traffic.
    Activations, embeddings and the last norm keep the dtypes that autocast gives them on one rank.
    """
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model.output, mesh=mesh, mp_policy=policy, reshard_after_forward=False)  # backward needs it first
