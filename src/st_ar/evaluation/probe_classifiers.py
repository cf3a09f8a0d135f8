"""Probe classifiers: MAE's batch norm and linear layer trained by LARS (arXiv 2111.06377), or scikit-learn's.

There is one classifier per step and layer. All train in one pass, and none depends on the others.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.errors import UserError
from st_ar.hardware import to_device
from st_ar.progress import progress
from st_ar.randomness import RandomStream, torch_generator
from st_ar.settings import Checked, Portion, Positive, Range, Seed, Weight, Whole


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(Checked):
    """Settings of MAE's protocol, with its defaults."""

    epochs: Annotated[int, Range(1, 1 << 16)] = 90
    warmup_epochs: Whole = 10
    """Passes of linear warm-up. A cosine to 0 follows."""
    batch_size: Annotated[int, Range(2, 1 << 24)] = 16384
    """Features per step. Small data sets use fewer, so that an epoch has at least 32 steps."""
    base_lr: Positive = 0.1
    """Learning rate for a batch of 256. It scales with the batch."""
    min_lr: Weight = 1.0
    """Smallest peak rate after scaling. Without it LARS does not converge in 90 epochs of a few thousand images. 0 is MAE's exact rule."""
    momentum: Portion = 0.9
    trust: Positive = 1e-3
    seed: Seed = 0
    """Seed of the initial weights and the order of the images."""


Pair = tuple[Tensor, Tensor]
"""One tensor for the weights [S, C, D] and one for the biases [S, C] of S independent classifiers."""


@torch.no_grad()
def lars_step(parameters: Pair, velocities: Pair, gradients: Pair, *, lr: float, momentum: float, trust: float) -> None:
    """Take one step of LARS (arXiv 1708.03888) as in MAE's probe: no weight decay, biases exempt from the trust ratio.

    Each classifier has its own trust ratio.
    """
    norm, grad_norm = (x.flatten(1).norm(dim=1)[:, None, None] for x in (parameters[0], gradients[0]))
    ratio = torch.where((norm > 0) & (grad_norm > 0), trust * norm / grad_norm, 1.0)
    updates = gradients[0] * ratio, gradients[1]
    for parameter, velocity, update in zip(parameters, velocities, updates, strict=True):
        velocity.mul_(momentum).add_(update)
        parameter.sub_(velocity, alpha=lr)


def probe_rate(config: ProbeConfig, epoch: float, batch_size: int) -> float:
    """Return the learning rate at a fractional epoch: linear warm-up, then half a cosine to 0."""
    peak = max(config.base_lr * batch_size / 256, config.min_lr)
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    done = (epoch - config.warmup_epochs) / max(1e-9, config.epochs - config.warmup_epochs)
    return peak * (1 + math.cos(math.pi * done)) / 2


def with_mean(features: Tensor, mean_over_steps: bool) -> Tensor:
    """Append the mean over steps to features [n, S, D] if `mean_over_steps`: [n, S + 1, D]."""
    return torch.cat([features, features.mean(1, keepdim=True)], dim=1) if mean_over_steps else features


