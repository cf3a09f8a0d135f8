"""Everything that the project owes a GPU, in slices of under ten minutes each.

    PYTHONPATH=src python benchmarks/on_gpu.py check training sampling tokenizing quickstart --out results-folder

Needs no more than torch, numpy, safetensors, pillow, scikit-learn, scikit-image, matplotlib and jinja2, and no installation of
st-ar. Each slice saves its figures as soon as it has them, under the device's name; one that fails says why, and the others go on.

    check        recorded outputs and CPU results agree on the GPU, in float32 and bfloat16
    training     AR and ST-AR step time, tokens/s, model FLOP/s, share of the peak, memory and profile: B, L, XL in bfloat16, compiled
                 blocks, beside LlamaGen's with --llamagen
    sampling     images/s with guidance: B, L, XL, eager and compiled, beside LlamaGen's with --llamagen, and a profile
    tokenizing   images/s of VQ-16's encoder against the plain reading of the architecture
    vqgan        images/s of training VQ-16, before the adversary and with it
    features     images/s of Inception's network (random weights) and of the statistics of 50,000 samples
    cifar10      AR, ST-AR and the inter-view contrast alone for equal steps on --tokens and --test-tokens, stores of CIFAR-10 (ten
                 crops as .tar.xz are a quarter as large to carry): losses, probe, seconds a step, and samples' tokens, which
                 decoded.py makes images of; --minutes of training for each of --methods, --seed
    quickstart   the photographs: trained on the GPU, compared on the CPU
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, save, summarise, synchronise, time_by_operation, time_in_turn
from sampling import bytes_per_image, random_model
from sampling import measure as measure_sampling
from st_ar import load_model
from st_ar.config import PLAIN, VQ_16, VQ_PRESETS, ModelConfig, SampleSettings, VQConfig
from st_ar.data.store import TokenStore
from st_ar.errors import cause
from st_ar.evaluation.generation.inception import Inception
from st_ar.evaluation.likelihood import validation_loss
from st_ar.evaluation.metrics import FeatureStatistics, Gaussian, compare, frechet_distance
from st_ar.evaluation.probe import probe
from st_ar.hardware import choose_device, choose_dtype, full_precision
from st_ar.model.generate import TokenSampler, generate
from st_ar.model.transformer import Transformer
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
SEQUENCES = {"b": 64, "l": 64, "xl": 32}
"""Of a step of the slice training."""
Keep = Callable[[dict[str, Any]], object]
"""Saves what a slice has so far, in case its time ends."""


def check(device: torch.device, small: bool) -> dict[str, Any]:
    """Largest differences between the GPU and the CPU on random weights, with and without a key mask."""
    torch.manual_seed(0)
    config = ModelConfig(dim=64 if small else 256, n_layers=4, n_heads=4, vocab_size=512, grid=8, num_classes=10)
    model = Transformer(config).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)
    tokens, labels = torch.randint(512, (16, 63)), torch.randint(10, (16,))
    key_mask = torch.rand(16, 64) < 0.25
    key_mask[:, 0] = False
    found: dict[str, Any] = {}
    for name, mask in (("causal", None), ("masked", key_mask)):
        with torch.no_grad():
            expected = model.cpu()(tokens, labels, key_mask=mask).logits
            model.to(device)
            moved = None if mask is None else mask.to(device)
            for dtype in (torch.float32, torch.bfloat16):
                with torch.autocast(device.type, dtype=dtype, enabled=dtype == torch.bfloat16):
                    logits = model(tokens.to(device), labels.to(device), key_mask=moved).logits
                error = (logits.float().cpu() - expected).norm() / expected.norm()
                found[f"{name}, {str(dtype).removeprefix('torch.')}"] = error.item()
    greedy = generate(model.cpu(), labels, cfg_scale=2.0, greedy=True)
    for name, compiled in (("greedy tokens equal", False), ("greedy tokens equal, compiled", True)):
        sampler = TokenSampler(
            model.to(device), len(labels), SampleSettings(cfg_scale=2.0), greedy=True, compiled=compiled
        )
        for again in ("", ", second batch"):  # the second replays what the first has recorded
            drawn = sampler.draw(labels.to(device), np.arange(len(labels)), 0).cpu()
            found[name + again] = (drawn == greedy).float().mean().item()
    return found


def training(
    device: torch.device, small: bool, llamagen: Path | None, presets: Sequence[str], keep: Keep
) -> dict[str, Any]:
    """Step times at 64 sequences of 256 tokens (XL: 32)."""
    if small:
        dtype = choose_dtype("auto", device)  # bfloat16 is no type to wait for on a CPU that lacks it
        return {"photos": measure("photos", 8, 3, device, dtype, False, llamagen, True)}
    found: dict[str, Any] = {}
    for preset in presets:
        found[preset] = measure(preset, SEQUENCES[preset], 20, device, torch.bfloat16, True, llamagen, True)
        keep(found)
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
    llamagen: Path | None,
    llamagen_compiled: bool,
    presets: Sequence[str],
    keep: Keep,
) -> dict[str, Any]:
    """Images/s with guidance 2 in bfloat16, eager attention and compiled, beside LlamaGen's if its checkout is given; each as a share
    of what the memory's bandwidth allows; and what a batch's time goes to.
    """
    speed = bandwidth(device, small)
    found: dict[str, Any] = {"bytes per second of a copy": speed}
    cases = {preset: {"b": (1, 8, 32, 256), "l": (1, 8, 256), "xl": (128,)}[preset] for preset in presets}
    for preset, batches in {"photos": (8,)}.items() if small else cases.items():
        config = get_preset(f"llamagen-{preset}").model
        for batch in batches:
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
    found["profile"] = profile(device, "photos" if small else "b", 8 if small else 256, compiled=not small)
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


def photographs(_device: torch.device, small: bool) -> dict[str, Any]:
    """The quickstart's summary."""
    from st_ar.quickstart import quickstart

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quickstart"
        quickstart(out, steps=5 if small else None)
        return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def tokenizing(device: torch.device, small: bool) -> dict[str, Any]:
    """Images/s of VQ-16's encoder at 256 px."""
    if small:
        tiny = random_tokenizer(VQConfig(channels=32, multipliers=(1, 2), codebook_size=64))
        return measure_encoding(tiny, torch.rand(2, 3, 32, 32) * 2 - 1, 2, device)
    tokenizer = random_tokenizer(VQ_16)
    return {
        f"batch {batch}": measure_encoding(tokenizer, torch.rand(batch, 3, 256, 256) * 2 - 1, 10, device)
        for batch in (16, 64)
    }


