"""Encoding images with VQ-16 at 256 px: ours against the plain reading of the same architecture, side by side.

The plain reading: float32, the default memory layout, distances by the expanded square. The weights are random: the time does not
depend on them; the share of codes that stay equal in bfloat16 does, and trained weights have fewer near-ties.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from common import ratio, save, summarise, time_in_turn
from st_ar.hardware import choose_device, choose_dtype
from st_ar.tokenizer.vq import VQTokenizer
from st_ar.tokenizer.vq_network import Painter, Reader
from st_ar.vq_config import VQ_16, VQConfig


def plain_encode(reader: Reader, codebook: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Nearest neighbour by |z|^2 + |e|^2 - 2 z e, all at once."""
    features = reader(images)
    z = features.permute(0, 2, 3, 1).reshape(-1, codebook.shape[1])
    distances = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T
    return distances.argmin(1).unflatten(0, (len(images), *features.shape[2:]))


def measure(config: VQConfig, size: int, batch: int, rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Images/s of each way of encoding, and how many of its codes equal the plain one's."""
    torch.manual_seed(0)
    dtype = choose_dtype("auto", device)
    tensors = {**Reader(config).state_dict(), **Painter(config).state_dict()}
    tensors["quantize.embedding.weight"] = torch.randn(config.codebook_size, config.codebook_dim)
    plain = Reader(config).requires_grad_(False)
    plain.load_state_dict({name: tensors[name] for name in plain.state_dict()})
    plain = plain.to(device)
    exact = VQTokenizer(config, tensors).to(device, torch.float32)
    fast = VQTokenizer(config, tensors).to(device, dtype)
    images = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    actions: dict[str, Callable[[], torch.Tensor]] = {
        "plain": lambda: plain_encode(plain, exact.codebook, images),
        "ours, float32": lambda: exact.encode(images),
        f"ours, {str(dtype).removeprefix('torch.')}": lambda: fast.encode(images),
    }
    codes = {name: action().cpu() for name, action in actions.items()}
    times = time_in_turn(actions, rounds=rounds, warmup=1, device=device)
    return {
        name: {
            "seconds": summarise(taken),
            "images_per_second": batch / summarise(taken)["median"],
            "plain_takes_times_as_long": ratio(times["plain"], taken),
            "codes_equal_to_plain": (codes[name] == codes["plain"]).float().mean().item(),
        }
        for name, taken in times.items()
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="tokenizing-cpu")
    given = parser.parse_args()
    results = measure(VQ_16, 256, given.batch, given.rounds, choose_device("auto"))
    for name, r in results.items():
        print(f"{name:16}{r['images_per_second']:8.2f} images/s   codes equal {100 * r['codes_equal_to_plain']:.2f} %")
    save(given.name, {"batch": given.batch, **results})


if __name__ == "__main__":
    main()
