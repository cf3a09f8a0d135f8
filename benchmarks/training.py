"""Step time of AR and ST-AR at equal tokens, beside the limit that the FLOPs set and, from a checkout, LlamaGen's own step.

    python benchmarks/training.py --llamagen PATH       the photographs' preset, and B at 4 x 256 tokens
    python benchmarks/training.py --presets b l xl --sequences 64 --compile --llamagen PATH --name training-h100
    python benchmarks/training.py --presets cifar10 b --cheaper --name training-cheaper-cpu

All train on the same batches, in turn, each as its run would: forward, backward, clipping, AdamW, EMA. LlamaGen's is its own
`Transformer` and `update_ema` with the step that its train_c2i.py takes, compiled as a whole with --compile as it is there; our
blocks are compiled one by one. Shares of the peak are of the data sheet's on a GPU that is known, else of what a large matrix
product reaches here. Memory is the peak of each method alone: on a GPU what its tensors take, on a CPU that of a process of its own,
over what it held before it built anything.
"""

import argparse
import gc
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import flop_limit, ratio, save, summarise, synchronise, time_by_operation, time_in_turn
from st_ar.config import PLAIN, TrainConfig
from st_ar.hardware import choose_device, choose_dtype, freed_memory_kept, peak_flops, training_flops_per_token
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset
from st_ar.selfguided.guidance import make_teacher, sample_guidance
from st_ar.selfguided.objective import SelfGuided
from st_ar.training.loop import Learner, forward_backward
from st_ar.training.optim import adamw, clip_gradients
from st_ar.training.parallel import parallelize

Step = Callable[[], object]

GUIDED: dict[str, dict[str, Any]] = {
    "ST-AR": {},
    "nothing masked": {"mask_ratio": 0.0},
    "contrast alone": {"alpha": 0.0, "mask_ratio": 0.0},
}
"""The methods with self-guidance: what differs from ST-AR's settings. The last two are measured with --cheaper."""


