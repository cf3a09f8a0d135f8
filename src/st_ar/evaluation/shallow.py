"""Quick classifiers by scikit-learn in place of MAE's: ridge regression (closed form) and logistic regression (L-BFGS).

Their accuracies rank features in seconds. They are other numbers than the MAE protocol's, and are named so everywhere.
"""

import warnings
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from st_ar.errors import UserError
from st_ar.evaluation.lars import read_rows, with_mean
from st_ar.progress import progress

Method = Literal["mae", "ridge", "logistic"]
NAMES: dict[Method, str] = {
    "mae": "linear probe after MAE",
    "ridge": "ridge regression, not the MAE protocol",
    "logistic": "logistic regression, not the MAE protocol",
}
"""What a method's numbers are called."""
MAX_ITERATIONS = 1000
"""Of L-BFGS."""


def require_sklearn() -> None:
    """Refuse ridge and logistic regression where scikit-learn is not installed."""
    try:
        import_module("sklearn")
    except ModuleNotFoundError as error:
        raise UserError(
            f"--method ridge and logistic are scikit-learn's ({error}): pip install 'st-ar[quickstart]', or give --method mae"
        ) from error


class ShallowClassifiers:
    """One classifier of scikit-learn's for each step of a layer, and perhaps one for the steps' mean.

    Each standardises its features first. Ridge regresses on -1 and 1 for each class, by Cholesky's decomposition.

    Args:
        features: [N, S, D], in memory or memory-mapped; those of one step are in memory at a time.
        labels: int64 [N].
        penalty: alpha of ridge regression, 1 / C of logistic regression.
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
        self.num_classes, self.mean_over_steps = num_classes, mean_over_steps
        self.unfinished = 0
        """Classifiers whose L-BFGS stopped before it converged."""
        self.models: list[Any] = []
        steps = features.shape[1]
        with progress(f"{method} regression", steps + mean_over_steps, unit="classifiers") as bar:
            for step in range(steps):
                self._fit(np.array(features[:, step], np.float32), labels, method, penalty)
                bar.advance(1)
            if mean_over_steps:
                parts = [with_mean(read_rows(features, rows), True)[:, -1] for rows in _blocks(len(features))]
                self._fit(torch.cat(parts).numpy(), labels, method, penalty)
                bar.advance(1)

    def _fit(self, x: np.ndarray, labels: Tensor, method: Literal["ridge", "logistic"], penalty: float) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression, RidgeClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if method == "ridge":
            last: Any = RidgeClassifier(alpha=penalty, solver="cholesky")
        else:
            last = LogisticRegression(C=1 / penalty, max_iter=MAX_ITERATIONS)
        model = make_pipeline(StandardScaler(copy=False), last)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(x, labels.numpy())
        self.unfinished += bool(caught)
        self.models.append(model)

    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers should know."""
        if not self.unfinished:
            return ()
        return (
            f"{self.unfinished} of {len(self.models)} logistic regressions had not converged after {MAX_ITERATIONS:,} iterations; "
            "a larger --penalty converges sooner",
        )

    def __call__(self, features: Tensor) -> Tensor:
        """Scores [n, S, C] of features [n, S, D]: ridge's outputs or logits; -inf for a class without training images."""
        x = with_mean(features, self.mean_over_steps)
        scores = torch.full((len(x), len(self.models), self.num_classes), -torch.inf)
        for index, model in enumerate(self.models):
            found = torch.from_numpy(model.decision_function(x[:, index].numpy().copy())).float()
            if found.dim() == 1:  # of two classes scikit-learn gives the second's alone
                found = torch.stack([-found, found], dim=1)
            scores[:, index, torch.from_numpy(model.classes_)] = found
        return scores


def _blocks(count: int, size: int = 16384) -> tuple[Tensor, ...]:
    return torch.arange(count).split(size)
