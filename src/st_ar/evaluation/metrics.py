"""Numbers from statistics and features, as pure functions."""

import contextlib
from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from st_ar.errors import UserError
from st_ar.evaluation.manifolds import DensityCoverage, Features, PrecisionRecall, check_features, compare
from st_ar.evaluation.statistics import FeatureStatistics, InceptionScore

Array = np.ndarray


def mean_and_covariance(features: Array) -> tuple[Array, Array]:
    """Mean [D] and covariance [D, D] of features [N, D], in float64; N of 2 or more."""
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(torch.from_numpy(features))
    return statistics.result()


@contextlib.contextmanager
def _one_thread() -> Generator[None]:
    """On busy cores the threads of an eigenvalue problem wait for one another several times as long as one computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _factor(matrix: Tensor) -> Tensor:
    """F with F F^T = matrix, positive semi-definite: Cholesky's where there is one, which is quick, else from eigenvectors."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt()  # rounding's negative eigenvalues count as 0


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 sqrt(S1 S2)): the squared Wasserstein-2 distance of two Gaussians.

    The trace of sqrt(S1 S2) is taken from the eigenvalues of the symmetric F^T S2 F with F F^T = S1, which are the same: no
    complex numbers, and singular covariances need no offset. With Inception's pool_3 features this is the FID
    (arXiv 1706.08500).

    Args:
        mu1, mu2: means [D]. sigma1, sigma2: covariances [D, D].

    Raises:
        UserError: shapes that do not belong together, or numbers that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.array(a, np.float64, order="C") for a in (mu1, sigma1, mu2, sigma2))
    dim = mu1.size
    if mu1.shape != (dim,) or mu2.shape != (dim,) or sigma1.shape != (dim, dim) or sigma2.shape != (dim, dim):
        shapes = ", ".join(str(list(a.shape)) for a in (mu1, sigma1, mu2, sigma2))
        raise UserError(f"means [D] and covariances [D, D] do not belong together: {shapes}")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("means or covariances hold NaN or infinity: make the statistics again")
    with _one_thread():
        factor = _factor(torch.from_numpy(sigma1))
        eigenvalues = torch.linalg.eigvalsh(factor.T @ torch.from_numpy(sigma2) @ factor).clamp(min=0)
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * eigenvalues.sqrt().sum().item()
    return float(max(distance, 0.0))


def inception_score(probs: Features, split_size: int = 5000) -> float:
    """The mean over splits, in order, of exp of the mean of KL(p(y|x) || p(y)) (arXiv 1606.03498).

    Args:
        probs: [N, C], rows that sum to 1. Class-sorted rows spoil it: a split then lacks classes.
        split_size: rows of a split; the last may be shorter and weighs the same, as in guided-diffusion's evaluator.

    Raises:
        UserError: no rows, or numbers that are not finite.
    """
    (probs,) = check_features(probs)
    score = InceptionScore(len(probs), probs.shape[1], split_size, probs.device)
    score.update(probs, torch.arange(len(probs)))
    return score.result()


def precision_recall(reference: Features, samples: Features, k: int = 3) -> PrecisionRecall:
    """Precision and recall by k-nearest-neighbour manifolds (arXiv 1904.06991); see `manifolds.compare`.

    Args:
        reference: features [N, D]. samples: features [M, D]; N and M above k.
        k: which neighbour gives a ball its radius, the member itself not counted.
    """
    found = compare(reference, samples, k=k, density_k=None).precision_recall
    assert found is not None
    return found


def density_coverage(reference: Features, samples: Features, k: int = 5) -> DensityCoverage:
    """Density and coverage (arXiv 2002.09797, whose k is 5); see `manifolds.compare`; arguments as `precision_recall`."""
    found = compare(reference, samples, k=None, density_k=k).density_coverage
    assert found is not None
    return found


class KernelDistance(NamedTuple):
    """KID over subsets."""

    mean: float
    std: float
    """Standard deviation over the subsets (divided by their number)."""


@torch.no_grad()
def kernel_distance(
    reference: Features,
    samples: Features,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    advance: Callable[[int], object] | None = None,
) -> KernelDistance:
    """KID: the unbiased squared MMD with the kernel (x . y / D + 1)^3 over random subsets (arXiv 1801.01401).

    Subsets are drawn without replacement, of both sets alike and as large as the smaller set if that is below `subset_size`.

    Computed in float64.

    Args:
        reference: features [N, D]. samples: features [M, D]; N and M of 2 or more, on one device, which computes.
        advance: is told of each subset that is done.
    """
    real, drawn = check_features(reference, samples)
    size = min(subset_size, len(real), len(drawn))
    if size < 2 or subsets < 1:
        raise UserError(f"KID needs subsets of at least 2 images: there are {len(real)} and {len(drawn)}")
    rng = np.random.default_rng(seed)
    found: list[float] = []
    for _ in range(subsets):
        x, y = (
            s[torch.from_numpy(rng.choice(len(s), size, replace=False)).to(s.device)].double() for s in (real, drawn)
        )
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum((kernel.sum() - kernel.trace()).item() for kernel in (xx, yy)) / (size * (size - 1))
        found.append(within - 2 * xy.mean().item())
        if advance:
            advance(1)
    return KernelDistance(float(np.mean(found)), float(np.std(found)))