class Classifiers:
    """The classifiers of one layer: BatchNorm1d(affine=False, eps=1e-6) and a linear layer for each step, computed in one product.

    Args:
        weights: initial weights, float32 [S, C, D]. mean_over_steps: the last classifier reads the mean over steps.
    """

    def __init__(self, weights: Tensor, config: ProbeConfig, *, mean_over_steps: bool) -> None:
        self.count, self.num_classes, self.dim = weights.shape
        self.config, self.weights, self.mean_over_steps = config, weights.clone(), mean_over_steps
        self.biases = weights.new_zeros(self.count, self.num_classes)
        self.norm = nn.BatchNorm1d(self.count * self.dim, affine=False, eps=1e-6).to(weights.device)
        self.velocities = torch.zeros_like(self.weights), torch.zeros_like(self.biases)

    def _normalised(self, features: Tensor) -> Tensor:
        x = with_mean(features.to(self.weights.device), self.mean_over_steps)
        return self.norm(x.flatten(1)).unflatten(1, (self.count, self.dim)).transpose(0, 1)  # (S, n, D)

    def step(self, features: Tensor, labels: Tensor, lr: float) -> None:
        """Train one step on features [n, S, D] and labels [n]."""
        self.norm.train()
        x = self._normalised(features)
        logits = torch.baddbmm(self.biases[:, None], x, self.weights.transpose(1, 2))  # (S, n, C)
        error = (logits.softmax(-1) - F.one_hot(to_device(labels, x.device), self.num_classes)) / len(labels)
        gradients = (error.transpose(1, 2) @ x, error.sum(1))  # of the mean cross-entropy
        options = {"lr": lr, "momentum": self.config.momentum, "trust": self.config.trust}
        lars_step((self.weights, self.biases), self.velocities, gradients, **options)

    def notes(self) -> tuple[str, ...]:
        """Return warnings about the training."""
        epochs, warmup = self.config.epochs, self.config.warmup_epochs
        if epochs > warmup:
            return ()
        return (f"{epochs} epochs end within the {warmup} of the warm-up: these classifiers are far from trained",)

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits [n, S, C] of features [n, S, D]. Images do not affect one another."""
        self.norm.eval()
        x = self._normalised(features)
        return torch.baddbmm(self.biases[:, None], x, self.weights.transpose(1, 2)).transpose(0, 1)


def copy_if_it_fits(features: np.ndarray, device: torch.device, share: float) -> np.ndarray | Tensor:
    """Copy features to a GPU if they fit into a share of its free memory."""
    fits = device.type == "cuda" and 4 * features.size <= share * torch.cuda.mem_get_info(device)[0]
    return copy_to_device(features, device) if fits else features


def copy_to_device(features: np.ndarray, device: torch.device, rows: int = 4096) -> Tensor:
    """Copy features [N, S, D] to a device as float32, `rows` at a time."""
    copied = torch.empty(features.shape, device=device)
    for part, numbers in zip(copied.split(rows), torch.arange(len(features)).split(rows), strict=True):
        part.copy_(read_rows(features, numbers))
    return copied


def read_rows(features: np.ndarray | Tensor, rows: Tensor) -> Tensor:
    """Return rows [n] of features [N, S, D] as float32 [n, S, D]. A file is read from front to back."""
    if isinstance(features, Tensor):
        return features[to_device(rows, features.device)]
    ordered, order = rows.sort()
    batch = np.empty((len(rows), *features.shape[1:]), np.float32)
    batch[order.numpy()] = features[ordered.numpy()]
    return torch.from_numpy(batch)


def fit_classifiers(
    layers: Sequence[np.ndarray],
    labels: Tensor,
    num_classes: int,
    config: ProbeConfig,
    *,
    mean_over_steps: bool = False,
    device: torch.device | None = None,
) -> list[Classifiers]:
    """Train the classifiers of all layers in one pass over the features. Only one batch of a file is in memory at a time.

    All layers have the same initial weights and the same batches. A layer's result does not depend on the others.

    Args:
        layers: features [N, S, D] of each layer, in memory or memory-mapped. labels: int64 [N].
        mean_over_steps: adds a classifier per layer for the mean over steps.
    """
    count, steps, dim = layers[0].shape
    if count < 2:
        raise UserError(f"{count} training images are too few for a probe: its batch norm needs at least 2")
    generator = torch_generator(config.seed, RandomStream.PROBE)
    batch_size = min(config.batch_size, max(2, count // 32))
    weights = nn.init.trunc_normal_(torch.empty(steps, num_classes, dim), std=0.01, generator=generator)
    if mean_over_steps:  # from another generator, so that the other classifiers do not change
        mean_generator = torch_generator(config.seed, RandomStream.PROBE, 1)
        mean = nn.init.trunc_normal_(torch.empty(1, num_classes, dim), std=0.01, generator=mean_generator)
        weights = torch.cat([weights, mean])
    weights = weights.to(device)
    fitted = [Classifiers(weights, config, mean_over_steps=mean_over_steps) for _ in layers]
    stack = [copy_if_it_fits(features, weights.device, 0.5 / len(layers)) for features in layers]
    per_epoch = count // batch_size
    with progress("train probes", config.epochs * per_epoch, unit="steps") as bar:
        for epoch in range(config.epochs):
            order = torch.randperm(count, generator=generator)
            for index in range(per_epoch):
                chosen = order[index * batch_size : (index + 1) * batch_size]
                lr = probe_rate(config, epoch + index / per_epoch, batch_size)
                for classifiers, features in zip(fitted, stack, strict=True):
                    classifiers.step(read_rows(features, chosen), labels[chosen], lr)
                bar.advance(1)
    return fitted


Method = Literal["mae", "ridge", "logistic"]
NAMES: dict[Method, str] = {
    "mae": "linear probe after MAE",
    "ridge": "ridge regression, not the MAE protocol",
    "logistic": "logistic regression, not the MAE protocol",
}
MAX_ITERATIONS = 1000


class ShallowClassifiers:
    """The classifiers of one layer by scikit-learn, one for each step.

    Features are standardised first. Ridge regresses on -1 and 1 for each class, by Cholesky's decomposition.

    Args:
        features: [N, S, D], in memory or memory-mapped. One step at a time is copied into memory.
        labels: int64 [N].
        penalty: alpha of ridge regression, 1 / C of logistic regression.
        mean_over_steps: adds a classifier for the mean over steps.
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: Tensor,
        num_classes: int,
        method: Literal["ridge", "logistic"],
        penalty: float,
        *,
        mean_over_steps: bool,
    ) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression, RidgeClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.num_classes, self.mean_over_steps = num_classes, mean_over_steps
        self.unconverged = 0
        self.models: list[Any] = []
        with progress(f"{method} regression", features.shape[1] + mean_over_steps, unit="classifiers") as bar:
            for x in self._inputs(features):
                if method == "ridge":
                    classifier: Any = RidgeClassifier(alpha=penalty, solver="cholesky")
                else:
                    classifier = LogisticRegression(C=1 / penalty, max_iter=MAX_ITERATIONS)
                model = make_pipeline(StandardScaler(copy=False), classifier)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("ignore")
                    warnings.simplefilter("always", ConvergenceWarning)
                    model.fit(x, labels.numpy())
                self.unconverged += bool(caught)
                self.models.append(model)
                bar.advance(1)

    def _inputs(self, features: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the input [N, D] of each classifier."""
        for step in range(features.shape[1]):
            yield np.array(features[:, step], np.float32)
        if self.mean_over_steps:
            blocks = torch.arange(len(features)).split(16384)
            yield torch.cat([with_mean(read_rows(features, rows), True)[:, -1] for rows in blocks]).numpy()

    def notes(self) -> tuple[str, ...]:
        """Return warnings about the training."""
        if not self.unconverged:
            return ()
        return (
            f"{self.unconverged} of {len(self.models)} logistic regressions had not converged after {MAX_ITERATIONS:,} iterations; "
            "a larger --penalty converges sooner",
        )

    def __call__(self, features: Tensor) -> Tensor:
        """Return scores [n, S, C] of features [n, S, D]; -inf for a class without training images."""
        x = with_mean(features, self.mean_over_steps)
        scores = torch.full((len(x), len(self.models), self.num_classes), -torch.inf)
        for index, model in enumerate(self.models):
            decision = torch.from_numpy(model.decision_function(x[:, index].numpy().copy())).float()
            if decision.dim() == 1:  # for two classes scikit-learn returns only the second's score
                decision = torch.stack([-decision, decision], dim=1)
            scores[:, index, torch.from_numpy(model.classes_)] = decision
        return scores
