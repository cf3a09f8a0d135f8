r"""What samples could reach at best, and whether they are taken for what they were to be.

    st-ar reconstruct --tokenizer TOKENIZER --images TEST --size 32 --extractor none --save decoded
    st-ar reference decoded --extractor efficientnet --out reference.npz
    python benchmarks/recognised.py --reference reference.npz --tokens tokens-test \
        --training-tokens tokens-train --tokenizer TOKENIZER 'AR, 2 views (control)=a.npz' ST-AR=b.npz

Each set of samples, and as many training views drawn at random and decoded, which a model that has learnt all there is would
draw: Frechet distance, precision and recall to the reference, and how many a classifier puts into the class that was asked for. The
classifier is ridge regression on EfficientNet-Lite0's features of half of the reference's images, whose labels are the token
store's (the same images in the same order), with the penalty that leaving one out prefers; the other half tell what it is worth.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from common import pictures, save
from st_ar.data.store import TokenStore
from st_ar.evaluation.generation.features import Compute, collect, load_extractor
from st_ar.evaluation.generation.image_sets import open_files, read_array
from st_ar.evaluation.metrics import frechet_distance, precision_recall
from st_ar.tokenizer import load_tokenizer

TRAINING = "training views"


def share(right: np.ndarray) -> dict[str, float]:
    """In %, with its standard error."""
    return {"recognised": 100 * right.mean(), "error": 100 * right.std() / len(right) ** 0.5}


def write_views(tokens: Path, tokenizer: Path, count: int, out: Path) -> None:
    """Crops of images, both drawn at random, as the tokenizer shows them; in the format of `st-ar sample`."""
    store, painter, rng = TokenStore(tokens), load_tokenizer(tokenizer), np.random.default_rng(0)
    images = rng.integers(0, len(store), count)
    codes = store.codes(images, rng.integers(0, len(store.meta.crops), (count, 1)))[:, 0]
    np.savez(out, arr_0=pictures(painter, codes), arr_1=np.asarray(store.labels)[images])


def main() -> None:
    """Fit, ask, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", nargs="*", help="NAME=FILE of `st-ar sample`")
    parser.add_argument("--reference", type=Path, required=True, help="file of `st-ar reference`")
    parser.add_argument("--tokens", type=Path, required=True, help="store of the same images")
    parser.add_argument("--training-tokens", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--name", default="recognised-cpu")
    given = parser.parse_args()
    reference, labels = read_array(given.reference, "features"), np.asarray(TokenStore(given.tokens).labels)
    if len(reference) != len(labels):
        sys.exit(f"{given.reference} has features of {len(reference)} images, {given.tokens} labels of {len(labels)}")
    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(0, 6, 13)))
    classifier.fit(reference[::2], labels[::2])
    results: dict[str, Any] = {"the reference's other half": share(classifier.predict(reference[1::2]) == labels[1::2])}
    gaussian = (read_array(given.reference, "mu"), read_array(given.reference, "sigma"))
    extractor = load_extractor("efficientnet", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        views = Path(temporary) / "views.npz"
        write_views(given.training_tokens, given.tokenizer, len(labels), views)
        for name, _, file in [(TRAINING, "", str(views)), *(sample.partition("=") for sample in given.samples)]:
            found = collect(open_files(file), extractor, ["precision"], Compute())
            near = precision_recall(reference, found.features)
            right = classifier.predict(found.features.numpy()) == read_array(Path(file), "arr_1")
            distance = frechet_distance(*gaussian, *found.statistics.result())
            results[name] = {"FD": distance, "precision": near.precision, "recall": near.recall, **share(right)}
    for name, row in results.items():
        quality = (
            f"FD {row['FD']:.2f}, precision {row['precision']:.3f}, recall {row['recall']:.3f}, " if "FD" in row else ""
        )
        print(f"{name}: {quality}recognised {row['recognised']:.1f} ± {row['error']:.1f} %")
    save(given.name, results)


if __name__ == "__main__":
    main()
