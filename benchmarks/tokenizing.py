"""Encoding images with a VQ-GAN: ours against the plain reading of the same architecture, side by side, and the whole job.

The plain reading: float32, the default memory layout, distances by the expanded square. Without --tokenizer it is VQ-16 at 256 px
with random weights: the time does not depend on them; the share of codes that stay equal in bfloat16 does.

The job is `st-ar tokenize` with ten crops, from images as they lie on the disk to a finished store; without --images, of JPEG
files of 500 x 375 pixels cut from photographs that scikit-image and scikit-learn carry.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common import ratio, save, summarise, time_in_turn
from st_ar.config import VQ_16, VQConfig
from st_ar.data.images import open_images
from st_ar.data.source import Crops, ImageSource, center_crop
from st_ar.evaluation.reconstruction import evaluation_images
from st_ar.hardware import choose_device, choose_dtype
from st_ar.tokenizer import load_tokenizer, to_pixels
from st_ar.tokenizer.tokenize import tokenize
from st_ar.tokenizer.vq import VQDecoder, VQEncoder, VQTokenizer


def plain_encode(reader: VQEncoder, codebook: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Nearest neighbour by |z|^2 + |e|^2 - 2 z e, all at once."""
    features = reader(images)
    z = features.permute(0, 2, 3, 1).reshape(-1, codebook.shape[1])
    distances = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T
    return distances.argmin(1).unflatten(0, (len(images), *features.shape[2:]))


def random_tokenizer(config: VQConfig) -> VQTokenizer:
    """A tokenizer with untrained weights."""
    torch.manual_seed(0)
    tensors = {**VQEncoder(config).state_dict(), **VQDecoder(config).state_dict()}
    tensors["quantize.embedding.weight"] = torch.randn(config.codebook_size, config.codebook_dim)
    return VQTokenizer(config, tensors)


def measure_encoding(
    tokenizer: VQTokenizer, images: torch.Tensor, rounds: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Images/s of each way of encoding images [B, 3, S, S], and how many of its codes equal the plain one's."""
    torch.compiler.reset()  # or what another batch's size was would be compiled for too
    dtype = choose_dtype("auto", device)
    plain = VQEncoder(tokenizer.config).requires_grad_(False)
    plain.load_state_dict({name: tokenizer.tensors[name] for name in plain.state_dict()})
    plain = plain.to(device)
    exact, fast = tokenizer.to(device, torch.float32), tokenizer.to(device, dtype)
    compiled, short = tokenizer.to(device, dtype, compiled=True), str(dtype).removeprefix("torch.")
    images = images.to(device)
    actions: dict[str, Callable[[], torch.Tensor]] = {
        "plain": lambda: plain_encode(plain, exact.codebook, images),
        "ours, float32": lambda: exact.encode(images),
        f"ours, {short}": lambda: fast.encode(images),
        f"ours, {short}, compiled": lambda: compiled.encode(images),
    }
    codes = {name: action().cpu() for name, action in actions.items()}
    times = time_in_turn(actions, rounds=rounds, warmup=1, device=device)
    return {
        name: {
            "seconds": summarise(taken),
            "images_per_second": len(images) / summarise(taken)["median"],
            "plain_takes_times_as_long": ratio(times["plain"], taken),
            "codes_equal_to_plain": (codes[name] == codes["plain"]).float().mean().item(),
        }
        for name, taken in times.items()
    }


class Timed(VQTokenizer):
    """The tokenizer, adding up the seconds of its network."""

    def __init__(self, tokenizer: VQTokenizer) -> None:
        super().__init__(tokenizer.config, tokenizer.tensors)
        self.device, self.dtype, self.codebook = tokenizer.device, tokenizer.dtype, tokenizer.codebook
        self.seconds = 0.0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """As the tokenizer does."""
        begun = time.perf_counter()
        codes = super().encode(images)
        self.seconds += time.perf_counter() - begun
        return codes


def measure_job(
    tokenizer: VQTokenizer, source: ImageSource, size: int, crop_range: float, workers: int, batch: int
) -> dict[str, Any]:
    """The whole job on a source: images/s, crops/s, and the share of the time that the network does not take."""
    timed = Timed(tokenizer)
    crops = Crops(kind="ten", size=size, range=crop_range, mirror=source.mirror)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        store = tokenize(source, timed, crops, Path(folder) / "store", batch_size=batch, workers=workers)
        seconds = time.perf_counter() - begun
        images = len(store)
    return {
        "images": images,
        "crops": len(crops.names),
        "workers": workers,
        "seconds": seconds,
        "images_per_second": images / seconds,
        "crops_per_second": images * len(crops.names) / seconds,
        "share_outside_the_network": 1 - timed.seconds / seconds,
    }


def photographs(folder: Path, count: int) -> ImageSource:
    """A folder of JPEG files of 500 x 375 pixels, cut from the embedded photographs."""
    from importlib.resources import files

    from st_ar.data.images import PHOTOGRAPHS

    rng = np.random.default_rng(0)
    places = list(PHOTOGRAPHS.items())
    for index in range(count):
        name, place = places[index % len(places)]
        package, _, path = place.partition("/")
        with files(package).joinpath(path).open("rb") as file:
            pixels = center_crop(Image.open(file).convert("RGB"), 500)
        top = rng.integers(126)
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[top : top + 375]).save(folder / name / f"{index:04d}.jpg", quality=92)
    return open_images(f"folder:{folder}")


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", type=Path, help="a trained tokenizer's folder; by default VQ-16 with random weights"
    )
    parser.add_argument("--images", help="image source; by default JPEG files made for the purpose")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--crop-range", type=float, default=1.1)
    parser.add_argument("--batch", type=int, default=4, help="crops encoded at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[0])
    parser.add_argument("--name", default="tokenizing-cpu")
    given = parser.parse_args()
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    with tempfile.TemporaryDirectory() as folder:
        source = open_images(given.images) if given.images else photographs(Path(folder), 4)
        tokenizer = load_tokenizer(given.tokenizer) if given.tokenizer else random_tokenizer(VQ_16)
        assert isinstance(tokenizer, VQTokenizer), "give a VQ-GAN"
        examples = torch.from_numpy(evaluation_images(source, given.size, given.batch))
        results = measure_encoding(tokenizer, to_pixels(examples), given.rounds, device)
        for name, r in results.items():
            print(
                f"{name:26}{r['images_per_second']:9.2f} images/s   codes equal {100 * r['codes_equal_to_plain']:.2f} %"
            )
        jobs = [
            measure_job(tokenizer.to(device, dtype), source, given.size, given.crop_range, workers, given.batch)
            for workers in given.workers
        ]
        for job in jobs:
            print(
                f"job, {job['workers']} workers: {job['crops_per_second']:.1f} crops/s, "
                f"{100 * job['share_outside_the_network']:.1f} % outside the network"
            )
    save(given.name, {"batch": given.batch, "encoding": results, "job": {"dtype": str(dtype), "runs": jobs}})


if __name__ == "__main__":
    main()