def vqgan(device: torch.device, small: bool) -> dict[str, Any]:
    """Images/s of a training step of VQ-16 at 256 px in bfloat16, without the perceptual loss, whose weights are a package of their own."""
    preset = replace(VQ_PRESETS["vq-cifar10" if small else "vq-16"](), perceptual_weight=0.0, dtype="bfloat16")
    count, side = (4, 32) if small else (16, 256)
    found: dict[str, Any] = {"images a step": count}
    for name, start in (("without the adversary", 10**9), ("with the adversary", 0)):
        training = VQLearner(replace(preset, adversary=replace(preset.adversary, start=start)), device)
        training.share()
        images = torch.rand(count, 3, side, side, device=device) * 2 - 1
        images = images.contiguous(memory_format=training.layout)
        step = iter(range(1, 10**6))
        action = partial(lambda t, x, n: t.step(x, next(n), 1e-4), training, images, step)
        taken = summarise(time_in_turn({"step": action}, rounds=10, warmup=3, device=device)["step"])
        found[name] = {"seconds": taken, "images_per_second": count / taken["median"]}
    return found


def features(device: torch.device, small: bool) -> dict[str, Any]:
    """Images/s of Inception's network in float32 at 299 px, and the seconds of FID's and precision's statistics over its features."""
    count, samples = (2, 200) if small else (64, 50_000)
    network = Inception().to(device).eval()
    images = torch.randint(256, (count, 256, 256, 3), dtype=torch.uint8, device=device)
    with torch.no_grad(), full_precision():  # as `st-ar evaluate` has it
        taken = time_in_turn({"network": lambda: network(images)}, rounds=5, warmup=2, device=device)["network"]
    found: dict[str, Any] = {"Inception, images/s": count / summarise(taken)["median"]}
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
    tokens: Path,
    test_tokens: Path,
    methods: Sequence[str],
    minutes: float,
    seed: int,
    out: Path,
    keep: Keep,
) -> dict[str, Any]:
    """The `methods`, B's network on 8 x 8 tokens, as many steps of 256 images for each as `minutes` allow ST-AR."""
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
    steps = 20 if small else max(20, round(60 * minutes / pace / 10) * 10)
    found: dict[str, Any] = {"steps": steps, "seed": seed}
    samples: dict[str, Any] = {}
    for name in methods:
        config = replace(guided, selfguided=METHODS[name], steps=steps, checkpoint_every=steps)
        with tempfile.TemporaryDirectory() as folder:
            run = train(config, tokens, Path(folder) / "run")
            result: dict[str, Any] = {"seconds_per_step": seconds_per_step(run)}
            for weights in ("live", "EMA"):
                model = load_model(run, ema=weights == "EMA").to(device)
                labels = torch.arange(100 if small else 10_000, device=device) % model.config.num_classes
                drawn = [generate(model, part, seed=seed, images=part_of) for part, part_of in _parts(labels, 1000)]
                samples[f"{name}-{weights}"] = torch.cat(drawn).cpu().numpy().astype(np.uint16)
                result[weights] = {
                    "validation loss": validation_loss(model, test_store),
                    "probe": probe(model, store, test_store, train_crops=[CENTRE]).top1,
                }
            found[name] = result
        np.savez_compressed(out / f"cifar10-samples-seed{seed}.npz", **samples)
        keep(found)
    return found


