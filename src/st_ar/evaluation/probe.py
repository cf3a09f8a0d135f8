"""Linear probing after MAE (arXiv 2111.06377): what the hidden state at each step says about the image's class.

The network is frozen and given the null condition, so no label leaks. Three parts, each of use alone: features (hidden.py,
kept by feature_cache.py), classifiers (lars.py; shallow.py has quicker ones), and here their accuracies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.data.store import TokenStore, difference, same_names
from st_ar.errors import UserError
from st_ar.evaluation.feature_cache import FeatureCache
from st_ar.evaluation.hidden import Features, Reading, describe_features, extract_features, uniform_steps
from st_ar.evaluation.lars import Classifiers, ProbeConfig, fit_classifiers, read_rows
from st_ar.evaluation.shallow import Method, ShallowClassifiers, require_sklearn
from st_ar.model.transformer import Transformer

ROWS = 16384
"""Images that are classified at once."""
TOP = 5


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Accuracy by step."""

    layer: int
    steps: list[int]
    """Steps t in 1..T."""
    top1: list[float]
    """Share of the test images whose class is guessed right, for each step."""
    train_images: int
    test_images: int
    top5: list[float] | None = None
    """Share whose class is among the five likeliest; None if there are no more than five classes."""
    mean_top1: float | None = None
    """top1 of the probe on the mean over the steps, if there is one."""
    mean_top5: float | None = None
    method: Method = "mae"
    notes: tuple[str, ...] = ()
    """What a reader of the numbers should know."""


@dataclass(frozen=True, kw_only=True)
class ProbeMethod:
    """Which classifiers, and how they are trained."""

    name: Method = "mae"
    config: ProbeConfig = field(default_factory=ProbeConfig)
    """Of mae."""
    penalty: float = 1.0
    """Of the others: ridge regression's alpha, logistic regression's 1 / C, on standardised features."""
    mean_over_steps: bool = False
    """Whether one more classifier a layer reads the mean over the steps."""

    def __post_init__(self) -> None:
        if not 0 < self.penalty < float("inf"):
            raise UserError(f"--penalty must be above 0, not {self.penalty}")

    def require_library(self) -> None:
        """Refuse a method whose library is missing."""
        if self.name != "mae":
            require_sklearn()


def require_classes(train_store: TokenStore, test_store: TokenStore) -> None:
    """Refuse stores that no probe can be trained on and tested with.

    Raises:
        UserError: images without labels, or classes that are not the same in both.
    """
    names = train_store.meta.class_names
    for store in (train_store, test_store):
        if len(store.meta.class_names) < 2:
            raise UserError(
                f"{store.folder} has {len(store.meta.class_names)} class: its images have no labels, and there is nothing for a "
                "probe to tell; tokenize images with classes"
            )
    if len(names) != len(test_store.meta.class_names) or not same_names(names, test_store.meta.class_names):
        raise UserError(
            f"{train_store.folder} and {test_store.folder} have other classes ({len(names)} and "
            f"{len(test_store.meta.class_names)}, {difference(names, test_store.meta.class_names)}): give stores of one data set"
        )
    if len(np.unique(train_store.labels)) < 2:
        raise UserError(f"all images of {train_store.folder} are of one class: there is nothing for a probe to tell")


def accuracies(
    classify: Callable[[Tensor], Tensor], features: np.ndarray, labels: Tensor, ks: Sequence[int]
) -> dict[int, list[float]]:
    """For each k the share of the images [n, S, D] whose class is among the k likeliest, by classifier."""
    right: dict[int, Tensor | int] = dict.fromkeys(ks, 0)
    for rows in torch.arange(len(features)).split(ROWS):
        logits, truth = classify(read_rows(features, rows)).cpu(), labels[rows][:, None, None]
        for k in ks:
            likeliest = logits.argmax(-1, keepdim=True) if k == 1 else logits.topk(k).indices
            right[k] = right[k] + (likeliest == truth).any(-1).sum(0)
    return {k: (torch.as_tensor(found).float() / len(features)).tolist() for k, found in right.items()}


