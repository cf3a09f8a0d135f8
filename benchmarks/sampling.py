"""Images/s of sampling with guidance, beside LlamaGen's own `generate` from a checkout that you provide, in one run.

    python benchmarks/sampling.py --llamagen PATH

Both get the same random weights of the size of B or L, guidance 2, temperature 1, all tokens to draw from, and each its best of
float32 and bfloat16. Dtypes and rounds take turns. Ours is a `TokenSampler`, as `st-ar sample` holds one for all its batches; what it
takes to make one and to draw the first batch is told apart.
"""

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import ratio, save, summarise, synchronise, time_in_turn
from st_ar.config import ModelConfig, SampleSettings
from st_ar.errors import cause
from st_ar.hardware import choose_device
from st_ar.model.generate import TokenSampler
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset

DTYPES = (torch.float32, torch.bfloat16)


def random_model(config: ModelConfig) -> Transformer:
    """Weights that give every token a chance."""
    torch.manual_seed(0)
    with choose_device("auto"):
        model = Transformer(config).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return model


def theirs(path: Path, model: Transformer) -> tuple[Any, Callable[..., torch.Tensor]]:
    """LlamaGen's transformer with the model's weights, and its `generate`."""
    sys.path.insert(0, str(path))
    gpt = importlib.import_module("autoregressive.models.gpt")
    their_generate = importlib.import_module("autoregressive.models.generate").generate
    c = model.config
    sizes = {"dim": c.dim, "n_layer": c.n_layers, "n_head": c.n_heads, "block_size": c.sequence_length}
    args = gpt.ModelArgs(vocab_size=c.vocab_size, num_classes=c.num_classes, **sizes)
    twin = gpt.Transformer(args)
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin.eval(), their_generate


def bytes_per_image(config: ModelConfig, batch: int, *, width: int = 2) -> float:
    """The least that decoding with guidance must read: in each step the matrices once, and the filled part of the cache."""
    matrices = config.n_layers * (4 * config.dim**2 + 3 * config.dim * config.hidden_dim)
    matrices += config.dim * config.vocab_size
    length = config.sequence_length
    cache = 2 * (length + 1) / 2 * config.n_layers * 2 * config.dim  # of an image and its null sequence, on average
    return length * width * (matrices / batch + cache)


def measure(
    preset: str,
    batch: int,
    rounds: int,
    device: torch.device,
    *,
    llamagen: Path | None = None,
    tokens: int | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    compiled: bool = False,
    llamagen_compiled: bool = False,
) -> dict[str, Any]:
    """Seconds and images/s of each implementation and type, and LlamaGen's best over our best.

    LlamaGen's is eager, as its sample_c2i.py has it by default; `llamagen_compiled` measures it compiled too, as sample_c2i_ddp.py has
    it. What it cannot do is said under "failed".
    """
    config = get_preset(f"llamagen-{preset}").model
    model, labels, numbers = random_model(config), torch.arange(batch, device=device), np.arange(batch)
    count = tokens or config.sequence_length
    actions: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    failed: dict[str, str] = {}

    def add_ours(name: str, dtype: torch.dtype, compiled: bool) -> None:
        ours = deepcopy(model).to(device, dtype)
        begun = time.perf_counter()
        sampler = TokenSampler(ours, batch, SampleSettings(cfg_scale=2.0), compiled=compiled)
        sampler.draw(labels, numbers, 0, num_tokens=count)
        synchronise(device)
        first[name] = time.perf_counter() - begun
        actions[name] = lambda: sampler.draw(labels, numbers, 0, num_tokens=count)

    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        add_ours(f"ours, {name}", dtype, False)
        if compiled:
            add_ours(f"ours, {name}, compiled", dtype, True)
        if llamagen is not None:
            twin, their_generate = theirs(llamagen, model)
            twin = twin.to(device, dtype)

            def draw(m: Any = twin, g: Callable[..., torch.Tensor] = their_generate) -> torch.Tensor:
                return g(m, labels, count, cfg_scale=2.0, temperature=1.0, top_k=0, top_p=1.0, sample_logits=True)

            actions[f"LlamaGen, {name}"] = draw
            if llamagen_compiled:  # as its sample_c2i_ddp.py does
                begun = time.perf_counter()
                called = partial(draw, torch.compile(deepcopy(twin), mode="reduce-overhead", fullgraph=True))
                try:
                    called()
                except Exception as error:
                    failed[f"LlamaGen, {name}, compiled"] = cause(error)
                else:
                    synchronise(device)
                    first[f"LlamaGen, {name}, compiled"] = time.perf_counter() - begun
                    actions[f"LlamaGen, {name}, compiled"] = called
    times = time_in_turn(actions, rounds=rounds, warmup=int(device.type == "cuda"), device=device)
    found: dict[str, Any] = {
        name: {"seconds": summarise(taken), "images_per_second": batch / summarise(taken)["median"]}
        for name, taken in times.items()
    }
    for name, seconds in first.items():
        found[name]["made and drawn first in"] = seconds
    best = {
        who: min((name for name in found if name.startswith(who)), key=lambda name: found[name]["seconds"]["median"])
        for who in ("ours", "LlamaGen")
        if any(name.startswith(who) for name in found)
    }
    if "LlamaGen" in best:
        found["LlamaGen's best takes times as long as our best"] = {
            "of": list(best.values()),
            **ratio(times[best["LlamaGen"]], times[best["ours"]]),
        }
    return found | ({"failed": failed} if failed else {})


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llamagen", type=Path, help="a checkout of LlamaGen; without it ours is measured alone")
    parser.add_argument("--cases", nargs="+", default=["b:1", "b:8", "b:32", "l:1", "l:8"], metavar="PRESET:BATCH")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="tokens of an image; by default all 256")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--compiled", action="store_true", help="measure compiled steps too")
    parser.add_argument("--llamagen-compiled", action="store_true", help="measure LlamaGen's compiled too")
    parser.add_argument("--name", default="sampling-cpu")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # LlamaGen's
    device = choose_device("auto")
    results: dict[str, Any] = {}
    for case in given.cases:
        preset, batch = case.split(":")
        key = f"{preset}, batch {batch}"
        results[key] = measure(
            preset,
            int(batch),
            given.rounds,
            device,
            llamagen=given.llamagen,
            tokens=given.tokens,
            dtypes=tuple(dtype for dtype in DTYPES if str(dtype).removeprefix("torch.") in given.dtypes),
            compiled=given.compiled,
            llamagen_compiled=given.llamagen_compiled,
        )
        for name, r in results[key].items():
            if name == "failed":
                continue
            text = f"{r['images_per_second']:.3f} images/s" if "seconds" in r else f"{r['median']:.2f}"
            print(f"{key:14}{name:54}{text}", flush=True)
    save(given.name, results)


if __name__ == "__main__":
    main()
