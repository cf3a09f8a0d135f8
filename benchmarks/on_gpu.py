r"""What the project checks and measures on a GPU, in slices of a few minutes each.

    PYTHONPATH=src python benchmarks/on_gpu.py check training sampling --out results-folder

It needs torch, numpy, safetensors, pillow, scikit-learn, scikit-image, matplotlib and jinja2, no network and no installation of
st-ar. With tyro, `check` also starts a run by the command line. Each slice is a process of its own and saves its figures under the
device's name as soon as it has them. It stops at its limit of seconds (--limit-s) with what it has, and prints how long it took.
A slice that fails says why, and the others go on; the exit status is then 1.

    check        the GPU against the CPU: losses and gradients of AR and ST-AR, class and text, eager and compiled, in float32 and
                 bfloat16; logits and greedy tokens; VQ codes; codebook revival; checkpoints saved during training and resumed; and
                 `st-ar train`. Each number has a tolerance
    training     AR and ST-AR step time, tokens/s, model FLOP/s, share of the peak, memory and profile: B, L, XL in bfloat16, compiled
                 blocks, 64 sequences, beside LlamaGen's with --llamagen
    compile      the same of B, eager against compiled, and the seconds until the first step is done
    attention    ways to compute masked attention, forward and backward: ms, TFLOP/s and agreement with float32
    sampling     images/s with guidance: B, L, XL, eager and compiled, beside LlamaGen's with --llamagen, and a profile
    tokenizing   images/s of VQ-16's encoder against the plain reading of the architecture
    vqgan        images/s of training VQ-16, before the adversary and with it
    features     images/s of Inception's network (random weights) and of the statistics of 50,000 samples
    cifar10      AR, ST-AR and the inter-view contrast alone for equal steps on --tokens and --test-tokens, stores of CIFAR-10 (ten
                 crops as .tar.xz are a quarter as large to carry): losses, probe, seconds a step, and samples' tokens, of which
                 decoded.py makes images for `st-ar evaluate --classifier`; --minutes of training for each of --methods, --seed
    quickstart   the photographs: trained on the GPU, compared on the CPU

With 15 minutes on a GPU, run first, in about 6 minutes:

    python benchmarks/on_gpu.py check training sampling vqgan features --presets b \
      --limit-s check=150 training=70 sampling=60 vqgan=35 features=25 --out out

then, in about 5 minutes:

    python benchmarks/on_gpu.py training attention compile --presets l xl \
      --limit-s training=170 attention=75 compile=60 --out out

The next 15 minutes, with a checkout of LlamaGen and stores of CIFAR-10, in two calls of about 6 minutes:

    python benchmarks/on_gpu.py training sampling --llamagen LlamaGen --presets b l --limit-s 170 --out out
    python benchmarks/on_gpu.py cifar10 tokenizing --tokens tokens --test-tokens tokens-test \
      --limit-s cifar10=240 tokenizing=80 --out out
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gpu_attention
import gpu_checks
from common import RESULTS, Budget, save, summarise, synchronise, time_by_operation, time_in_turn
from sampling import bytes_per_image, random_model
from sampling import measure as measure_sampling
from st_ar import load_model
from st_ar.config import PLAIN, VQ_16, VQ_PRESETS, SampleSettings, VQConfig
from st_ar.data.store import TokenStore
from st_ar.errors import cause
from st_ar.evaluation.generation.inception import Inception
from st_ar.evaluation.likelihood import validation_loss
from st_ar.evaluation.metrics import FeatureStatistics, Gaussian, compare, frechet_distance
from st_ar.evaluation.probe import probe
from st_ar.hardware import choose_device, choose_dtype, full_precision
from st_ar.model.generate import TokenSampler
from st_ar.presets import get_preset
from st_ar.training.loop import train
from st_ar.training.run import seconds_per_step
from st_ar.training.vqgan import VQLearner
from tokenizing import measure_encoding, random_tokenizer
from training import measure, our_step

CENTRE = 4
"""The crop that probes read."""
METHODS = {
    "control": PLAIN,
    "st-ar": get_preset("st-ar-cifar10").selfguided,
    "view": replace(get_preset("st-ar-cifar10").selfguided, alpha=0.0, mask_ratio=0.0, step_loss=False),
}
"""What the slice cifar10 compares: plain training on the same views, the full method, the inter-view contrast alone."""
PRESETS = ("b", "l", "xl")
SEQUENCES = 64
"""Sequences in a step of the slices training and compile."""
LIMITS = {
    "check": 150,
    "training": 240,
    "compile": 90,
    "attention": 90,
    "sampling": 240,
    "tokenizing": 120,
    "vqgan": 60,
    "features": 60,
    "cifar10": 240,
    "quickstart": 240,
}
"""Seconds of each slice. After the last case within them it stops by itself."""
GRACE = 30
"""Seconds over its limit, its start among them, after which a slice is killed."""
Keep = Callable[[dict[str, Any]], object]
"""Saves what a slice has so far, in case its time ends."""


def check(_device: torch.device, small: bool, budget: Budget, keep: Keep) -> dict[str, Any]:
    """Every number of gpu_checks.py, all groups at the same time.

    Raises:
        ValueError: some do not pass.
    """
    lines: list[dict[str, Any]] = []
    lock, script = threading.Lock(), Path(gpu_checks.__file__)
    threads = max(1, (os.cpu_count() or 1) // len(gpu_checks.GROUPS))

    def add(line: dict[str, Any]) -> None:
        with lock:
            lines.append(line)
            if not line["passed"]:
                print(f"FAILED: {json.dumps(line)}", flush=True)
            keep({"checks": lines, "passed": sum(line["passed"] for line in lines), "of": len(lines)})

    def follow(group: str) -> None:
        command = [sys.executable, str(script), group, *(["--small"] if small else [])]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            killer = threading.Timer(max(1.0, budget.left()), process.kill)
            killer.start()
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    add(json.loads(line))
            status = process.wait()
            killer.cancel()
        add({"name": f"{group}: exit status", "value": status, "tolerance": 0, "passed": status == 0})

    with ThreadPoolExecutor(len(gpu_checks.GROUPS)) as pool:
        list(pool.map(follow, gpu_checks.GROUPS))
    if failed := [line["name"] for line in lines if not line["passed"]]:
        raise ValueError(f"{len(failed)} of {len(lines)} checks failed: {'; '.join(failed)}")
    return {}


def training(
    device: torch.device, small: bool, budget: Budget, keep: Keep, llamagen: Path | None, presets: Sequence[str]
) -> dict[str, Any]:
    """Step times at 64 sequences of 256 tokens."""
    if small:
        dtype = choose_dtype("auto", device)  # bfloat16 is no type to wait for on a CPU that lacks it
        return {"photos": measure("photos", 8, 3, device, dtype, False, llamagen, True)}
    found: dict[str, Any] = {}
    for preset in budget.cases(presets):
        found[preset] = measure(preset, SEQUENCES, 20, device, torch.bfloat16, True, llamagen, True)
        keep(found)
    return found


def compilation(device: torch.device, small: bool, budget: Budget, keep: Keep) -> dict[str, Any]:
    """Step times of B, eager and compiled."""
    dtype, found = choose_dtype("auto", device), dict[str, Any]()
    sizes = ("photos", 8, 3) if small else ("b", SEQUENCES, 20)
    for name in budget.cases(("eager", "compiled")):
        found[name] = measure(*sizes, device, dtype, name == "compiled", memory=not small)
        keep(found)
    if len(found) == 2:
        for method in ("AR", "ST-AR"):
            eager, compiled = (found[name][method]["seconds"]["median"] for name in ("eager", "compiled"))
            found[f"{method}: eager takes times as long"] = eager / compiled
    return found


def attention(device: torch.device, small: bool, budget: Budget, keep: Keep) -> dict[str, Any]:
    """Ways to compute attention.

    Raises:
        ValueError: some fail, or differ from float32.
    """
    found = gpu_attention.attention(device, small, budget, keep)
    failed = [f"{shape}: {way}" for shape, ways in found.items() for way, one in ways.items() if not one["passed"]]
    if failed:
        raise ValueError(f"these ways fail or differ from float32: {'; '.join(failed)}")
    return found


def bandwidth(device: torch.device, small: bool) -> float:
    """Bytes/s of a large copy, read and written."""
    source = torch.randn(2**16 if small else 2**30, device=device)
    target = torch.empty_like(source)
    times = time_in_turn({"copy": lambda: target.copy_(source)}, rounds=10, warmup=3, device=device)["copy"]
    return 2 * source.nbytes / statistics.median(times)


def sampling(
    device: torch.device,
    small: bool,
    budget: Budget,
    keep: Keep,
    llamagen: Path | None,
    presets: Sequence[str],
    llamagen_compiled: bool,
) -> dict[str, Any]:
    """Images/s with guidance 2 in bfloat16, eager attention and compiled, beside LlamaGen's if its checkout is given; each as a share
    of what the memory's bandwidth allows; and what a batch's time goes to.
    """
    speed = bandwidth(device, small)
    found: dict[str, Any] = {"bytes per second of a copy": speed}
    batches = (
        {"photos": (8,)}
        if small
        else {preset: {"b": (256, 8, 1), "l": (256, 8), "xl": (128,)}[preset] for preset in presets}
    )
    for preset, batch in budget.cases([(preset, batch) for preset, some in batches.items() for batch in some]):
        config = get_preset(f"llamagen-{preset}").model
        case = measure_sampling(
            preset,
            batch,
            3,
            device,
            llamagen=llamagen,
            dtypes=(torch.bfloat16,),
            compiled=not small,
            llamagen_compiled=llamagen_compiled,
        )
        bound = speed / bytes_per_image(config, batch)
        for result in case.values():
            if "images_per_second" in result:
                result["share of the bound"] = result["images_per_second"] / bound
        found[f"{preset}, batch {batch}"] = {"images/s that the bandwidth allows": bound, **case}
        keep(found)
    for preset in budget.cases(["photos" if small else presets[0]]):
        found["profile"] = profile(device, preset, 8 if small else 128, compiled=not small)
    return found


def profile(device: torch.device, preset: str, batch: int, *, compiled: bool) -> list[dict[str, Any]]:
    """The kernels that a batch's time goes to, most first."""
    model = random_model(get_preset(f"llamagen-{preset}").model).to(device, torch.bfloat16)
    sampler = TokenSampler(model, batch, SampleSettings(cfg_scale=2.0), compiled=compiled)
    labels, numbers = torch.arange(batch, device=device) % model.config.num_classes, np.arange(batch)
    sampler.draw(labels, numbers, 0)
    with torch.profiler.profile() as profiler:
        sampler.draw(labels, numbers, 0)
        synchronise(device)
    times = time_by_operation(profiler, device)
    return [{"kernel": name[:200], "ms": 1e3 * taken, "calls": calls} for name, taken, calls in times[:20]]


