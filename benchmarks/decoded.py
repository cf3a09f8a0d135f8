"""Images of the tokens that the slice cifar10 of on_gpu.py has drawn.

    python benchmarks/decoded.py cifar10-samples-seed0.npz --tokenizer km --out samples

A file for each model in it, with the classes that were asked for, which `st-ar evaluate --reference` and `--classifier` take.
"""

import argparse
from pathlib import Path

import numpy as np

from common import pictures
from st_ar.tokenizer import load_tokenizer


def main() -> None:
    """Decode and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path, help="arrays [images, tokens] by model, and their labels")
    parser.add_argument("--tokenizer", type=Path, required=True, help="what made the tokens")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    painter = load_tokenizer(given.tokenizer)
    given.out.mkdir(parents=True, exist_ok=True)
    with np.load(given.tokens) as file:
        labels = file["labels"]
        for name, tokens in ((name, tokens) for name, tokens in file.items() if name != "labels"):
            path = given.out / f"{given.tokens.stem}-{name}.npz"
            np.savez(path, arr_0=pictures(painter, tokens), arr_1=labels)
            print(f"saved {path}: {len(tokens)} images")


if __name__ == "__main__":
    main()
