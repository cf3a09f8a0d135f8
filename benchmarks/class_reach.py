r"""How far the class reaches in a model: why samples show the class that was asked for, or do not.

    python benchmarks/class_reach.py --tokens tokens-test --training-tokens tokens-training 'ST-AR, seed 0=runs/a' 'ST-AR, seed 1=runs/b'
    python benchmarks/class_reach.py --draw docs/images/class-reach.svg

The second draws the class gain by row of the image from the saved results, the mean over seeds. The first measures each run without
guidance:

- **class gain**: by position, how much more likely a real test image's token is with the image's class than with the null class, in
  nats. Its sum over positions estimates the information that the model's predictions take from the class.
- **posterior**: share of the test images whose class is the likeliest by Bayes' rule from the model's own likelihoods of the tokens read.
- **weight**: attention to the class, and to the first row of tokens from the last row, averaged over heads and images, by layer.
- **probe**: ridge regression on the hidden states at half depth under the null condition, trained on real training images, by tokens
  read: its accuracy on real test images, and on generated images, where the class that was asked for counts as right.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import RESULTS, save
from st_ar.data.store import TokenStore
from st_ar.evaluation.attention import weights_by_layer
from st_ar.evaluation.probe_classifiers import ShallowClassifiers
from st_ar.evaluation.probe_features import read_features
from st_ar.figures import Drawing, line_chart
from st_ar.model.generate import generate
from st_ar.model.transformer import Transformer
from st_ar.model.weights import load_model

BATCH = 250


def centers(store: TokenStore, count: int) -> tuple[Tensor, Tensor]:
    """Tokens [n, T] and classes [n] of evenly spaced images."""
    chosen = np.linspace(0, len(store) - 1, min(count, len(store))).round().astype(np.int64)
    codes = store.center_codes(chosen).astype(np.int64)
    return torch.from_numpy(codes), torch.from_numpy(np.asarray(store.labels)[chosen].astype(np.int64))


@torch.no_grad()
def log_likelihoods(model: Transformer, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the log-likelihood of each token in nats, [n, T]."""
    parts = []
    for batch, condition in zip(tokens.split(BATCH), labels.split(BATCH), strict=True):
        logits = model(batch[:, :-1], condition).logits.float()
        parts.append(logits.log_softmax(-1).gather(-1, batch[..., None])[..., 0])
    return torch.cat(parts)


def class_reach(model: Transformer, tokens: Tensor, labels: Tensor) -> dict[str, Any]:
    """Class gain, posterior, and attention on real images."""
    classes = model.config.num_classes
    by_class = torch.stack([log_likelihoods(model, tokens, torch.full_like(labels, c)) for c in range(classes)])
    right = by_class[labels, torch.arange(len(labels))]
    gain = right - log_likelihoods(model, tokens, torch.full_like(labels, classes))
    posterior = (by_class.cumsum(-1).argmax(0) == labels[:, None]).double().mean(0)
    grid = model.config.grid
    weights: dict[int, list[Tensor]] = {}
    for batch, condition in zip(tokens[:BATCH].split(50), labels[:BATCH].split(50), strict=True):
        for layer, maps in weights_by_layer(
            model, batch[:, :-1], condition, layers=range(1, model.config.n_layers + 1)
        ):
            late = maps[:, :, -grid:]  # the last row of tokens is predicted
            weights.setdefault(layer, []).append(
                torch.stack([late[..., 0], late[..., 1 : 1 + grid].sum(-1)], -1).mean((1, 2))
            )
    mean = {layer: torch.cat(parts).double().mean(0).tolist() for layer, parts in weights.items()}
    return {
        "class gain, nats": gain.double().mean(0).tolist(),
        "sum of class gain": gain.sum(1).double().mean().item(),
        "posterior": posterior.tolist(),
        "loss by position": (-right).double().mean(0).tolist(),
        "weight on the class": {layer: values[0] for layer, values in mean.items()},
        "weight on the first row": {layer: values[1] for layer, values in mean.items()},
    }


def probes(model: Transformer, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int) -> dict[str, Any]:
    """Accuracy by tokens read, on real and on generated images."""
    grid, layer = model.config.grid, max(1, model.config.n_layers // 2)
    steps = [grid * row + 1 for row in range(1, grid)] + [model.config.sequence_length]
    asked = torch.arange(len(test[0])) % model.config.num_classes
    drawn = torch.cat(
        [
            generate(model, part, seed=seed, images=images.numpy())
            for part, images in zip(asked.split(BATCH), torch.arange(len(asked)).split(BATCH), strict=True)
        ]
    )

    def states(tokens: Tensor) -> np.ndarray:
        return torch.cat([read_features(model, part, [layer], steps)[layer] for part in tokens.split(BATCH)]).numpy()

    classifiers = ShallowClassifiers(
        states(train[0]), train[1], model.config.num_classes, "ridge", 1.0, mean_over_steps=False
    )
    found: dict[str, Any] = {"tokens read": [step - 1 for step in steps]}
    for name, (tokens, labels) in {"real": test, "generated": (drawn, asked)}.items():
        guesses = classifiers(torch.from_numpy(states(tokens))).argmax(-1)
        found[f"probe, {name}"] = (guesses == labels[:, None]).double().mean(0).tolist()
    return found


def draw(reach: dict[str, Any]) -> Drawing:
    """Class gain by row of tokens, the mean over seeds."""
    rows: dict[str, list[np.ndarray]] = {}
    for name, found in reach.items():
        gain = np.array(found["class gain, nats"])
        rows.setdefault(re.sub(r", seed \d+$", "", name), []).append(gain.reshape(math.isqrt(len(gain)), -1).sum(1))
    curves = {name: (list(range(1, len(seeds[0]) + 1)), np.mean(seeds, 0).tolist()) for name, seeds in rows.items()}
    title = "Class gain by row of the image"
    return line_chart(curves, name=title, x="row of tokens", y="class gain, nats per row", label_ends=True)


def main() -> None:
    """Measure each run, print the main numbers, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="NAME=RUN")
    parser.add_argument("--tokens", type=Path, help="store of test images")
    parser.add_argument("--training-tokens", type=Path)
    parser.add_argument("--images", type=int, default=2000, help="test images, and generated images")
    parser.add_argument("--training-images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="class-reach-mnist")
    parser.add_argument("--draw", type=Path, metavar="FILE.svg", help="draw what is saved, and measure nothing")
    given = parser.parse_args()
    if given.draw:
        reach = json.loads((RESULTS / f"{given.name}.json").read_text(encoding="utf-8"))["results"]
        draw(reach).save(given.draw)
        return
    if not (given.runs and given.tokens and given.training_tokens):
        sys.exit("give NAME=RUN, --tokens and --training-tokens; or --draw")
    test = centers(TokenStore(given.tokens), given.images)
    train = centers(TokenStore(given.training_tokens), given.training_images)
    results: dict[str, Any] = {}
    for name, _, run in (each.rpartition("=") for each in given.runs):
        model = load_model(run)
        found = {"run": Path(run).name} | class_reach(model, *test) | probes(model, train, test, given.seed)
        print(
            f"{name}: class gain {found['sum of class gain']:.2f} nats, posterior {100 * found['posterior'][-1]:.1f} %, "
            f"probe {100 * found['probe, real'][-1]:.1f} % on real and {100 * found['probe, generated'][-1]:.1f} % on generated images",
            flush=True,
        )
        results[name] = found
    save(given.name, results)


if __name__ == "__main__":
    main()
