"""What a plan would cost, before anything is made."""

import shlex
import shutil
import time
from pathlib import Path

import torch

from st_ar.config import ModelConfig
from st_ar.cost import flops_per_token
from st_ar.hardware import choose_device, choose_dtype, describe
from st_ar.model.transformer import Transformer
from st_ar.reproduce.paper import Recipe
from st_ar.reproduce.plan import Plan
from st_ar.reproduce.run import is_done
from st_ar.selfguided.losses import next_token_loss


def print_plan(plan: Plan, work: Path) -> None:
    """The commands that are left, those that were stopped among them, the hours of their training on this machine, and the disk."""
    left = [stage for stage in plan.stages if not is_done(stage.makes, work)]
    print("\n".join(f"st-ar {shlex.join(stage.command)}" for stage in left))
    done = len(plan.stages) - len(left)
    flops, disk = sum(stage.flops for stage in left), sum(stage.disk for stage in left)
    config = plan.scale.config(Recipe(guided=False), 0)[1].model
    rate = training_rate(config)
    machine = describe()
    where = machine.get("gpu", f"{machine['cpu']}, {machine['threads']} threads")
    print(f"\n{len(left)} commands" + (f" ({done} more are done)" if done else ""))
    print(
        f"training: {flops:.3g} FLOPs; at the {rate:.3g} FLOP/s that a step of the smallest model reaches here ({where}), "
        f"{flops / rate / 3600:,.1f} device-hours, without tokenizing, sampling and measuring"
    )
    unknown = "" if plan.scale.image_count else ", without the tokens"
    there = next(path for path in (work, *work.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    print(f"disk: {disk / 1e9:,.1f} GB at most{unknown}; {free / 1e9:,.1f} GB are free at {there}")


def training_rate(config: ModelConfig, *, seconds: float = 3.0) -> float:
    """FLOP/s of forward and backward of a few sequences on this machine, in the type that training takes."""
    device = choose_device("auto")
    flops = 3 * sum(flops_per_token(config))
    count = 64
    if device.type == "cpu":  # B takes one seconds
        count = min(count, max(1, int(3e11 / (flops * config.sequence_length))))
    model = Transformer(config).to(device)
    tokens = torch.randint(config.vocab_size, (count, config.sequence_length), device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    dtype = choose_dtype("auto", device)

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(tokens[:, :-1], labels).logits
        next_token_loss(logits, tokens).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    steps, begun = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - begun < seconds:
        step()
        steps += 1
    return steps * tokens.numel() * flops / (time.perf_counter() - begun)
