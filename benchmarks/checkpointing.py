"""What a checkpoint costs a run, and how long it takes to go on from one.

    python benchmarks/checkpointing.py                                  B, 4 x 256 tokens a step, a checkpoint in 100 steps
    python benchmarks/checkpointing.py --preset photos --every 100 --measured 100 --name checkpointing-photos

In each round the same steps are taken three times in turn: without a checkpoint; with one at their beginning, written in the
background; and with one that is waited for. The run's export is written with each, as in a run. The differences, over the time
of `--every` steps, are what checkpointing adds; a write that takes longer than the `--measured` steps is waited for and counts.
Going on is timed in a new folder of the same process: building the model, finding the newest checkpoint by its checksums, reading it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import ratio, save, summarise, time_in_turn
from st_ar.config import TrainConfig
from st_ar.hardware import choose_device, choose_dtype
from st_ar.model.transformer import Transformer
from st_ar.model.weights import EMA, LIVE, save_weights
from st_ar.presets import get_preset
from st_ar.selfguided.guidance import make_teacher, sample_guidance
from st_ar.selfguided.objective import SelfGuided
from st_ar.training.checkpoint import Checkpoints, State, under
from st_ar.training.loop import Learner, forward_backward
from st_ar.training.optim import adamw, clip_gradients


class Run:
    """A run's networks, and its steps on one batch of random tokens."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self.config, self.device, self.dtype = config, device, choose_dtype(config.dtype, device)
        self.model = Transformer(config.model).to(device)
        self.teacher = make_teacher(self.model, config.selfguided)
        self.student = SelfGuided(self.model, config.selfguided).to(device).train()
        self.optimizer = adamw(self.student, config.optim)
        self.state = State({"student": self.student, "ema": self.teacher.model}, self.student, self.optimizer)
        shape = (config.batch_size, config.views, config.model.sequence_length)
        self.tokens = torch.randint(config.model.vocab_size, shape, device=device)
        self.labels = torch.randint(config.model.num_classes, shape[:1], device=device)
        self.count = 0

    def steps(self, count: int, each: Callable[[], None] = lambda: None) -> None:
        """So many optimizer steps, and `each` after every one."""
        config = self.config
        for _ in range(count):
            self.count += 1
            draws = sample_guidance(
                config.selfguided,
                (config.batch_size, config.views, config.model.sequence_length),
                seed=0,
                step=self.count,
            )
            forward_backward(
                Learner(self.student, self.teacher, config.accumulate, self.dtype), self.tokens, self.labels, draws
            )
            clip_gradients(self.student.parameters(), config.optim.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.teacher.update(self.model, self.count)
            each()


def measure_overhead(run: Run, folder: Path, every: int, measured: int, rounds: int) -> dict[str, Any]:
    """The three kinds of rounds, and what a checkpoint adds to `every` steps."""
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    stalls: list[float] = []

    def export(tensors: Any) -> None:
        weights = {LIVE: under("student.model.", tensors), EMA: under("ema.", tensors)}
        save_weights(folder / "export", weights, run.config.model, {"step": run.count})

    def with_checkpoint(*, waiting: bool) -> None:
        begun = time.perf_counter()
        checkpoints.save(run.count, run.state, then=export)
        if waiting:
            checkpoints.wait()
        else:
            stalls.append(time.perf_counter() - begun)
        run.steps(measured, checkpoints.check)
        checkpoints.wait()

    rounds_of = {
        "none": partial(run.steps, measured),
        "background": partial(with_checkpoint, waiting=False),
        "waiting": partial(with_checkpoint, waiting=True),
    }
    with checkpoints:
        times = time_in_turn(rounds_of, rounds=rounds, warmup=1, device=run.device)
    found: dict[str, Any] = {"steps_measured": measured, "every": every, "none": summarise(times["none"])}
    for name in ("background", "waiting"):
        added = [
            (with_one - without) / (without / measured * every)
            for with_one, without in zip(times[name], times["none"], strict=True)
        ]
        found[name] = {
            **summarise(times[name]),
            "ratio": ratio(times[name], times["none"]),
            "seconds_added": summarise([a - b for a, b in zip(times[name], times["none"], strict=True)]),
            "share_added": summarise(added),
        }
    found["stall"] = summarise(stalls[1:])
    return found


def measure_resume(config: TrainConfig, device: torch.device, folder: Path, rounds: int) -> dict[str, Any]:
    """Going on from the newest checkpoint; its files are in the system's cache."""
    times: dict[str, list[float]] = {"build": [], "verify": [], "read": [], "all": []}
    for _ in range(rounds):
        begun = time.perf_counter()
        run = Run(config, device)
        built = time.perf_counter()
        checkpoints = Checkpoints(folder / "checkpoints", keep=1)
        step = checkpoints.newest()
        verified = time.perf_counter()
        checkpoints.restore(step, run.state)
        done = time.perf_counter()
        for name, seconds in zip(times, (built - begun, verified - built, done - verified, done - begun), strict=True):
            times[name].append(seconds)
    return {name: summarise(values) for name, values in times.items()}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="b", help="of st-ar-*")
    parser.add_argument("--sequences", type=int, help="sequences a step; by default 4, and photos' own")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints that the share is said for")
    parser.add_argument("--measured", type=int, default=20, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where to write; by default the system's folder for temporary files"
    )
    parser.add_argument("--name", default="checkpointing-cpu")
    given = parser.parse_args()
    config = get_preset(f"st-ar-{given.preset}")
    sequences = given.sequences or (None if given.preset == "photos" else 4)
    if sequences is not None:
        config = replace(config, batch_size=sequences // config.views)
    device = choose_device("auto")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        run = Run(config, device)
        overhead = measure_overhead(run, folder, given.every, given.measured, given.rounds)
        files = [path for path in (folder / "checkpoints").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        del run
        resume = measure_resume(config, device, folder, given.rounds)
    results = {
        "preset": given.preset,
        "sequences": config.batch_size * config.views,
        "checkpoint_bytes": size,
        "overhead": overhead,
        "resume": resume,
    }
    print(
        f"st-ar-{given.preset}: {overhead['none']['median'] / given.measured:.3f} s a step, checkpoints of {size / 1e9:.2f} GB"
    )
    for kind in ("background", "waiting"):
        share = overhead[kind]["share_added"]
        print(
            f"  one in {given.every} steps, {kind + ':':12}{share['median']:+7.2%} ({share['quartile_low']:+.2%} to "
            f"{share['quartile_high']:+.2%}), {overhead[kind]['seconds_added']['median']:.2f} s"
        )
    print(f"  training stands still for {overhead['stall']['median']:.2f} s at a checkpoint in the background")
    print("  going on: " + ", ".join(f"{name} {times['median']:.2f} s" for name, times in resume.items()))
    save(given.name, results)


if __name__ == "__main__":
    main()