def choose_reading(
    config: ModelConfig,
    train_store: TokenStore,
    test_store: TokenStore,
    *,
    layers: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    train_crops: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Reading, tuple[Sequence[int], Sequence[int]]]:
    """What a probe reads, and the crops of either store; arguments and errors as for `probe_layers`."""
    reading = Reading(
        layers=[max(1, config.n_layers // 2)] if layers is None else layers,
        steps=uniform_steps(config.sequence_length) if steps is None else steps,
        dtype=dtype,
    )
    crops = range(len(train_store.meta.crops)) if train_crops is None else train_crops
    reading.check(config, train_store, crops)
    tested = (test_store.center,)
    reading.check(config, test_store, tested)
    require_classes(train_store, test_store)
    return reading, (crops, tested)


def probe_layers(
    model: Transformer,
    train_store: TokenStore,
    test_store: TokenStore,
    *,
    layers: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    train_crops: Sequence[int] | None = None,
    method: ProbeMethod | None = None,
    dtype: torch.dtype = torch.float32,
    cache: FeatureCache | None = None,
    weights: str = "",
) -> list[ProbeResult]:
    """Probe accuracies of each layer: classifiers trained on the stored crops, tested on the test store's centre crop.

    Each store is read once for all layers, and all of a method's classifiers see each feature once an epoch. They run where
    the model is.

    Args:
        layers: counted from 1; half the depth if None.
        steps: in 1..T; 8 uniformly spaced ones if None.
        train_crops: which of the training store's crops to read; all if None.
        method: MAE's protocol if None.
        dtype: type of the network's matrix products.
        cache: where features are kept and looked for; None keeps them in memory. weights: SHA-256 of the model's file, its key.

    Raises:
        UserError: a store that is not the model's or has other classes, a layer, step or crop out of range, no room for the
            cache, or a method whose library is missing.
    """
    method = method or ProbeMethod()
    method.require_library()
    stores = train_store, test_store
    reading, crops = choose_reading(
        model.config, *stores, layers=layers, steps=steps, train_crops=train_crops, dtype=dtype
    )
    if cache is not None:
        wanted = [describe_features(model.config, weights, *pair, reading) for pair in zip(stores, crops, strict=True)]
        cache.reserve(entry for entries in wanted for entry in entries.values())
    train, test = (
        extract_features(model, store, reading, crops=some, cache=cache, weights=weights)
        for store, some in zip(stores, crops, strict=True)
    )
    return fit_and_test(
        train, test, list(reading.steps), len(train_store.meta.class_names), method, model.output.weight.device
    )


def fit_and_test(
    train: Features, test: Features, steps: list[int], num_classes: int, method: ProbeMethod, device: torch.device
) -> list[ProbeResult]:
    """Train a method's classifiers on some features and test them on others of the same layers and steps."""
    mean, name = method.mean_over_steps, method.name
    arrays = list(train.layers.values())
    if name == "mae":
        fitted: Sequence[Classifiers | ShallowClassifiers] = fit_classifiers(
            arrays, train.labels, num_classes, method.config, mean_over_steps=mean, device=device
        )
    else:
        fitted = [
            ShallowClassifiers(array, train.labels, num_classes, name, method.penalty, mean_over_steps=mean)
            for array in arrays
        ]
    results: list[ProbeResult] = []
    for layer, classify in zip(train.layers, fitted, strict=True):
        found = accuracies(classify, test.layers[layer], test.labels, [1, TOP] if num_classes > TOP else [1])
        top5 = found.get(TOP)
        results.append(
            ProbeResult(
                layer=layer,
                steps=steps,
                top1=found[1][: len(steps)],
                top5=top5[: len(steps)] if top5 else None,
                mean_top1=found[1][-1] if mean else None,
                mean_top5=top5[-1] if mean and top5 else None,
                train_images=len(train.labels),
                test_images=len(test.labels),
                method=name,
                notes=classify.notes(),
            )
        )
    return results


def probe(
    model: Transformer,
    train_store: TokenStore,
    test_store: TokenStore,
    *,
    layer: int | None = None,
    steps: Sequence[int] | None = None,
    train_crops: Sequence[int] | None = None,
    config: ProbeConfig | None = None,
) -> ProbeResult:
    """MAE's probe of one layer with its features in memory; arguments and errors as for `probe_layers`."""
    layers, method = None if layer is None else [layer], ProbeMethod(config=config or ProbeConfig())
    return probe_layers(
        model, train_store, test_store, layers=layers, steps=steps, train_crops=train_crops, method=method
    )[0]
