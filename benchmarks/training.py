"""Step time of ST-AR over AR at equal tokens, beside the limit that the FLOPs set.

    python benchmarks/training.py                       the photographs' preset, and B at 4 x 256 tokens
    python benchmarks/training.py --presets b l xl --sequences 64 --compile --name training-h100

Both train on the same batches, in turn, each as its run would: forward, backward, clipping, AdamW, EMA.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from common import flop_limit, ratio, save, summarise, time_in_turn
from st_ar.config import PLAIN, TrainConfig
from st_ar.cost import flops_per_token
from st_ar.hardware import choose_device, choose_dtype
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset
from st_ar.selfguided.objective import SelfGuided, draw
from st_ar.selfguided.teacher import Teacher
from st_ar.training.loop import backward
from st_ar.training.optim import adamw


def make_step(config: TrainConfig, device: torch.device, dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    """One optimizer step on the same random batch, drawn as in training."""
    torch.manual_seed(0)
    model = Transformer(config.model).to(device)
    teacher = Teacher(model, config.selfguided)
    student = SelfGuided(model, config.selfguided).to(device).train()
    optimizer = adamw(student, config.optim)
    shape = (config.batch_size, config.views, config.model.sequence_length)
    tokens = torch.randint(config.model.vocab_size, shape, device=device)
    labels = torch.randint(config.model.num_classes, shape[:1], device=device)
    if compiled:
        for block in [*model.layers, *teacher.model.layers]:
            block.compile()
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        draws = draw(config.selfguided, config.model, images=shape[0], views=shape[1], seed=0, step=count)
        backward(student, teacher, tokens, labels, draws, 1, dtype)
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(model, count)

    return step


def measure(
    preset: str, sequences: int | None, rounds: int, device: torch.device, dtype: torch.dtype, compiled: bool
) -> dict[str, Any]:
    """AR against ST-AR for one preset."""
    guided = get_preset(f"st-ar-{preset}")
    if sequences is not None:
        guided = replace(guided, batch_size=sequences // guided.views)
    plain = replace(guided, selfguided=PLAIN)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = {name: make_step(config, device, dtype, compiled) for name, config in (("AR", plain), ("ST-AR", guided))}
    times = time_in_turn(steps, rounds=rounds, warmup=3, device=device)
    tokens = guided.batch_size * guided.views * guided.model.sequence_length
    body, head = flops_per_token(guided.model)
    found = {
        "tokens_per_step": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": compiled,
        "AR": summarise(times["AR"]),
        "ST-AR": summarise(times["ST-AR"]),
        "ratio": ratio(times["ST-AR"], times["AR"]),
        "flop_limit": flop_limit(guided.model),
        "tokens_per_second": {name: tokens / summarise(values)["median"] for name, values in times.items()},
        "flop_per_second_AR": 3 * (body + head) * tokens / summarise(times["AR"])["median"],
    }
    if device.type == "cuda":
        found["peak_gib_of_both"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def main() -> None:
    """Measure, print a table, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["photos", "b"])
    parser.add_argument(
        "--sequences", type=int, help="sequences a step; by default photos' own 128, and 4 for the others"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--name", default="training-cpu")
    given = parser.parse_args()
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    results: dict[str, Any] = {}
    print(f"{'preset':10}{'AR s/step':>12}{'ST-AR s/step':>14}{'ratio':>8}{'quartiles':>16}{'FLOP limit':>12}")
    for preset in given.presets:
        sequences = given.sequences or (None if preset == "photos" else 4)
        r = results[preset] = measure(preset, sequences, given.rounds, device, dtype, given.compile)
        spread = f"{r['ratio']['quartile_low']:.3f}-{r['ratio']['quartile_high']:.3f}"
        print(
            f"{preset:10}{r['AR']['median']:12.3f}{r['ST-AR']['median']:14.3f}{r['ratio']['median']:8.3f}{spread:>16}{r['flop_limit']:12.3f}"
        )
    save(given.name, results)


if __name__ == "__main__":
    main()
