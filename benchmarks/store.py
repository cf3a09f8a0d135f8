"""Reading tokens for training: the token store against one .npy file for each image, LlamaGen's layout, in turn.

Random codes are written as LlamaGen's extract_codes_c2i.py writes them ({i}.npy, int64 [1, crops, T], and a label file each) and
imported into a store, so that both hold the same. Then one epoch in random order is read from either, in one process: its codes
alone, and as training batches with labels. As in LlamaGen's data set a file is loaded whole and its crops are chosen afterwards.
The times of the store include opening it. "Warm": everything is in the page cache. --cold drops the files from it before every
reading (posix_fadvise); what the system keeps of folders and inodes stays.
"""

import argparse
import os
import resource
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import ratio, save, summarise, time_in_turn
from st_ar.data.llamagen import import_tokens
from st_ar.data.store import TokenBatches, TokenStore

VOCAB, CLASSES = 16384, 1000
Choice = tuple[np.ndarray, np.ndarray]
"""Images [B] and, for each, crops [B, M]."""
CPU = torch.device("cpu")


def write(folder: Path, images: int, crops: int, tokens: int, vocab_size: int = VOCAB, classes: int = CLASSES) -> None:
    """Both layouts below `folder`: codes/, labels/, store/."""
    rng = np.random.default_rng(0)
    for name in ("codes", "labels"):
        (folder / name).mkdir()
    for image in range(images):
        np.save(folder / "codes" / f"{image}.npy", rng.integers(0, vocab_size, (1, crops, tokens)))
        np.save(folder / "labels" / f"{image}.npy", rng.integers(0, classes, 1))
    import_tokens(
        folder / "codes", folder / "labels", folder / "store", vocab_size=vocab_size, num_classes=classes, max_skipped=0
    )


def choices(views: TokenBatches, steps: int) -> list[Choice]:
    """An epoch's images in the order of training, with crops drawn for each."""
    rng = np.random.default_rng(1)
    crops = len(views.store.meta.crops)
    drawn = [rng.random((views.batch_size, crops)).argsort(axis=1)[:, : views.views] for _ in range(steps)]
    return [(views.images(step), crop) for step, crop in enumerate(drawn)]


def codes_from_files(folder: Path, epoch: Iterable[Choice]) -> Iterator[np.ndarray]:
    """Codes int64 [B, M, T], a file after the other."""
    for images, crops in epoch:
        loaded = [
            np.load(f"{folder}/codes/{image}.npy")[0, chosen] for image, chosen in zip(images, crops, strict=True)
        ]
        yield np.stack(loaded)


def batches_from_files(folder: Path, epoch: Iterable[Choice]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens int64 [B, M, T] and labels int64 [B], put together image by image."""
    for images, crops in epoch:
        tokens: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        for image, chosen in zip(images, crops, strict=True):
            tokens.append(torch.from_numpy(np.load(f"{folder}/codes/{image}.npy")[0, chosen]))
            labels.append(torch.from_numpy(np.load(f"{folder}/labels/{image}.npy")))
        yield torch.stack(tokens), torch.cat(labels)


def drop_from_cache(folder: Path) -> None:
    """Have the system forget the content of all files below a folder; what was written must be on the disk first."""
    os.sync()
    for path in folder.rglob("*.npy"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, batch: int, views: int, rounds: int, cold: bool) -> dict[str, Any]:
    """Views/s and useful bytes/s (two of a token) of each reading, and how many times as long the files take."""
    plan = TokenBatches(TokenStore(folder / "store"), batch_size=batch, views=views, seed=0)
    steps = len(plan.store) // batch
    epoch = choices(plan, steps)
    tokens = plan.store.meta.grid**2
    del plan  # a mapped file would stay in the cache

    def store_codes() -> Iterator[np.ndarray]:
        store = TokenStore(folder / "store")
        yield from (store.codes(images, crops) for images, crops in epoch)

    def store_batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        opened = TokenBatches(TokenStore(folder / "store"), batch_size=batch, views=views, seed=0)
        yield from (opened.batch(step) for step in range(steps))

    for ours, theirs in zip(store_codes(), codes_from_files(folder, epoch), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for (_, ours), (_, theirs) in zip(store_batches(), batches_from_files(folder, epoch), strict=True):
        torch.testing.assert_close(ours, theirs)

    disk: dict[str, int] = {}

    def action(name: str, read: Callable[[], Iterator[object]]) -> Callable[[], None]:
        def run() -> None:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
            for _ in read():
                pass
            disk[name] = 512 * (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before)

        return run

    readings: dict[str, Callable[[], Iterator[object]]] = {
        "store, codes": store_codes,
        "files, codes": lambda: codes_from_files(folder, epoch),
        "store, batches": store_batches,
        "files, batches": lambda: batches_from_files(folder, epoch),
    }
    times = time_in_turn(
        {name: action(name, read) for name, read in readings.items()},
        rounds=rounds,
        warmup=0 if cold else 1,
        device=CPU,
        before=(lambda: drop_from_cache(folder)) if cold else None,
    )
    results: dict[str, Any] = {}
    for name, taken in times.items():
        rate = steps * batch * views / summarise(taken)["median"]
        files = times[name.replace("store", "files")]
        results[name] = {
            "seconds_per_epoch": summarise(taken),
            "views_per_second": rate,
            "useful_bytes_per_second": rate * tokens * 2,
            "bytes_from_disk_per_epoch": disk[name],
            "files_take_times_as_long": ratio(files, taken),
        }
    return results


def main() -> None:
    """Write, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--crops", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=256, help="of a crop; a square")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="measure with an emptied page cache too")
    parser.add_argument("--name", default="store-cpu")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary), given.images, given.crops, given.tokens)
        for cold in (False, True) if given.cold else (False,):
            for views in given.views:
                what = f"{'cold' if cold else 'warm'}, {views} view{'s' * (views > 1)}"
                results[what] = measure(Path(temporary), given.batch, views, given.rounds, cold)
                for name, r in results[what].items():
                    print(
                        f"{what}: {name:16}{r['views_per_second']:12,.0f} views/s "
                        f"{r['useful_bytes_per_second'] / 1e6:9,.1f} MB/s   "
                        f"files take {r['files_take_times_as_long']['median']:.1f} times as long"
                    )
    sizes = {name: getattr(given, name) for name in ("images", "crops", "tokens", "batch", "rounds")}
    save(given.name, {**sizes, **results})


if __name__ == "__main__":
    main()