def _parts(labels: torch.Tensor, size: int) -> list[tuple[torch.Tensor, np.ndarray]]:
    """Labels, so many at a time, with the numbers of their images."""
    numbers = np.arange(len(labels))
    return [(labels[i : i + size], numbers[i : i + size]) for i in range(0, len(labels), size)]


SLICES = {
    "check": check,
    "training": training,
    "sampling": sampling,
    "tokenizing": tokenizing,
    "vqgan": vqgan,
    "features": features,
    "cifar10": cifar10,
    "quickstart": photographs,
}


def main() -> None:
    """Run the slices asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slices", nargs="+", choices=list(SLICES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--llamagen", type=Path, help="a checkout of LlamaGen, to train and sample with beside ours")
    parser.add_argument(
        "--llamagen-compiled", action="store_true", help="sample with LlamaGen's compiled too: minutes more"
    )
    parser.add_argument(
        "--presets", nargs="+", choices=list(SEQUENCES), default=list(SEQUENCES), help="of training and sampling"
    )
    parser.add_argument("--revision", help="commit of this code, where there is no clone to ask")
    parser.add_argument("--tokens", type=Path, help="token store of CIFAR-10's training images")
    parser.add_argument("--test-tokens", type=Path, help="token store of its test images")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="of the slice cifar10"
    )
    parser.add_argument("--minutes", type=float, default=2.2, help="training of each method in the slice cifar10")
    parser.add_argument("--seed", type=int, default=0, help="of the slice cifar10")
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes on whatever is here, to see that the script works"
    )
    given = parser.parse_args()
    if "cifar10" in given.slices and None in (given.tokens, given.test_tokens):
        parser.error("the slice cifar10 needs --tokens and --test-tokens")
    device = choose_device("auto")
    if device.type != "cuda" and not given.small:
        sys.exit("torch sees no GPU here; --small tries the script on a CPU")
    name = "small" if given.small else torch.cuda.get_device_name().lower().replace(" ", "-")
    given.out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    for part in given.slices:
        last: dict[str, Any] = {"revision": given.revision} if given.revision else {}

        def keep(found: dict[str, Any], part: str = part, last: dict[str, Any] = last) -> None:
            last.update(found)
            save(f"{name}-{part}", last, folder=given.out)

        begun = time.perf_counter()
        sizes = {"llamagen": given.llamagen, "presets": given.presets}
        stores = {
            "tokens": given.tokens,
            "test_tokens": given.test_tokens,
            "methods": given.methods,
            "minutes": given.minutes,
            "seed": given.seed,
            "keep": keep,
        }
        extra: dict[str, dict[str, Any]] = {
            "training": sizes | {"keep": keep},
            "sampling": sizes | {"llamagen_compiled": given.llamagen_compiled, "keep": keep},
            "cifar10": stores | {"out": given.out},
        }
        try:
            results = SLICES[part](device, given.small, **extra.get(part, {}))
            print(json.dumps(results, indent=1)[:3000])
            keep(results)
        except Exception as error:
            traceback.print_exc()
            keep({"failed": cause(error)})
            failed.append(part)
        print(f"{part}: {time.perf_counter() - begun:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
