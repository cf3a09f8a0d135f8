"""Two ranks against one on the same batches, and the bytes that self-guidance adds to what ranks tell one another.

    python benchmarks/parallel.py                        the photographs' preset on two cores
    python benchmarks/parallel.py --rounds 1 --steps 3 --batch-size 8 --name try

Each round starts every way of training anew, one after another, so that a drifting machine is fair to all; each step is
forward, backward, clipping, AdamW, EMA, as in a run. The bytes are counted in those steps and must be what the formulas
say, which then give those of the larger models.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from common import ratio, save, summarise
from st_ar.config import PLAIN, TrainConfig
from st_ar.distributed import process_group
from st_ar.hardware import choose_dtype
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset
from st_ar.selfguided.guidance import make_teacher, sample_guidance
from st_ar.selfguided.objective import SelfGuided
from st_ar.training import loop
from st_ar.training.optim import adamw, clip_gradients
from st_ar.training.parallel import choose_parallel, parallelize

WAYS = {
    "1 rank, 1 thread": (1, 1, "none"),
    "1 rank, 2 threads": (1, 2, "none"),
    "2 ranks, ddp": (2, 1, "ddp"),
    "2 ranks, fsdp": (2, 1, "fsdp"),
}
"""Ways to use two cores, and one to compare them with: ranks, threads of each, parallelism."""


def configure(preset: str, method: str, batch_size: int | None, parallel: Any) -> TrainConfig:
    """The preset of ST-AR, or AR on the same batches."""
    config = replace(get_preset(f"st-ar-{preset}"), parallel=parallel)
    if batch_size is not None:
        config = replace(config, batch_size=batch_size)
    return config if method == "ST-AR" else replace(config, selfguided=PLAIN)


def gradient_bytes(config: TrainConfig) -> int:
    """Bytes of all gradients: what DDP reduces in each step."""
    with torch.device("meta"):
        return sum(4 * p.numel() for p in SelfGuided(Transformer(config.model), config.selfguided).parameters())


def negative_bytes(config: TrainConfig, world: int) -> int:
    """Bytes of teacher features that each rank receives from the others in each step: float32 [B, M, K, D] without its own."""
    guided = config.selfguided
    if not guided.contrast or guided.negatives == "local":
        return 0
    features = config.batch_size * config.views * guided.positions * config.model.dim
    return 4 * features * (world - 1) // world


def count_bytes(student: nn.Module, world: int) -> dict[str, int]:
    """Counts, from now on, what DDP reduces and what is received of the negatives."""
    counted = {"gradients": 0, "negatives": 0}
    if isinstance(student, DistributedDataParallel):

        def hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            counted["gradients"] += bucket.buffer().nbytes
            return allreduce_hook(group, bucket)

        student.register_comm_hook(dist.group.WORLD, hook)
    all_gather = loop.all_gather

    def counting(tensor: Tensor) -> Tensor:
        counted["negatives"] += tensor.nbytes * (world - 1)
        return all_gather(tensor)

    loop.all_gather = counting
    return counted


def be_a_rank(config: TrainConfig, threads: int, steps: int) -> None:
    """Train on random batches; the first rank prints seconds and bytes of each step as JSON."""
    torch.set_num_threads(threads)
    with process_group("cpu") as (ranks, device):
        torch.manual_seed(0)
        dtype = choose_dtype(config.dtype, device)
        model = Transformer(config.model)
        teacher = make_teacher(model, config.selfguided)
        student = SelfGuided(model, config.selfguided).train()
        called = parallelize(student, teacher, config, choose_parallel(config, ranks.world), device, dtype)
        optimizer = adamw(student, config.optim)
        counted = count_bytes(called, ranks.world)
        mine = ranks.share(config.batch_size)
        shape = (config.batch_size, config.views, config.model.sequence_length)
        tokens = torch.randint(config.model.vocab_size, shape)[mine]
        labels = torch.randint(config.model.num_classes, shape[:1])[mine]
        seconds: list[float] = []
        for step in range(1, steps + 3):  # the first two warm up
            begun = time.perf_counter()
            draws = sample_guidance(
                config.selfguided, (shape[0], shape[1], config.model.sequence_length), seed=0, step=step, images=mine
            )
            loop.forward_backward(loop.Learner(called, teacher, config.accumulate, dtype), tokens, labels, draws)
            clip_gradients(student.parameters(), config.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            teacher.update(model, step)
            seconds.append(time.perf_counter() - begun)
        if ranks.rank == 0:
            each = {name: count / len(seconds) for name, count in counted.items()}
            print(json.dumps({"seconds": seconds[2:], "bytes": each}))


def start(way: str, method: str, given: argparse.Namespace) -> dict[str, Any]:
    """What the ranks of one way have measured."""
    world, threads, parallel = WAYS[way]
    options = ["--preset", given.preset, "--steps", str(given.steps), "--rank", method, str(threads), parallel]
    if given.batch_size is not None:
        options += ["--batch-size", str(given.batch_size)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *launch, __file__, *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_speed(given: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of each way, and its ratio to one rank with one thread, round by round."""
    found: dict[str, Any] = {}
    for method in ("AR", "ST-AR"):
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        counted: dict[str, dict[str, float]] = {}
        for _ in range(given.rounds):
            for way in WAYS:
                once = start(way, method, given)
                times[way].append(summarise(once["seconds"])["median"])
                counted[way] = once["bytes"]
        config = configure(given.preset, method, given.batch_size, "auto")
        tokens = config.batch_size * config.views * config.model.sequence_length
        baseline = times["1 rank, 1 thread"]
        found[method] = {
            way: {
                "seconds per step": seconds,
                "tokens per second": [tokens / second for second in seconds],
                "speed over 1 rank, 1 thread": ratio(baseline, seconds)
                if given.rounds > 1
                else baseline[0] / seconds[0],
                "bytes per step": counted[way],
            }
            for way, seconds in times.items()
        }
        for way, (world, _, parallel) in WAYS.items():  # the second table rests on these formulas
            reduced = gradient_bytes(config) if parallel == "ddp" else 0
            assert counted[way] == {"gradients": reduced, "negatives": negative_bytes(config, world)}
    return found