def photographs(_device: torch.device, small: bool, _budget: Budget, _keep: Keep) -> dict[str, Any]:
    """The quickstart's summary; --small takes the digits, which are fewer."""
    from st_ar import quickstart

    if small:
        quickstart.SAMPLES = 64
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quickstart"
        quickstart.quickstart(out, images="digits" if small else "photos", steps=5 if small else None)
        return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def tokenizing(device: torch.device, small: bool, budget: Budget, keep: Keep) -> dict[str, Any]:
    """Images/s of VQ-16's encoder at 256 px."""
    if small:
        tiny = random_tokenizer(VQConfig(channels=32, multipliers=(1, 2), codebook_size=64))
        return measure_encoding(tiny, torch.rand(2, 3, 32, 32) * 2 - 1, 2, device)
    tokenizer, found = random_tokenizer(VQ_16), dict[str, Any]()
    for batch in budget.cases((64, 16)):
        found[f"batch {batch}"] = measure_encoding(tokenizer, torch.rand(batch, 3, 256, 256) * 2 - 1, 10, device)
        keep(found)
    return found


def vqgan(device: torch.device, small: bool, budget: Budget, keep: Keep) -> dict[str, Any]:
    """Images/s of a training step of VQ-16 at 256 px in bfloat16, without the perceptual loss, whose weights are a package of their own."""
    preset = replace(VQ_PRESETS["vq-cifar10" if small else "vq-16"](), perceptual_weight=0.0, dtype="bfloat16")
    count, side = (4, 32) if small else (16, 256)
    found: dict[str, Any] = {"images a step": count}
    for name, start in budget.cases((("without the adversary", 10**9), ("with the adversary", 0))):
        training = VQLearner(replace(preset, adversary=replace(preset.adversary, start=start)), device)
        training.share()
        images = torch.rand(count, 3, side, side, device=device) * 2 - 1
        images = images.contiguous(memory_format=training.layout)
        step = iter(range(1, 10**6))
        action = partial(lambda t, x, n: t.step(x, next(n), 1e-4), training, images, step)
        taken = summarise(time_in_turn({"step": action}, rounds=10, warmup=3, device=device)["step"])
        found[name] = {"seconds": taken, "images_per_second": count / taken["median"]}
        keep(found)
    return found


