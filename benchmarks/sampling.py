"""Images/s of `generate` with guidance, beside LlamaGen's own `generate` from a checkout that you provide, in one run.

    python benchmarks/sampling.py --llamagen PATH

Both get the same random weights of the size of B or L, guidance 2, temperature 1, no top-k (top-k 0 in both), and their best type of
the two that they can compute in; each is measured in both. The dtypes and rounds take turns.
"""

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import ratio, save, summarise, time_in_turn
from st_ar.hardware import choose_device
from st_ar.model.generate import generate
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset

DTYPES = (torch.float32, torch.bfloat16)


def theirs(path: Path, model: Transformer) -> tuple[Any, Callable[..., torch.Tensor]]:
    """LlamaGen's transformer with the model's weights, and its `generate`."""
    sys.path.insert(0, str(path))
    gpt = importlib.import_module("autoregressive.models.gpt")
    their_generate = importlib.import_module("autoregressive.models.generate").generate
    c = model.config
    args = gpt.ModelArgs(dim=c.dim, n_layer=c.n_layers, n_head=c.n_heads, vocab_size=c.vocab_size, block_size=c.grid**2)
    twin = gpt.Transformer(args)
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin.eval(), their_generate


def measure(
    preset: str, batch: int, rounds: int, device: torch.device, llamagen: Path | None, tokens: int | None
) -> dict[str, Any]:
    """Seconds and images/s of each implementation and type, and LlamaGen's best over our best."""
    torch.manual_seed(0)
    config = get_preset(f"llamagen-{preset}").model
    model = Transformer(config).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)
    labels = torch.arange(batch, device=device)
    count = tokens or config.sequence_length
    actions: dict[str, Callable[[], object]] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        ours = Transformer(config).eval()
        ours.load_state_dict(model.state_dict())
        ours = ours.to(device, dtype)
        actions[f"ours, {name}"] = lambda m=ours: generate(m, labels, cfg_scale=2.0, seed=0, num_tokens=count)
        if llamagen is not None:
            twin, their_generate = theirs(llamagen, model)
            twin = twin.to(device, dtype)
            actions[f"LlamaGen, {name}"] = lambda m=twin, g=their_generate: g(
                m, labels, count, cfg_scale=2.0, temperature=1.0, top_k=0, top_p=1.0, sample_logits=True
            )
    times = time_in_turn(actions, rounds=rounds, warmup=0, device=device)
    found: dict[str, Any] = {
        name: {"seconds": summarise(taken), "images_per_second": batch / summarise(taken)["median"]}
        for name, taken in times.items()
    }
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
    return found


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llamagen", type=Path, help="a checkout of LlamaGen; without it ours is measured alone")
    parser.add_argument("--presets", nargs="+", default=["b"], choices=["b", "l", "xl"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="tokens of an image; by default all 256")
    parser.add_argument("--name", default="sampling-cpu")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # LlamaGen's
    device = choose_device("auto")
    results: dict[str, Any] = {}
    for preset in given.presets:
        for batch in given.batches:
            key = f"{preset}, batch {batch}"
            results[key] = measure(preset, batch, given.rounds, device, given.llamagen, given.tokens)
            for name, r in results[key].items():
                text = f"{r['images_per_second']:.3f} images/s" if "seconds" in r else f"{r['median']:.2f}"
                print(f"{key:14}{name:54}{text}", flush=True)
    save(given.name, results)


if __name__ == "__main__":
    main()
