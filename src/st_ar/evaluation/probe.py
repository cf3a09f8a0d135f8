"""`st-ar probe`: linear probing after MAE (arXiv 2111.06377). How well the hidden state at each step predicts the image's class.

The network is frozen and gets the null condition, so no label leaks.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.data.store import TokenStore, difference, note_same_images, same_names
from st_ar.errors import UserError, require
from st_ar.evaluation.metrics import require_bounded
from st_ar.evaluation.probe_classifiers import (
    NAMES,
    Method,
    ProbeConfig,
    ShallowClassifiers,
    fit_classifiers,
    read_rows,
)
from st_ar.evaluation.probe_features import (
    FeatureCache,
    FeatureSpec,
    ProbeFeatures,
    describe_features,
    extract_features,
    token_batches,
    uniform_steps,
)
from st_ar.figures import COLOURS, Drawing, line_chart
from st_ar.hardware import describe
from st_ar.model.transformer import Transformer
from st_ar.model.weights import EvalModel, check_store
from st_ar.progress import progress
from st_ar.report import Chart, Section, Table, provenance, write_report
from st_ar.settings import Checked, Positive

ROWS = 16384
"""Images classified at once."""
TOP = 5


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Accuracies of one layer's probes."""

    layer: int
    steps: list[int]
    """Steps t in 1..T."""
    top1: list[float]
    """Share of the test images whose class is predicted, for each step."""
    train_images: int
    test_images: int
    top5: list[float] | None = None
    """Share whose class is among the five likeliest; None for five classes or fewer."""
    mean_top1: float | None = None
    """top1 of the probe on the mean over steps, if there is one."""
    mean_top5: float | None = None
    method: Method = "mae"
    notes: tuple[str, ...] = ()
    """Warnings for the reader of the numbers."""


