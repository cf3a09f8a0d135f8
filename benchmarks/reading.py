"""What keeping freed memory is worth where many images are read: features, the validation loss, and what probes read.

Each is done with and without `hardware.freed_memory_kept`, in turn, on random images and tokens of CIFAR-10's size (the time does
not depend on what they show): EfficientNet-Lite0's features, and a model of the preset st-ar-cifar10 with random weights. It is
about a CPU's memory: on a GPU there is nothing to compare.
"""

import argparse
import resource
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import peak_rss, ratio, save, summarise, time_in_turn
from st_ar.data.store import TokenStore
from st_ar.evaluation.generation.features import Compute, collect, load_extractor
from st_ar.evaluation.generation.image_sets import open_files
from st_ar.evaluation.likelihood import validation_loss
from st_ar.evaluation.probe_features import FeatureSpec, extract_features, uniform_steps
from st_ar.hardware import freed_memory_kept
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset
from store import write

CPU = torch.device("cpu")


def seconds() -> np.ndarray:
    """What the process has taken itself, and the system for it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return np.array([used.ru_utime, used.ru_stime])


def compare(work: Callable[[], object], plain: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Seconds by the clock of both, and where they go."""
    spent: dict[str, list[np.ndarray]] = defaultdict(list)

    def counted(name: str, action: Callable[[], object]) -> None:
        before = seconds()
        action()
        spent[name].append(seconds() - before)

    times = time_in_turn(
        {"kept": lambda: counted("kept", work), "not kept": lambda: counted("not kept", plain)},
        rounds=rounds,
        warmup=1,
        device=CPU,
    )
    found: dict[str, Any] = {"not kept over kept": ratio(times["not kept"], times["kept"])}
    for name, rows in spent.items():
        own, system = (statistics.median(column) for column in zip(*rows[1:], strict=True))
        found[name] = {"seconds": summarise(times[name]), "own_seconds": own, "system_seconds": system}
    return found


def main() -> None:
    """Make, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=512, help="whose features are taken; eight times as many for a model"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="reading-cpu")
    given = parser.parse_args()
    config = get_preset("st-ar-cifar10").model
    torch.manual_seed(0)
    model = Transformer(config).eval()
    extractor = load_extractor("efficientnet", CPU)
    reading = FeatureSpec(layers=[config.n_layers // 2], steps=uniform_steps(64))
    results: dict[str, Any] = {"images": given.images}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder, 8 * given.images, 1, 64, config.vocab_size, config.num_classes)
        pixels = np.random.default_rng(0).integers(0, 256, (given.images, 32, 32, 3), np.uint8)
        np.savez(folder / "images.npz", arr_0=pixels)
        store, images = TokenStore(folder / "store"), open_files(str(folder / "images.npz"))
        works: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "EfficientNet-Lite0's features": (collect, (images, extractor, ["fd"], Compute())),
            "validation loss": (validation_loss, (model, store)),
            "what a probe reads": (extract_features, (model, store, reading)),
        }
        for name, (work, of) in works.items():
            plain = getattr(work, "__wrapped__", work)  # without its decorator, where it has one
            kept = freed_memory_kept()(plain)
            results[name] = found = compare(partial(kept, *of), partial(plain, *of), given.rounds)
            print(f"{name}: without keeping freed memory {found['not kept over kept']['median']:.2f} times as long")
            for how in ("kept", "not kept"):
                one = found[how]
                print(
                    f"  {how:9}{one['seconds']['median']:8.2f} s by the clock,{one['own_seconds']:8.2f} s of its own and"
                    f"{one['system_seconds']:7.2f} s of the system's on all cores"
                )
    results["peak_rss_gb"] = peak_rss()
    save(given.name, results)


if __name__ == "__main__":
    main()
