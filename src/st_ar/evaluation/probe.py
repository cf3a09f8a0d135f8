"""Linear probing after MAE (arXiv 2111.06377): what the hidden state at each step says about the image's class.

The network is frozen and given the null condition, so no label leaks. At step t the probe reads the state that has seen
the condition and t - 1 image tokens (input position t - 1). One linear classifier a step, all trained together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.model.transformer import Transformer
from st_ar.progress import progress
from st_ar.randomness import Purpose, torch_generator


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The protocol's settings; the defaults are MAE's."""

    epochs: int = 90
    """Passes over the training features."""
    warmup_epochs: int = 10
    """Passes over which the learning rate rises linearly; then it falls to 0 by a cosine."""
    batch_size: int = 16384
    """Features per step; small data sets scale it down so that an epoch has at least 32 steps."""
    base_lr: float = 0.1
    """Learning rate for a batch of 256; it scales with the batch."""
    min_lr: float = 1.0
    """The peak rate is not scaled below this: LARS's steps are a share of the weights' norm, and with the small rate of a small
    batch it stops far from convergence after 90 epochs of a few thousand images. 0 scales all the way, MAE's rule to the letter."""
    momentum: float = 0.9
    """LARS's momentum."""
    trust: float = 1e-3
    """LARS's trust coefficient."""
    seed: int = 0
    """Seed of initialisation and order."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("warmup_epochs", 0), ("batch_size", 2), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"--{name.replace('_', '-')} must be {least} or more, not {value}")
        if not 0 <= self.min_lr < math.inf:
            raise UserError(f"--min-lr must be 0 or more, not {self.min_lr}")
        for name in ("base_lr", "trust"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"--momentum must lie in [0, 1), not {self.momentum}")


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


def uniform_steps(length: int, count: int = 8) -> list[int]:
    """`count` uniformly spaced steps, the last being `length`: 32, 64, .. 256 of 256."""
    if not 1 <= count <= length:
        raise UserError(f"{count} steps asked for; an image of this model has {length}: give 1 to that many")
    return [round(length * (i + 1) / count) for i in range(count)]


def batches(store: TokenStore, crops: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens int64 [n, T] and labels [n]: the chosen crops of all images, crop by crop."""
    for crop in crops:
        for start in range(0, len(store), batch_size):
            images = np.arange(start, min(start + batch_size, len(store)))
            codes = store.codes(images, np.full((len(images), 1), crop))[:, 0]
            yield torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(store.labels[images])


