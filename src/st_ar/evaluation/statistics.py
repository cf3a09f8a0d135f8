"""Mean and covariance of features that come in pieces: in float64, stable, the same whatever the pieces.

Sums of squares about the mean of what has come so far are merged as Chan, Golub and LeVeque (1983) do it, so that features far
from 0 lose no digits. Rows are merged in blocks of a fixed size from the first one on: the size of the pieces does not
change a bit of the result.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from st_ar.distributed import total
from st_ar.errors import UserError

BLOCK = 1024
"""Rows that are merged at once."""


class Gaussian(NamedTuple):
    """What a Frechet distance compares."""

    mean: np.ndarray
    """float64 [D]."""
    covariance: np.ndarray
    """float64 [D, D], over N - 1 as np.cov has it."""


class FeatureStatistics:
    """Of features [.., D], as they come."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._squares = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean) (x - mean)^T
        self._rest: list[Tensor] = []
        self._waiting = 0

    def update(self, features: Tensor) -> None:
        """Take more features [n, D], of one type.

        Raises:
            UserError: some of them are no finite numbers; they may be noticed later, by `result` at the latest.
        """
        self._rest.append(features.detach().to(self._mean.device))
        self._waiting += len(features)
        while self._waiting >= BLOCK:
            rows = torch.cat(self._rest)
            self._absorb(rows[:BLOCK])
            self._rest, self._waiting = [rows[BLOCK:]], len(rows) - BLOCK

    def _absorb(self, rows: Tensor) -> None:
        if not rows.isfinite().all():
            raise UserError("features hold NaN or infinity: look for damaged images or weights")
        rows = rows.to(self._mean)
        mean = rows.mean(0)
        about = rows - mean
        self._squares.addmm_(about.T, about)
        self._move(len(rows), mean)

    def _move(self, count: int, mean: Tensor) -> None:
        """Take in the mean of `count` more rows, whose own squares are in already."""
        whole = self.count + count
        apart = mean - self._mean
        self._squares.addr_(apart, apart, alpha=self.count * count / whole)
        self._mean += apart * (count / whole)
        self.count = whole

    def _flush(self) -> None:
        if self._waiting:
            self._absorb(torch.cat(self._rest))
        self._rest, self._waiting = [], 0

    def reduce(self) -> None:
        """Take over what all ranks have seen; every rank has to call it."""
        self._flush()
        count = total(torch.tensor([self.count], device=self._mean.device))
        mean = total(self._mean * self.count) / count.clamp(min=1)
        apart = self._mean - mean
        self._squares = total(self._squares.addr_(apart, apart, alpha=self.count))
        self._mean, self.count = mean, int(count)

    def result(self) -> Gaussian:
        """Mean and covariance of all features so far.

        Raises:
            UserError: fewer than two.
        """
        self._flush()
        if self.count < 2:
            raise UserError(f"{self.count} image{'s' * (self.count != 1)} cannot have a covariance: give at least 2")
        return Gaussian(self._mean.cpu().numpy().copy(), (self._squares / (self.count - 1)).cpu().numpy())


class InceptionScore:
    """The Inception score of probabilities that come in pieces, each with its place in the order of the splits.

    Args:
        classes: C. split_size: places to a split; the last may be shorter.
    """

    def __init__(self, count: int, classes: int, split_size: int = 5000, device: torch.device | str = "cpu") -> None:
        if split_size < 1:
            raise UserError(f"the splits of an Inception score have 1 or more images, not {split_size}")
        if count < 1:
            raise UserError("there are no images to score")
        self.split_size = split_size
        splits = -(-count // split_size)
        self._sums = torch.zeros(splits, classes, dtype=torch.float64, device=device)
        self._entropy = torch.zeros(splits, dtype=torch.float64, device=device)  # sum of p log p
        self._counts = torch.zeros(splits, dtype=torch.float64, device=device)

    def update(self, probabilities: Tensor, places: Tensor) -> None:
        """Take probabilities [n, C] at places int64 [n]."""
        p = probabilities.to(self._sums)
        if not p.isfinite().all():
            raise UserError("probabilities hold NaN or infinity: look for damaged images or weights")
        split = (places // self.split_size).to(p.device)
        self._sums.index_add_(0, split, p)
        self._entropy.index_add_(0, split, torch.xlogy(p, p).sum(1))
        self._counts.index_add_(0, split, torch.ones_like(p[:, 0]))

    def reduce(self) -> None:
        """Take over what all ranks have seen; every rank has to call it."""
        self._sums, self._entropy, self._counts = map(total, (self._sums, self._entropy, self._counts))

    def result(self) -> float:
        """Mean over the splits of exp of the mean of KL(p(y|x) || p(y)) (arXiv 1606.03498)."""
        counts = self._counts[:, None]
        marginal = self._sums / counts
        # mean of sum p log p, less sum of mean p log of mean p
        return (self._entropy / self._counts - torch.xlogy(marginal, marginal).sum(1)).exp().mean().item()