def extra_bytes(preset: str, world: int) -> dict[str, Any]:
    """What each rank sends and receives in a step of DDP, a ring's 2 (W - 1) / W of the gradients, and what ST-AR adds."""
    plain, guided = (configure(preset, method, None, "auto") for method in ("AR", "ST-AR"))
    share = 2 * (world - 1) / world
    gradients = share * gradient_bytes(plain)
    projector = share * gradient_bytes(guided) - gradients
    negatives = negative_bytes(guided, world)
    return {
        "ranks": world,
        "batch_size": guided.batch_size,
        "AR: gradients": gradients,
        "ST-AR: gradients of the projector": projector,
        "ST-AR: negatives": negatives,
        "ST-AR over AR": (gradients + projector + negatives) / gradients,
    }


def main() -> None:
    """Measure, print two tables, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="photos")
    parser.add_argument("--batch-size", type=int, help="images of a step, all ranks'; the preset's if not given")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="parallel-cpu")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS, metavar=("METHOD", "THREADS", "PARALLEL"))
    given = parser.parse_args()
    if given.rank is not None:
        method, threads, parallel = given.rank
        be_a_rank(configure(given.preset, method, given.batch_size, parallel), int(threads), given.steps)
        return
    speed = measure_speed(given)
    print(
        f"{'':20}{'AR tokens/s':>14}{'over 1 rank':>13}{'ST-AR tokens/s':>16}{'over 1 rank':>13}{'bytes of negatives':>20}"
    )
    for way in WAYS:
        ar, guided = (speed[method][way] for method in ("AR", "ST-AR"))
        columns = [f"{way:20}"]
        for one, width in ((ar, 14), (guided, 16)):
            over = one["speed over 1 rank, 1 thread"]
            columns.append(f"{sorted(one['tokens per second'])[len(one['tokens per second']) // 2]:{width},.0f}")
            columns.append(f"{over['median'] if isinstance(over, dict) else over:13.2f}")
        print("".join(columns) + f"{guided['bytes per step']['negatives']:20,.0f}")
    bytes_of = {preset: extra_bytes(preset, 8) for preset in ("b", "l", "xl")}
    print(f"\n{'DDP, 8 ranks, MB':20}{'AR gradients':>14}{'projector':>12}{'negatives':>12}{'ST-AR / AR':>12}")
    for preset, row in bytes_of.items():
        parts = (row["AR: gradients"], row["ST-AR: gradients of the projector"], row["ST-AR: negatives"])
        ar, projector, negatives = (part / 1e6 for part in parts)
        print(f"{preset:20}{ar:14.1f}{projector:12.1f}{negatives:12.2f}{row['ST-AR over AR']:12.4f}")
    save(given.name, {"preset": given.preset, "speed": speed, "bytes per step of DDP": bytes_of})


if __name__ == "__main__":
    main()