@dataclass(frozen=True, kw_only=True)
class ProbeMethod(Checked):
    """The classifiers, and how they are trained."""

    name: Method = "mae"
    config: ProbeConfig = field(default_factory=ProbeConfig)
    penalty: Positive = 1.0
    """Ridge regression's alpha or logistic regression's 1 / C, on standardised features."""
    mean_over_steps: bool = False
    """Add a classifier per layer for the mean over steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name != "mae":
            require("sklearn")


def require_classes(train_store: TokenStore, test_store: TokenStore) -> None:
    """Refuse stores without classes, or with different classes."""
    names, test_names = train_store.meta.class_names, test_store.meta.class_names
    for store in (train_store, test_store):
        if len(store.meta.class_names) < 2:
            raise UserError(
                f"{store.folder} has {len(store.meta.class_names)} class, and a probe needs 2 or more: tokenize images with classes"
            )
    if len(names) != len(test_names) or not same_names(names, test_names):
        raise UserError(
            f"{train_store.folder} and {test_store.folder} have different classes ({len(names)} and "
            f"{len(test_names)}, {difference(names, test_names)}): give stores of one data set"
        )
    note_same_images(train_store, test_store)
    if len(np.unique(train_store.labels)) < 2:
        raise UserError(f"all images of {train_store.folder} are of one class: give a store with images of 2 or more")


def accuracies(
    classify: Callable[[Tensor], Tensor], features: np.ndarray, labels: Tensor, ks: Sequence[int]
) -> dict[int, list[float]]:
    """Return for each k the share of the images [n, S, D] whose class is among the k likeliest, by classifier."""
    correct: dict[int, Tensor | int] = dict.fromkeys(ks, 0)
    for rows in torch.arange(len(features)).split(ROWS):
        logits, truth = classify(read_rows(features, rows)).cpu(), labels[rows][:, None, None]
        if logits.isnan().any():
            raise UserError("the probe's logits hold NaN: its training has diverged, so give a lower --base-lr")
        for k in ks:
            likeliest = logits.argmax(-1, keepdim=True) if k == 1 else logits.topk(k).indices
            correct[k] = correct[k] + (likeliest == truth).any(-1).sum(0)
    return {k: (torch.as_tensor(count).float() / len(features)).tolist() for k, count in correct.items()}


def choose_features(
    config: ModelConfig,
    train_store: TokenStore,
    test_store: TokenStore,
    *,
    layers: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    train_crops: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[FeatureSpec, tuple[Sequence[int], Sequence[int]]]:
    """Return the features that a probe reads, and the crops of both stores; arguments and errors as for `probe_layers`."""
    spec = FeatureSpec(
        layers=[max(1, config.n_layers // 2)] if layers is None else layers,
        steps=uniform_steps(config.sequence_length) if steps is None else steps,
        dtype=dtype,
    )
    train_crops = range(len(train_store.meta.crops)) if train_crops is None else train_crops
    test_crops = (test_store.center,)
    spec.check(config, train_store, train_crops)
    spec.check(config, test_store, test_crops)
    require_classes(train_store, test_store)
    return spec, (train_crops, test_crops)


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
    """Train classifiers on the training store's crops and test them on the test store's centre crops, on the model's device.

    Each store is read once for all layers.

    Args:
        layers: counted from 1; half the depth if None.
        steps: in 1..T; 8 uniformly spaced steps if None.
        train_crops: which of the training store's crops to read; all if None.
        dtype: type of the network's matrix products.
        cache: cache of features on disk; None keeps them in memory. weights: SHA-256 of the model's file, the cache's key.

    Raises:
        UserError: a store that does not fit the model or has other classes, a layer, step or crop out of range, no space for the
            cache, or a method whose library is missing.
    """
    method = method or ProbeMethod()
    stores, num_classes = (train_store, test_store), len(train_store.meta.class_names)
    spec, crops = choose_features(
        model.config, *stores, layers=layers, steps=steps, train_crops=train_crops, dtype=dtype
    )
    if cache is not None:
        described = [describe_features(model.config, weights, *pair, spec) for pair in zip(stores, crops, strict=True)]
        cache.reserve(entry for entries in described for entry in entries.values())
    train, test = (
        extract_features(model, store, spec, crops=store_crops, cache=cache, weights=weights)
        for store, store_crops in zip(stores, crops, strict=True)
    )
    return _fit(train, test, num_classes, list(spec.steps), method, model.output.weight.device)


def _fit(
    train: ProbeFeatures,
    test: ProbeFeatures,
    num_classes: int,
    steps: list[int],
    method: ProbeMethod,
    device: torch.device,
) -> list[ProbeResult]:
    """Train classifiers on features and test them, layer by layer."""
    mean, arrays, targets = method.mean_over_steps, list(train.layers.values()), (train.labels, num_classes)
    if method.name == "mae":
        fitted = fit_classifiers(arrays, *targets, method.config, mean_over_steps=mean, device=device)
    else:
        shallow = partial(ShallowClassifiers, method=method.name, penalty=method.penalty, mean_over_steps=mean)
        fitted = [shallow(array, *targets) for array in arrays]
    results: list[ProbeResult] = []
    count = len(steps)
    for layer, classify in zip(train.layers, fitted, strict=True):
        shares = accuracies(classify, test.layers[layer], test.labels, [1, TOP] if num_classes > TOP else [1])
        top1, top5 = shares[1], shares.get(TOP)
        results.append(
            ProbeResult(
                layer=layer,
                steps=steps,
                top1=top1[:count],
                top5=top5[:count] if top5 else None,
                mean_top1=top1[-1] if mean else None,
                mean_top5=top5[-1] if mean and top5 else None,
                train_images=len(train.labels),
                test_images=len(test.labels),
                method=method.name,
                notes=classify.notes(),
            )
        )
    return results


Images = TokenStore | tuple[Tensor, Tensor]
"""A token store, or tokens int64 [N, T] and labels int64 [N]."""


def probe(
    model: Transformer | Callable[[Tensor], Tensor],
    train: Images,
    test: Images,
    *,
    layer: int | None = None,
    steps: Sequence[int] | None = None,
    train_crops: Sequence[int] | None = None,
    config: ProbeConfig | None = None,
    method: Method = "mae",
    batch_size: int = 256,
) -> ProbeResult:
    """Probe one layer, by MAE's protocol unless `method` is another, with features in memory.

    Args:
        model: a transformer, whose `layer` is read as by `probe_layers`; or a function of any network: tokens int64 [b, T] on the
            CPU -> features [b, D], or [b, S, D] at S steps, each of which is probed.
        train: images to train on; of a store all crops, or `train_crops`.
        test: images to test on; of a store the centre crops. Tensors are for functions only.
        batch_size: images that a function gets at once.

    Raises:
        UserError: as `probe_layers`, or a function's features have another shape or are not finite.
    """
    chosen = ProbeMethod(name=method, config=config or ProbeConfig())
    if not isinstance(model, Transformer):
        if layer is not None or steps is not None:
            raise UserError("layer and steps are for a Transformer: let the function return the features to probe")
        return _probe_function(model, train, test, train_crops, chosen, batch_size)
    if not isinstance(train, TokenStore) or not isinstance(test, TokenStore):
        raise UserError("a Transformer is probed on two token stores: give TokenStore(folder)")
    layers = None if layer is None else [layer]
    return probe_layers(model, train, test, layers=layers, steps=steps, train_crops=train_crops, method=chosen)[0]


def _probe_function(
    features: Callable[[Tensor], Tensor],
    train: Images,
    test: Images,
    train_crops: Sequence[int] | None,
    method: ProbeMethod,
    batch_size: int,
) -> ProbeResult:
    if isinstance(train, TokenStore) and isinstance(test, TokenStore):
        require_classes(train, test)
        every = range(len(train.meta.crops)) if train_crops is None else train_crops
        train, test = _tensors(train, every), _tensors(test, (test.center,))
    if isinstance(train, TokenStore) or isinstance(test, TokenStore):
        raise UserError("one of the two is a token store: give two stores, or two pairs of tokens and labels")
    num_classes = int(max(train[1].max(), test[1].max())) + 1
    if num_classes < 2 or int(min(train[1].min(), test[1].min())) < 0:
        raise UserError("a probe needs labels of 2 or more classes, from 0 on")
    read = [_read(features, *each, batch_size) for each in (train, test)]
    steps = list(range(1, read[0].layers[0].shape[1] + 1))
    return _fit(read[0], read[1], num_classes, steps, method, torch.device("cpu"))[0]


def _tensors(store: TokenStore, crops: Sequence[int]) -> tuple[Tensor, Tensor]:
    tokens = torch.cat([tokens for tokens, _ in token_batches(store, crops, ROWS)])
    return tokens, torch.from_numpy(np.tile(store.labels, len(crops)))


@torch.no_grad()
def _read(features: Callable[[Tensor], Tensor], tokens: Tensor, labels: Tensor, batch_size: int) -> ProbeFeatures:
    """Compute the features of all tokens; they are layer 0."""
    parts: list[Tensor] = []
    with progress("read features", len(tokens), unit="images") as bar:
        for batch in tokens.split(batch_size):
            rows = features(batch)
            if rows.dim() not in (2, 3) or len(rows) != len(batch):
                raise UserError(f"features of {len(batch)} images must be [b, D] or [b, S, D], not {list(rows.shape)}")
            rows = rows.float().cpu().view(len(rows), -1, rows.shape[-1])
            require_bounded(rows, lambda row, start=bar.done: f"image {start + row}", "check the network")
            parts.append(rows)
            bar.advance(len(batch))
    return ProbeFeatures(layers={0: torch.cat(parts).numpy()}, labels=labels)


FORMAT_VERSION = 1


def choose_eval_features(
    subject: EvalModel,
    train_store: TokenStore,
    test_store: TokenStore,
    layers: Sequence[int] | Literal["all"],
    steps: Sequence[int],
    train_crops: Sequence[int] | None,
    dtype: torch.dtype,
) -> FeatureSpec:
    """Return the features to read of a model. Empty layers or steps mean the defaults of `choose_features`."""
    config, stores = subject.info.config, (train_store, test_store)
    layers = range(1, config.n_layers + 1) if isinstance(layers, str) else layers
    spec, _ = choose_features(
        config, *stores, layers=layers or None, steps=steps or None, train_crops=train_crops, dtype=dtype
    )
    for store in stores:
        check_store(subject.info, store)
    if subject.info.class_dropout == 0:
        raise UserError(
            f"{subject.info.source} was trained with --class-dropout 0 and has no null class, which probes need so that no label "
            "leaks: train with --class-dropout above 0"
        )
    return spec


Probed = Sequence[tuple[EvalModel, ProbeResult]]
"""A result for each model and layer."""


def accuracy_table(probed: Probed) -> tuple[list[str], list[list[str]]]:
    """Return header and rows for print_table: accuracies in %, a row per model and layer, a column per step."""
    first = probed[0][1]
    header = ["accuracy (%) at step", "layer", "", *map(str, first.steps)]
    header += [] if first.mean_top1 is None else ["mean"]
    rows = [
        [subject.name, str(result.layer), label, *(f"{100 * s:.1f}" for s in [*by_step, mean] if s is not None)]
        for subject, result in probed
        for label, by_step, mean in (
            ("top-1", result.top1, result.mean_top1),
            ("top-5", result.top5, result.mean_top5),
        )
        if by_step is not None
    ]
    return header, rows


def describe_cache(cache: FeatureCache) -> str:
    """Return a sentence on the files read from and written to the cache."""
    total = cache.reused + cache.written
    if cache.reused == total:
        return f"all features read from {cache.folder}"
    reused = f"{cache.reused} of {total} feature files read from it, " if cache.reused else ""
    return f"{reused}{cache.written} feature {'file' if cache.written == 1 else 'files'} kept in {cache.folder}"


def accuracy_figure(probed: Probed, method: ProbeMethod) -> Drawing:
    """Top-1 accuracies in % by step, a line per model and layer.

    If that makes more lines than there are colours, accuracies after the last step over the layers, a line per model.
    """
    several = len({result.layer for _, result in probed}) > 1
    sweep = several and len(probed) > len(COLOURS)
    series: dict[str, tuple[list[float], list[float]]] = {}
    for subject, result in probed:
        label = f"{subject.name}, layer {result.layer}" if several and not sweep else subject.name
        xs, ys = series.setdefault(label, ([], []))
        xs += [result.layer] if sweep else result.steps
        ys += [100 * share for share in (result.top1[-1:] if sweep else result.top1)]
    steps, name = probed[0][1].steps, NAMES[method.name]
    return line_chart(
        series,
        name=f"accuracy of a {name}, by {'layer' if sweep else 'step'}",
        x="layer" if sweep else "step",
        y=f"accuracy (%)\n{name}" + (f"\nat step {steps[-1]}" if sweep else ""),
        x_ticks=sorted({x for xs, _ in series.values() for x in xs}) if sweep else steps,
    )


def describe_probes(
    probed: Probed,
    train_store: TokenStore,
    test_store: TokenStore,
    train_crops: Sequence[int] | None,
    method: ProbeMethod,
    dtype: torch.dtype,
    stored: str,
) -> dict[str, Any]:
    """Return all results and what identifies them, as plain JSON values (docs/formats.md)."""
    settings = asdict(method.config) if method.name == "mae" else {"penalty": method.penalty}
    crops = range(len(train_store.meta.crops)) if train_crops is None else train_crops
    return {
        "format_version": FORMAT_VERSION,
        "method": NAMES[method.name],
        "settings": {
            **settings,
            "mean_over_steps": method.mean_over_steps,
            "train_crops": list(crops),
            "test_crop": test_store.meta.crops[test_store.center],
            "dtype": str(dtype).removeprefix("torch."),
            "cache_dtype": stored,
        },
        "classes": len(train_store.meta.class_names),
        "train": train_store.describe(),
        "test": test_store.describe(),
        "results": [
            {
                "model": subject.name,
                "weights": subject.describe(),
                **{key: value for key, value in asdict(result).items() if key != "method"},
            }
            for subject, result in probed
        ],
        "environment": describe(),
    }


def probe_page(path: Path, probed: Probed, method: ProbeMethod, record: dict[str, Any], notes: Sequence[str]) -> None:
    """Write the HTML report of linear probes: table, curves and the record of `describe_probes`."""
    header, rows = accuracy_table(probed)
    curves = Chart(svg=accuracy_figure(probed, method).svg(), caption="Top-1 accuracy on the test images.")
    weights = [
        (subject.name, str(described["file"]), str(described["sha256"])[:16], str(described["step"]))
        for subject, _ in probed
        if (described := subject.describe())
    ]
    files = Table(columns=["model", "weights", "SHA-256", "step"], rows=list(dict.fromkeys(weights)))
    sections = [
        Section(title="Accuracy", paragraphs=notes, parts=[Table(columns=header, rows=rows), curves]),
        Section(title="Weights", parts=[files]),
        provenance(record, ["settings", "train", "test", "environment"]),
    ]
    _, first = probed[0]
    lead = f"{record['method']}; {first.train_images:,} training and {first.test_images:,} test images."
    write_report(path, title="Linear probes", lead=lead, sections=sections)