@torch.no_grad()
def extract_features(
    model: Transformer,
    store: TokenStore,
    *,
    layer: int,
    steps: Sequence[int],
    crops: Sequence[int] = (0,),
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Hidden states of a layer at the steps, null condition: float32 [n, steps, D], and labels [n].

    Raises:
        UserError: a store that is not the model's, or a layer or step out of range.
    """
    store.check_model(model.config)
    length = model.config.sequence_length
    if wrong := [step for step in steps if not 1 <= step <= length]:
        raise UserError(f"no step {wrong[0]}: this model's images have steps 1 to {length}")
    if not steps or not crops:
        raise UserError("give at least one of --steps and of --train-crops: there is nothing to probe otherwise")
    if wrong := [crop for crop in crops if not 0 <= crop < len(store.meta.crops)]:
        raise UserError(f"no crop {wrong[0]} in {store.folder}: it has {len(store.meta.crops)} of each image")
    assert not model.training
    positions = torch.tensor(steps) - 1
    features: list[Tensor] = []
    labels: list[Tensor] = []
    total = len(store) * len(crops)
    with progress(f"read layer {layer}", total, unit="images") as bar:
        for tokens, classes in batches(store, crops, batch_size):
            null = model.null_condition(len(tokens))
            hidden = model.features(tokens[:, :-1], null, layers={layer})[layer]
            features.append(hidden[:, positions].float())
            labels.append(classes)
            bar.advance(len(tokens))
    return torch.cat(features), torch.cat(labels)


class Lars:
    """LARS (arXiv 1708.03888) as in MAE's probe: momentum, trust ratio, 1-d parameters exempt, no weight decay.

    The first dimension of every parameter counts the independent classifiers: each has its own trust ratio.
    """

    def __init__(self, weights: Tensor, biases: Tensor, *, momentum: float, trust: float) -> None:
        self.weights, self.biases, self.momentum, self.trust = weights, biases, momentum, trust
        self.velocity = [torch.zeros_like(weights), torch.zeros_like(biases)]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """One step with the gradients of weights [S, C, D] and biases [S, C]."""
        grad, bias_grad = gradients
        norm, grad_norm = (x.flatten(1).norm(dim=1)[:, None, None] for x in (self.weights, grad))
        ratio = torch.where((norm > 0) & (grad_norm > 0), self.trust * norm / grad_norm, 1.0)
        for parameter, velocity, update in (
            (self.weights, self.velocity[0], grad * ratio),
            (self.biases, self.velocity[1], bias_grad),
        ):
            velocity.mul_(self.momentum).add_(update)
            parameter.sub_(velocity, alpha=lr)


def probe_rate(config: ProbeConfig, epoch: float, batch_size: int) -> float:
    """The learning rate at a fractional epoch: linear warm-up, then half a cosine to 0."""
    peak = max(config.base_lr * batch_size / 256, config.min_lr)
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    done = (epoch - config.warmup_epochs) / max(1e-9, config.epochs - config.warmup_epochs)
    return peak * (1 + math.cos(math.pi * done)) / 2


def fit_classifiers(
    features: Tensor, labels: Tensor, num_classes: int, config: ProbeConfig
) -> Callable[[Tensor], Tensor]:
    """Train one classifier a step on features [N, S, D]; returns a function from features to logits [n, S, C].

    Each is BatchNorm1d(affine=False, eps=1e-6) and a linear layer.
    """
    count, steps, dim = features.shape
    generator = torch_generator(config.seed, Purpose.PROBE)
    if count < 2:
        raise UserError(f"{count} training images are too few for a probe: its batch norm needs at least 2")
    batch_size = min(config.batch_size, max(2, count // 32))
    norm = nn.BatchNorm1d(steps * dim, affine=False, eps=1e-6)
    weights = nn.init.trunc_normal_(torch.empty(steps, num_classes, dim), std=0.01, generator=generator)
    biases = torch.zeros(steps, num_classes)
    optimizer = Lars(weights, biases, momentum=config.momentum, trust=config.trust)
    per_epoch = count // batch_size
    with progress("train probes", config.epochs, unit="epochs") as bar:
        for epoch in range(config.epochs):
            order = torch.randperm(count, generator=generator)
            for index in range(per_epoch):
                chosen = order[index * batch_size : (index + 1) * batch_size]
                x = norm(features[chosen].flatten(1)).unflatten(1, (steps, dim)).transpose(0, 1)  # (S, b, D)
                logits = torch.baddbmm(biases[:, None], x, weights.transpose(1, 2))  # (S, b, C)
                error = (logits.softmax(-1) - F.one_hot(labels[chosen], num_classes)) / len(chosen)
                gradients = (error.transpose(1, 2) @ x, error.sum(1))  # of the mean cross-entropy
                optimizer.step(gradients, probe_rate(config, epoch + index / per_epoch, batch_size))
            bar.advance(1)
    norm.eval()

    def classify(new: Tensor) -> Tensor:
        x = norm(new.flatten(1)).unflatten(1, (steps, dim)).transpose(0, 1)
        return torch.baddbmm(biases[:, None], x, weights.transpose(1, 2)).transpose(0, 1)

    return classify


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
    """Probe accuracy by step: classifiers trained on the stored crops, tested on the test store's first crop.

    Args:
        layer: counted from 1; half the depth if None.
        steps: in 1..T; 8 uniformly spaced ones if None.
        train_crops: which of the training store's crops to read; all if None.

    Raises:
        UserError: a store that is not the model's or has other classes, a layer or step out of range.
    """
    config = config or ProbeConfig()
    layer = max(1, model.config.n_layers // 2) if layer is None else layer
    steps = list(steps) if steps is not None else uniform_steps(model.config.sequence_length)
    before = [parameter.clone() for parameter in model.parameters()]
    crops = range(len(train_store.meta.crops)) if train_crops is None else train_crops
    features, labels = extract_features(model, train_store, layer=layer, steps=steps, crops=crops)
    test_features, test_labels = extract_features(model, test_store, layer=layer, steps=steps)
    classify = fit_classifiers(features, labels, len(train_store.meta.class_names), config)
    right = classify(test_features).argmax(-1) == test_labels[:, None]  # (n, S)
    assert all(map(torch.equal, before, model.parameters())), "probing changed the network"
    return ProbeResult(
        layer=layer,
        steps=steps,
        top1=right.float().mean(0).tolist(),
        train_images=len(features),
        test_images=len(test_labels),
    )