def features(device: torch.device, small: bool, _budget: Budget, keep: Keep) -> dict[str, Any]:
    """Images/s of Inception's network in float32 at 299 px, and the seconds of FID's and precision's statistics over its features."""
    count, samples = (2, 200) if small else (64, 50_000)
    network = Inception().to(device).eval()
    images = torch.randint(256, (count, 256, 256, 3), dtype=torch.uint8, device=device)
    with torch.no_grad(), full_precision():  # as `st-ar evaluate` has it
        taken = time_in_turn({"network": lambda: network(images)}, rounds=5, warmup=2, device=device)["network"]
    found: dict[str, Any] = {"Inception, images/s": count / summarise(taken)["median"]}
    keep(found)
    generator = torch.Generator(device).manual_seed(0)
    sets = [torch.randn(n, 2048, generator=generator, device=device).abs() for n in (samples, max(100, samples // 5))]
    begun = time.perf_counter()
    moments: list[Gaussian] = []
    for each in sets:
        seen = FeatureStatistics(2048, device)
        for part in each.split(count):
            seen.update(part)
        moments.append(seen.result())
    frechet_distance(*moments[0], *moments[1])
    found["FID from features, s"] = time.perf_counter() - begun
    begun = time.perf_counter()
    compare(sets[1], sets[0], k=3, density_k=None)
    synchronise(device)
    found["precision and recall, s"] = time.perf_counter() - begun
    return found


def cifar10(
    device: torch.device,
    small: bool,
    budget: Budget,
    keep: Keep,
    tokens: Path,
    test_tokens: Path,
    methods: Sequence[str],
    minutes: float | None,
    seed: int,
    out: Path,
) -> dict[str, Any]:
    """The `methods`, B's network on 8 x 8 tokens, as many steps of 256 images for each as `minutes` allow ST-AR.

    All are trained first; then losses, probes and samples as far as the time goes, EMA weights first.
    """
    store, test_store = TokenStore(tokens), TokenStore(test_tokens)
    guided = replace(get_preset("st-ar-cifar10"), seed=seed, compile=device.type == "cuda", log_every=100)
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 2} if small else {"dim": 768, "n_layers": 12, "n_heads": 12}
    guided = replace(
        guided,
        model=replace(guided.model, vocab_size=store.meta.vocab_size, **sizes),
        batch_size=8 if small else 256,
        optim=replace(guided.optim, lr=1e-3 if small else 4e-4, warmup_steps=10 if small else 500),
    )
    step = our_step(guided, device, choose_dtype("auto", device))
    pace = summarise(time_in_turn({"step": step}, rounds=3 if small else 20, warmup=5, device=device)["step"])["median"]
    del step
    seconds = 0.5 * budget.left() / len(methods) if minutes is None else 60 * minutes
    steps = 20 if small else max(20, round(seconds / pace / 10) * 10)
    guided = replace(guided, optim=replace(guided.optim, warmup_steps=min(guided.optim.warmup_steps, steps // 4)))
    found: dict[str, Any] = {"steps": steps, "seed": seed}
    samples: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Path] = {}
        for name in budget.cases(methods):
            config = replace(guided, selfguided=METHODS[name], steps=steps, checkpoint_every=steps)
            runs[name] = train(config, tokens, Path(folder) / name)
            found[name] = {"seconds_per_step": seconds_per_step(runs[name])}
            keep(found)
        for weights, name in budget.cases([(weights, name) for weights in ("EMA", "live") for name in runs]):
            model = load_model(runs[name], ema=weights == "EMA").to(device)
            found[name][weights] = {
                "validation loss": validation_loss(model, test_store),
                "probe": probe(model, store, test_store, train_crops=[CENTRE]).top1,
            }
            keep(found)
            labels = torch.arange(100 if small else 10_000, device=device) % model.config.num_classes
            sampler = TokenSampler(model, min(1000, len(labels)), SampleSettings(cfg_scale=1.0))
            drawn = [sampler.draw(part, part_of, seed) for part, part_of in _parts(labels, len(sampler.tokens))]
            samples[f"{name}-{weights}"] = torch.cat(drawn).cpu().numpy().astype(np.uint16)
            drawn_classes = labels.cpu().numpy().astype(np.int32)
            np.savez_compressed(out / f"cifar10-samples-seed{seed}.npz", labels=drawn_classes, **samples)
    return found


def _parts(labels: torch.Tensor, size: int) -> list[tuple[torch.Tensor, np.ndarray]]:
    """Labels, so many at a time, with the numbers of their images."""
    numbers = np.arange(len(labels))
    return [(labels[i : i + size], numbers[i : i + size]) for i in range(0, len(labels), size)]


SLICES: dict[str, Callable[..., dict[str, Any]]] = {
    "check": check,
    "training": training,
    "compile": compilation,
    "attention": attention,
    "sampling": sampling,
    "tokenizing": tokenizing,
    "vqgan": vqgan,
    "features": features,
    "cifar10": cifar10,
    "quickstart": photographs,
}


def run(part: str, given: argparse.Namespace, limit: float) -> bool:
    """Run a slice in this process; returns whether it went well."""
    begun, budget = time.perf_counter(), Budget(limit)
    device = choose_device("auto")
    if device.type != "cuda" and not given.small:
        sys.exit("torch sees no GPU here; --small tries the script on a CPU")
    name = "small" if given.small else torch.cuda.get_device_name().lower().replace(" ", "-")
    sized = part in ("training", "sampling")
    name = "-".join([name, part, *(given.presets if sized and given.presets else [])])
    name += "-llamagen" if sized and given.llamagen else ""
    given.out.mkdir(parents=True, exist_ok=True)
    last: dict[str, Any] = {"revision": given.revision} if given.revision else {}

    def keep(found: dict[str, Any], **state: Any) -> None:
        last.update(found)
        save(name, last | (state or {"unfinished": True}), folder=given.out, quiet=not state)

    sizes = {"llamagen": given.llamagen, "presets": given.presets or PRESETS}
    stores = {name: getattr(given, name) for name in ("tokens", "test_tokens", "methods", "minutes", "seed", "out")}
    extra: dict[str, dict[str, Any]] = {
        "training": sizes,
        "sampling": sizes | {"llamagen_compiled": given.llamagen_compiled},
        "cifar10": stores,
    }
    state: dict[str, Any] = {}
    try:
        results = SLICES[part](device, given.small, budget, keep, **extra.get(part, {}))
        print(json.dumps(results)[:1500])
        last.update(results)
    except Exception as error:
        traceback.print_exc()
        state["failed"] = str(error) if isinstance(error, ValueError) else cause(error)
    if budget.left_out:
        state["no time for"] = budget.left_out
    seconds = time.perf_counter() - begun
    keep({}, seconds=round(seconds), **state)
    print(f"{part}: {seconds:.0f} s{', failed' if 'failed' in state else ''}", flush=True)
    return "failed" not in state


def run_apart(part: str, limit: float) -> bool:
    """Run a slice in a process of its own, which is killed with all that it started if it does not keep its limit."""
    begun = time.perf_counter()
    command = [sys.executable, __file__, *sys.argv[1:], "--only", part]
    with subprocess.Popen(command, process_group=0) as process:
        try:
            return process.wait(limit + GRACE) == 0
        except subprocess.TimeoutExpired:
            print(f"{part}: {time.perf_counter() - begun:.0f} s, killed; what it had is saved", flush=True)
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def read_limits(given: Sequence[str]) -> dict[str, float]:
    """Seconds of each slice, from SECONDS for all and SLICE=SECONDS for one."""
    limits: dict[str, float] = dict(LIMITS)
    for word in sorted(given, key=lambda word: "=" in word):
        name, _, seconds = word.rpartition("=")
        limits |= dict.fromkeys([name] if name else LIMITS, float(seconds))
    return limits


def main() -> None:
    """Run the slices asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slices", nargs="+", choices=list(SLICES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--limit-s", nargs="+", default=[], metavar="[SLICE=]SECONDS", help="seconds of each slice, or of one"
    )
    parser.add_argument("--llamagen", type=Path, help="a checkout of LlamaGen, to train and sample with beside ours")
    parser.add_argument(
        "--llamagen-compiled", action="store_true", help="sample with LlamaGen's compiled too: minutes more"
    )
    parser.add_argument("--presets", nargs="+", choices=PRESETS, help="of training and sampling; by default all")
    parser.add_argument("--revision", help="commit of this code, where there is no clone to ask")
    parser.add_argument("--tokens", type=Path, help="token store of CIFAR-10's training images")
    parser.add_argument("--test-tokens", type=Path, help="token store of its test images")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="of the slice cifar10"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="training of each method in the slice cifar10; by default half of the slice's time",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the slice cifar10")
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes on whatever is here, to see that the script works"
    )
    parser.add_argument("--only", choices=list(SLICES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if "cifar10" in given.slices and None in (given.tokens, given.test_tokens):
        parser.error("the slice cifar10 needs --tokens and --test-tokens")
    try:
        limits = read_limits(given.limit_s)
    except ValueError as error:
        parser.error(f"--limit-s: {error}")
    if unknown := limits.keys() - LIMITS.keys():
        parser.error(f"--limit-s names no slice: {', '.join(unknown)}")
    if given.only:
        sys.exit(0 if run(given.only, given, limits[given.only]) else 1)
    failed = [part for part in given.slices if not run_apart(part, limits[part])]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
