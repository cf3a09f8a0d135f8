"""Images of tokens, in the format of `st-ar sample`, for `st-ar evaluate --reference` and `--classifier`.

    python benchmarks/decoded.py cifar10-samples-seed0.npz --tokenizer km --out samples
    python benchmarks/decoded.py cifar10-kmeans/tokens-training --tokenizer km --out views --num 10000

The first decodes what the slice cifar10 of on_gpu.py has drawn: a file for each model, with the classes that were asked for. The second
decodes random crops of random images of a token store, the upper bound for a generator of these tokens.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common import pictures
from st_ar.data.store import TokenStore
from st_ar.tokenizer import load_tokenizer


def read(path: Path, num: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, tokens [n, T] and labels [n] of each set of images."""
    if path.is_dir():
        store, rng = TokenStore(path), np.random.default_rng(0)
        images = rng.integers(0, len(store), num)
        codes = store.codes(images, rng.integers(0, len(store.meta.crops), (num, 1)))[:, 0]
        yield path.name, codes, np.asarray(store.labels)[images]
        return
    with np.load(path) as file:
        for name in (name for name in file if name != "labels"):
            yield f"{path.stem}-{name}", file[name], file["labels"]


def main() -> None:
    """Decode and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path, help="file of on_gpu.py, or a token store")
    parser.add_argument("--tokenizer", type=Path, required=True, help="what made the tokens")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=10_000, help="images of a token store")
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.tokenizer)
    given.out.mkdir(parents=True, exist_ok=True)
    for name, tokens, labels in read(given.tokens, given.num):
        path = given.out / f"{name}.npz"
        np.savez(path, arr_0=pictures(tokenizer, tokens), arr_1=labels)
        print(f"saved {path}: {len(tokens)} images")


if __name__ == "__main__":
    main()
