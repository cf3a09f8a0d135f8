"""Everything that the project owes a GPU, in slices of under ten minutes each.

    PYTHONPATH=src python benchmarks/on_gpu.py check training sampling tokenizing quickstart --out results-folder

Needs no more than torch, numpy, safetensors, pillow, scikit-learn, scikit-image, matplotlib and jinja2, and no installation of
st-ar. Each slice saves its figures as soon as it has them, under the device's name.

    check        recorded outputs and CPU results agree on the GPU, in float32 and bfloat16
    training     AR and ST-AR step time, tokens/s, model FLOP/s, peak memory: B, L, XL in bfloat16, compiled blocks
    sampling     images/s of `generate` with guidance: B, L
    tokenizing   images/s of VQ-16's encoder against the plain reading of the architecture
    quickstart   the photographs, trained and compared on the GPU
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, save, synchronise
from st_ar.config import ModelConfig
from st_ar.hardware import choose_device
from st_ar.model.generate import generate
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset
from st_ar.vq_config import VQ_16, VQConfig
from tokenizing import measure_encoding, random_tokenizer
from training import measure


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
    greedy = generate(model.to(device), labels.to(device), cfg_scale=2.0, greedy=True).cpu()
    same = greedy == generate(model.cpu(), labels, cfg_scale=2.0, greedy=True)
    found["greedy tokens equal"] = same.float().mean().item()
    return found


def training(device: torch.device, small: bool) -> dict[str, Any]:
    """Step times at 64 sequences of 256 tokens (XL: 32)."""
    if small:
        return {"photos": measure("photos", 8, 3, device, torch.bfloat16, False)}
    sizes = {"b": 64, "l": 64, "xl": 32}
    return {preset: measure(preset, count, 20, device, torch.bfloat16, True) for preset, count in sizes.items()}


def sampling(device: torch.device, small: bool) -> dict[str, Any]:
    """Images/s with guidance 2, bfloat16 weights."""
    found: dict[str, Any] = {}
    for preset, batches in (("photos", (8,)),) if small else (("b", (1, 8, 32, 256)), ("l", (1, 8, 256))):
        config = get_preset(f"llamagen-{preset}").model
        model = Transformer(config).to(device, torch.bfloat16).eval()
        torch.nn.init.normal_(model.output.weight, std=0.02)
        for batch in batches:
            labels = torch.randint(config.num_classes, (batch,), device=device)
            generate(model, labels, cfg_scale=2.0, seed=0, num_tokens=8)
            synchronise(device)
            begun = time.perf_counter()
            generate(model, labels, cfg_scale=2.0, seed=0)
            synchronise(device)
            seconds = time.perf_counter() - begun
            found[f"{preset}, batch {batch}"] = {"seconds": seconds, "images_per_second": batch / seconds}
    return found


def photographs(_device: torch.device, small: bool) -> dict[str, Any]:
    """The quickstart's summary."""
    import tempfile

    from st_ar.quickstart import quickstart

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quickstart"
        quickstart(out, steps=5 if small else None)
        return json.loads((out / "summary.json").read_text())


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


SLICES = {
    "check": check,
    "training": training,
    "sampling": sampling,
    "tokenizing": tokenizing,
    "quickstart": photographs,
}


def main() -> None:
    """Run the slices asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slices", nargs="+", choices=list(SLICES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes on whatever is here, to see that the script works"
    )
    given = parser.parse_args()
    device = choose_device("auto")
    if device.type != "cuda" and not given.small:
        sys.exit("torch sees no GPU here; --small tries the script on a CPU")
    name = "small" if given.small else torch.cuda.get_device_name().lower().replace(" ", "-")
    for part in given.slices:
        begun = time.perf_counter()
        results = SLICES[part](device, given.small)
        print(json.dumps(results, indent=1)[:3000])
        save(f"{name}-{part}", results, given.out)
        print(f"{part}: {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
