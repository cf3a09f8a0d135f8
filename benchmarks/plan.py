"""What a large run would take of the network and of the data's disks, by formula (see `network_bytes`).

Memory, time and the run's disk are those of `st-ar train PRESET --plan H100 --ranks 64`.

    python benchmarks/plan.py st-ar-xl --gpus 64 --batch-size 2048 --tokens-per-second 60000
    python benchmarks/plan.py st-ar-xl --gpus 64 --batch-size 2048 --mfu 0.4
    python benchmarks/plan.py st-ar-xl --gpus 64 --batch-size 2048 --mfu 0.4 --images 1e9 --crops 2

Everything follows from one device's training throughput: give a measured one (tokens_per_second of its log.jsonl), or assume a share of
the peak, which the table then says. Communication is listed beside the computation that it can hide behind, and not added to it.
"""

import argparse
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from st_ar.config import VQ_PRESETS, ModelConfig, TrainConfig
from st_ar.hardware import checkpoint_bytes, parameters, projector_parameters, training_flops_per_token
from st_ar.presets import get_preset
from st_ar.tokenizer.vq import VQEncoder

SHARD = 16384
"""Images of a shard of a token store."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What runs it."""

    gpus: int
    tokens_per_second: float
    """Of one GPU, training alone."""
    gpus_per_machine: int = 8
    link: float = 50e9
    """Bytes a second from a GPU to other machines."""
    disk: float = 2e9
    """Bytes a second that the shared file system takes from all together."""


def _trained(config: TrainConfig) -> int:
    return parameters(config.model) + projector_parameters(config)


def network_bytes(config: TrainConfig, ranks: int, parallel: str, per_machine: int) -> float:
    """Bytes that a rank receives from other machines in a step (ring algorithms), for gradients and weights.

    ddp: gradients go round in float32, once to be summed and once as sums. fsdp: the student's weights are gathered twice and the
    teacher's blocks once, in bfloat16, and gradients are summed in float32. hybrid (--shard-size of a machine's GPUs): across
    machines go the sums of a rank's own share alone.
    """
    trained = _trained(config)
    if parallel == "ddp":
        return 2 * (ranks - 1) / ranks * 4 * trained
    if parallel == "fsdp":
        blocks = parameters(config.model) - 2 * config.model.vocab_size * config.model.dim
        return (
            (ranks - 1)
            / ranks
            * (2 * 2 * trained + (2 * blocks if config.selfguided.needs_teacher else 0) + 4 * trained)
        )
    machines = ranks // per_machine
    return 2 * (machines - 1) / machines * 4 * trained / per_machine


def negatives_bytes(config: TrainConfig, ranks: int) -> float:
    """Bytes of the teacher's features that a rank receives in a step: [B, M, K, D] in float32, but for its own."""
    guided = config.selfguided
    if not guided.contrast or guided.negatives == "local":
        return 0
    return (ranks - 1) / ranks * config.batch_size * config.views * guided.positions * config.model.dim * 4


def store_bytes(model: ModelConfig, images: int, crops: int) -> int:
    """Codes in uint16 and labels in int32."""
    return images * (crops * model.sequence_length * 2 + 4)


def tokenizing_flops(images: int, crops: int) -> float:
    """Operations that VQ-16's encoder takes for the crops of all images, at 256 pixels."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        VQEncoder(VQ_PRESETS["vq-16"]().model)(torch.empty(1, 3, 256, 256))
    return float(images) * crops * counter.get_total_flops()


def plan(config: TrainConfig, machines: Machines, *, images: int, crops: int) -> list[tuple[str, str]]:
    """The table's rows: what, and how much."""
    model, ranks = config.model, machines.gpus
    tokens_per_step = config.batch_size * config.views * model.sequence_length
    speed = ranks * machines.tokens_per_second
    step = tokens_per_step / speed
    saved, shards = checkpoint_bytes(config), -(-images // SHARD)
    one_shard = _bytes(store_bytes(model, min(images, SHARD), crops))
    rows = [
        ("tokens a step, and of a GPU", f"{tokens_per_step:,}, {tokens_per_step // ranks:,}"),
        ("tokens per second, per GPU and in total", f"{machines.tokens_per_second:,.0f}, {speed:,.0f}"),
        ("a step's computation", f"{1000 * step:,.0f} ms"),
        ("operations to tokenize the images with VQ-16", f"{tokenizing_flops(images, crops):.3g}"),
        ("token store", f"{_bytes(store_bytes(model, images, crops))} in {shards:,} shards of {one_shard}"),
        ("read from it", f"{_bytes(tokens_per_step * 2 / step)}/s by all ranks"),
        ("labels and orders of two epochs in each rank's memory", _bytes(3 * 8 * images)),
        ("checkpoint", f"{_bytes(saved)}, {saved / machines.disk:.0f} s at {_bytes(machines.disk)}/s"),
    ]
    for parallel in ("ddp", "fsdp", "hybrid"):
        volume = network_bytes(config, ranks, parallel, machines.gpus_per_machine)
        rows.append(
            (
                f"network a step and GPU: {parallel}",
                f"{_bytes(volume)}, {1000 * volume / machines.link:,.0f} ms at {_bytes(machines.link)}/s",
            )
        )
    volume = negatives_bytes(config, ranks)
    rows.append(("the same: gathered negatives", f"{_bytes(volume)}, {1000 * volume / machines.link:,.1f} ms"))
    return rows


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--gpus-per-machine", type=int, default=8)
    parser.add_argument("--batch-size", type=int, help="images a step; the preset's if not given")
    parser.add_argument("--images", type=float, default=1_281_167)
    parser.add_argument("--crops", type=int, default=10, help="crops of each image in the store")
    speed = parser.add_mutually_exclusive_group(required=True)
    speed.add_argument("--tokens-per-second", type=float, help="of one GPU, measured")
    speed.add_argument("--mfu", type=float, help="an assumption instead: the share of --peak that training reaches")
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s of a GPU in bfloat16 (H100 SXM)")
    parser.add_argument("--link", type=float, default=50e9, help="bytes/s from a GPU to other machines (400 Gb/s)")
    parser.add_argument(
        "--disk", type=float, default=2e9, help="bytes/s that the shared file system takes from all together"
    )
    given = parser.parse_args()
    config = get_preset(given.preset)
    config = replace(config, batch_size=given.batch_size or config.batch_size)
    measured = given.tokens_per_second
    machines = Machines(
        gpus=given.gpus,
        gpus_per_machine=given.gpus_per_machine,
        tokens_per_second=measured or given.mfu * given.peak / training_flops_per_token(config),
        link=given.link,
        disk=given.disk,
    )
    basis = (
        "measured on one GPU"
        if measured
        else f"ASSUMED: {given.mfu:.0%} of {given.peak / 1e12:,.0f} TFLOP/s; not measured"
    )
    images = round(given.images)
    print(
        f"{given.preset}, {images:,} images, {given.gpus} GPUs in machines of {given.gpus_per_machine}; throughput {basis}\n"
    )
    print("| what | how much |\n|---|---|")
    for row in plan(config, machines, images=images, crops=given.crops):
        print(f"| {row[0]} | {row[1]} |")


if __name__ == "__main__":
    main()