def configure(preset: str, method: str, sequences: int | None, compiled: bool) -> TrainConfig:
    """A method's settings; LlamaGen's are AR's."""
    guided = replace(get_preset(f"st-ar-{preset}"), compile=compiled)
    if sequences is not None:
        guided = replace(guided, batch_size=sequences // guided.views)
    changes = GUIDED.get(method)
    return replace(guided, selfguided=PLAIN if changes is None else replace(guided.selfguided, **changes))


def our_step(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> Step:
    """One optimizer step on the same random batch, drawn as in training."""
    with device:
        model = Transformer(config.model)
    teacher = make_teacher(model, config.selfguided)
    student = SelfGuided(model, config.selfguided).train()
    called = parallelize(student, teacher, config, "none", device, dtype)
    optimizer = adamw(student, config.optim)
    tokens, labels = batch(config, device)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        draws = sample_guidance(
            config.selfguided, (len(tokens), config.views, config.model.sequence_length), seed=0, step=count
        )
        forward_backward(Learner(called, teacher, 1, dtype), tokens, labels, draws)
        clip_gradients(student.parameters(), config.optim.grad_clip)
        optimizer.step()
        teacher.update(model, count)
        optimizer.zero_grad()

    return step


def their_step(path: Path, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> Step:
    """The same with LlamaGen's model, loss and average, in the order of its train_c2i.py."""
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    gpt = importlib.import_module("autoregressive.models.gpt")
    update_ema = importlib.import_module("utils.ema").update_ema
    c = config.model
    model: nn.Module = gpt.Transformer(
        gpt.ModelArgs(
            dim=c.dim,
            n_layer=c.n_layers,
            n_head=c.n_heads,
            vocab_size=c.vocab_size,
            block_size=c.sequence_length,
            num_classes=c.num_classes,
            class_dropout_prob=config.class_dropout,
            token_dropout_p=c.token_dropout,
            resid_dropout_p=c.residual_dropout,
            ffn_dropout_p=c.ffn_dropout,
        )
    ).to(device)
    if device.type == "cuda":  # its first pass moves them, after which torch.compile begins again
        model.freqs_cis = model.freqs_cis.to(device)
    average = deepcopy(model).eval().requires_grad_(False)
    called: Any = torch.compile(model) if config.compile else model
    called.train()
    optimizer = adamw(model, config.optim)
    tokens, labels = batch(config, device)
    tokens, labels = tokens.flatten(0, 1), labels.repeat_interleave(config.views)

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            _, loss = called(cond_idx=labels, idx=tokens[:, :-1], targets=tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(average, model)
        loss.item()  # as it does for its log, in every step

    return step


def batch(config: TrainConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens [B, M, T] and labels [B], the same for every method."""
    torch.manual_seed(0)
    tokens = torch.randint(config.model.vocab_size, (config.batch_size, config.views, config.model.sequence_length))
    return tokens.to(device), torch.randint(config.model.num_classes, (config.batch_size,)).to(device)


def make_step(
    method: str, config: TrainConfig, llamagen: Path | None, device: torch.device, dtype: torch.dtype
) -> Step:
    """The step of AR, ST-AR or LlamaGen."""
    torch.manual_seed(0)
    if method == "LlamaGen":
        assert llamagen is not None
        return their_step(llamagen, config, device, dtype)
    return our_step(config, device, dtype)


def gpu_memory(step: Step, built: int) -> tuple[float, float]:
    """GiB that a method alone would have held at most, given the bytes of its networks; and the seconds of its first step."""
    begun = time.perf_counter()
    before = torch.cuda.memory_allocated()
    step()  # compiles, and makes the optimizer's state
    torch.cuda.synchronize()
    first = time.perf_counter() - begun
    held = built + torch.cuda.memory_allocated() - before
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (held + torch.cuda.max_memory_allocated() - before) / 2**30, first


def peak_memory(make: Callable[[], Step]) -> float:
    """GiB of this process's memory that three steps have held at most, everything built included."""
    before, step = most_held(), make()
    for _ in range(3):
        step()
    return (most_held() - before) / 2**30


def most_held() -> float:
    """The most bytes of memory that this process has had so far (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * float(status.split("VmHWM:")[1].split()[0])


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """FLOP/s of a large matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = time_in_turn({"product": lambda: a @ b}, rounds=5, warmup=2, device=device)["product"]
    return 2 * size**3 / summarise(times)["median"]


def profile(step: Step, device: torch.device, top: int = 12) -> list[dict[str, Any]]:
    """What a step's time goes to, most first: an operation's own time, without those it calls."""
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
        synchronise(device)
    times = time_by_operation(profiler, device)
    whole = sum(taken for _, taken, _ in times)
    return [{"operation": name[:200], "share": taken / whole} for name, taken, _ in times[:top]]


def measure(
    preset: str,
    sequences: int | None,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    llamagen: Path | None = None,
    profiled: bool = False,
    cheaper: bool = False,
    memory: bool = True,
) -> dict[str, Any]:
    """Every method for one preset, and how they compare, round by round."""
    methods = ["AR", *(GUIDED if cheaper else ["ST-AR"]), *(["LlamaGen"] if llamagen else [])]
    configs = {method: configure(preset, method, sequences, compiled) for method in methods}
    steps: dict[str, Step] = {}
    built: dict[str, int] = {}
    for method, config in configs.items():
        before = torch.cuda.memory_allocated()
        steps[method] = make_step(method, config, llamagen, device, dtype)
        built[method] = torch.cuda.memory_allocated() - before
    on_gpu = (
        {method: gpu_memory(step, built[method]) for method, step in steps.items()} if device.type == "cuda" else {}
    )
    times = time_in_turn(steps, rounds=rounds, warmup=3, device=device)
    guided = configs["ST-AR"]
    tokens = guided.batch_size * guided.views * guided.model.sequence_length
    peak = peak_flops(device, dtype) or matmul_rate(device, dtype)
    found: dict[str, Any] = {
        "tokens_per_step": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": compiled,
        "ratio": ratio(times["ST-AR"], times["AR"]),
        "flop_limit": flop_limit(guided.model),
        "peak_flop_per_second": peak,
    }
    found |= {f"{method} over AR": ratio(times[method], times["AR"]) for method in methods[2:]}
    for method, config in configs.items():
        taken = summarise(times[method])
        flops = tokens * training_flops_per_token(config) / taken["median"]
        found[method] = {
            "seconds": taken,
            "tokens_per_second": tokens / taken["median"],
            "flop_per_second": flops,
            "share_of_peak": flops / peak,
        }
        if profiled:
            found[method]["profile"] = profile(steps[method], device)
    steps.clear()
    if device.type == "cuda":
        gc.collect()  # compiled blocks point at themselves
        torch.cuda.empty_cache()
    for method in methods:
        if method in on_gpu:
            found[method]["peak_gib"], found[method]["seconds to the first step"] = on_gpu[method]
        elif memory:
            found[method]["peak_gib"] = memory_of(method, preset, sequences, dtype, compiled, llamagen)
    return found


def memory_of(
    method: str, preset: str, sequences: int | None, dtype: torch.dtype, compiled: bool, llamagen: Path | None
) -> float:
    """`peak_memory` in a process of its own."""
    told = {"method": method, "preset": preset, "sequences": sequences, "compiled": compiled}
    told |= {"dtype": str(dtype).removeprefix("torch."), "llamagen": None if llamagen is None else str(llamagen)}
    command = [sys.executable, __file__, "--memory-of", json.dumps(told)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def tell_memory(told: dict[str, Any]) -> None:
    """What `memory_of` asks for."""
    device, dtype = choose_device("auto"), getattr(torch, told["dtype"])
    config = configure(told["preset"], told["method"], told["sequences"], told["compiled"])
    llamagen = None if told["llamagen"] is None else Path(told["llamagen"])
    print(peak_memory(lambda: make_step(told["method"], config, llamagen, device, dtype)))


def main() -> None:
    """Measure, print a table, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["photos", "b"])
    parser.add_argument(
        "--sequences", type=int, help="sequences a step; by default a small preset's own 128, and 4 for the others"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--llamagen", type=Path, help="a checkout of LlamaGen, to train beside ours")
    parser.add_argument("--cheaper", action="store_true", help="also ST-AR without a mask, and its contrast alone")
    parser.add_argument("--keep-freed", action=argparse.BooleanOptionalAction, default=True, help="as runs on a CPU do")
    parser.add_argument("--profile", action="store_true", help="also what each step's time goes to")
    parser.add_argument("--name", default="training-cpu")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of is not None:
        tell_memory(json.loads(given.memory_of))
        return
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    results: dict[str, Any] = {}
    with freed_memory_kept() if given.keep_freed else nullcontext():
        for preset in given.presets:
            small = get_preset(f"llamagen-{preset}").model.sequence_length < 256
            sequences = given.sequences or (None if small else 4)
            chosen = (given.rounds, device, dtype, given.compile, given.llamagen, given.profile, given.cheaper)
            results[preset] = measure(preset, sequences, *chosen)
            show(preset, results[preset])
    save(given.name, results)


def show(preset: str, found: dict[str, Any]) -> None:
    """One preset's numbers."""
    print(f"{preset}, {found['tokens_per_step']:,} tokens a step, {found['dtype']}")
    for method in ("AR", *GUIDED, "LlamaGen"):
        if method in found:
            one = found[method]
            print(
                f"  {method:15}{one['seconds']['median']:9.4f} s{one['tokens_per_second']:12,.0f} tokens/s"
                f"{100 * one['share_of_peak']:7.1f} % of peak{one['peak_gib']:8.2f} GiB"
            )
            for row in one.get("profile", []):
                print(f"      {100 * row['share']:5.1f} %  {row['operation']}")
    ratios = {"ST-AR over AR": found["ratio"]} | {
        name: each for name, each in found.items() if name.endswith(" over AR")
    }
    for name, each in ratios.items():
        print(f"  {name}: {each['median']:.3f} ({each['quartile_low']:.3f} to {each['quartile_high']:.3f})")
    print(f"  limit of ST-AR over AR by FLOPs: {found['flop_limit']:.3f}")


if __name__ == "__main__":
    main()
