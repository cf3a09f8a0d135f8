"""Metrics of generated images: Frechet distance, Inception Score, precision, recall, density, coverage, KID."""

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from st_ar.distributed import all_reduce_sum
from st_ar.errors import UserError

FeatureArray = np.ndarray | Tensor

LARGEST = 1e5
"""Largest accepted feature. Next to larger ones, rounding would hide the distances between usual ones."""
STATISTICS_BLOCK = 1024
"""Rows whose statistics are merged at once."""


class Gaussian(NamedTuple):
    """The mean and covariance that FD compares."""

    mean: np.ndarray
    """float64 [D]."""
    covariance: np.ndarray
    """float64 [D, D], divided by N - 1 as in np.cov."""


def require_bounded(
    rows: Tensor, name_of: Callable[[int], str], remedy: str = "look for damaged images or weights"
) -> None:
    """Refuse NaN, infinity and numbers above LARGEST in features [n, ..]; `name_of` names row i in the message."""
    largest = rows.detach().flatten(1).abs().amax(1)  # NaN if there is one
    if not (largest <= LARGEST).all():
        row = int((~(largest <= LARGEST)).nonzero()[0])
        value = largest[row].item()
        if math.isfinite(value):
            raise UserError(f"the features of {name_of(row)} reach {value:.3g}, above {LARGEST:g}: {remedy}")
        raise UserError(f"the features of {name_of(row)} hold NaN or infinity: {remedy}")


class FeatureStatistics:
    """Running mean and covariance of features [n, D]."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._squares = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean) (x - mean)^T
        self._pending: list[Tensor] = []
        self._pending_rows = 0

    def update(self, features: Tensor) -> None:
        """Add features [n, D]. All must have one dtype.

        Raises:
            UserError: NaN or infinity in this or an earlier batch; `result` finds it at the latest.
        """
        self._pending.append(features.detach().to(self._mean.device))
        self._pending_rows += len(features)
        while self._pending_rows >= STATISTICS_BLOCK:
            rows = torch.cat(self._pending)
            self._merge(rows[:STATISTICS_BLOCK])
            self._pending, self._pending_rows = [rows[STATISTICS_BLOCK:]], len(rows) - STATISTICS_BLOCK

    def _merge(self, rows: Tensor) -> None:
        if not rows.isfinite().all():
            raise UserError("features hold NaN or infinity: look for damaged images or weights")
        rows = rows.to(self._mean)
        mean = rows.mean(0)
        centred = rows - mean
        self._squares.addmm_(centred.T, centred)
        total, shift = self.count + len(rows), mean - self._mean
        self._squares.addr_(shift, shift, alpha=self.count * len(rows) / total)
        self._mean += shift * (len(rows) / total)
        self.count = total

    def _flush(self) -> None:
        if self._pending_rows:
            self._merge(torch.cat(self._pending))
        self._pending, self._pending_rows = [], 0

    def reduce(self) -> None:
        """Combine the statistics of all ranks. Every rank must call it."""
        self._flush()
        count = all_reduce_sum(torch.tensor([self.count], device=self._mean.device))
        mean = all_reduce_sum(self._mean * self.count) / count.clamp(min=1)
        shift = self._mean - mean
        self._squares = all_reduce_sum(self._squares.addr_(shift, shift, alpha=self.count))
        self._mean, self.count = mean, int(count)

    def result(self) -> Gaussian:
        """Return the mean and covariance of all features so far.

        Raises:
            UserError: fewer than two.
        """
        self._flush()
        if self.count < 2:
            raise UserError(f"{self.count} image{'s' * (self.count != 1)} cannot have a covariance: give at least 2")
        return Gaussian(self._mean.cpu().numpy().copy(), (self._squares / (self.count - 1)).cpu().numpy())


class InceptionScore:
    """Running Inception Score of class probabilities. Each image has a position in the order that the splits follow.

    Args:
        count: number of images. classes: C. split_size: images per split; the last split may be shorter.
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

    def update(self, probabilities: Tensor, positions: Tensor) -> None:
        """Add probabilities [n, C] of the images at positions int64 [n]."""
        p = probabilities.to(self._sums)
        if not p.isfinite().all():
            raise UserError("probabilities hold NaN or infinity: look for damaged images or weights")
        split = (positions // self.split_size).to(p.device)
        self._sums.index_add_(0, split, p)
        self._entropy.index_add_(0, split, torch.xlogy(p, p).sum(1))
        self._counts.index_add_(0, split, torch.ones_like(p[:, 0]))

    def reduce(self) -> None:
        """Combine the sums of all ranks. Every rank must call it."""
        self._sums, self._entropy, self._counts = map(all_reduce_sum, (self._sums, self._entropy, self._counts))

    def result(self) -> float:
        """Return exp(mean KL(p(y|x) || p(y))), averaged over the splits (arXiv 1606.03498)."""
        marginal = self._sums / self._counts[:, None]
        # mean KL = mean over images of sum p log p - sum of p(y) log p(y)
        return (self._entropy / self._counts - torch.xlogy(marginal, marginal).sum(1)).exp().mean().item()


NEIGHBOUR_BLOCK = 4096
"""Rows and columns of a block of distances: 134 MB in float64."""
TIE = 1e-12
"""Rounding error of a squared distance in float64, as a share of the largest squared length. Closer distances count as equal."""


class PrecisionRecall(NamedTuple):
    """Precision and recall of samples against a reference, each in [0, 1]."""

    precision: float
    """Share of the samples inside the reference's manifold."""
    recall: float
    """Share of the reference inside the samples' manifold."""


class DensityCoverage(NamedTuple):
    """Density and coverage of samples against a reference."""

    density: float
    """Mean number of reference balls that contain a sample, divided by k; may exceed 1."""
    coverage: float
    """Share of the reference balls that contain a sample, in [0, 1]."""


def _check_features(*sets: FeatureArray) -> list[Tensor]:
    tensors = [torch.as_tensor(features) for features in sets]
    tensors = [tensor if tensor.is_floating_point() else tensor.double() for tensor in tensors]
    for tensor in tensors:
        if tensor.dim() != 2 or not tensor.shape[1]:
            raise UserError(f"features must have the shape [N, D], not {list(tensor.shape)}")
        if tensor.shape[1] != tensors[0].shape[1]:
            raise UserError(f"features of {tensors[0].shape[1]} and of {tensor.shape[1]} numbers do not compare")
        for start in range(0, len(tensor), NEIGHBOUR_BLOCK):
            require_bounded(tensor[start : start + NEIGHBOUR_BLOCK], lambda row, start=start: f"image {start + row}")
    return tensors


def _blocks(features: Tensor, offset: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield features [N, D] in float64 blocks. A common offset is subtracted, so that rounding stays small beside the distances."""
    for start in range(0, len(features), NEIGHBOUR_BLOCK):
        rows = slice(start, start + NEIGHBOUR_BLOCK)
        yield rows, features[rows].double() - offset.double()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[n, D] and [m, D] -> [n, m]. Rounding can make a distance negative."""
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    return lengths.addmm_(x, y.T, alpha=-2)


def _smallest(nearest: Tensor, distances: Tensor) -> Tensor:
    """Merge each row's k smallest distances so far [n, k] with more distances [n, m]; sorted."""
    k = nearest.shape[1]
    best = distances.topk(min(k, distances.shape[1]), largest=False).values
    return torch.cat([nearest, best], 1).sort().values[:, :k]


def count_blocks(reference: int, samples: int, with_precision: bool) -> int:
    """Return how many blocks of pairs `compare` computes for so many images."""
    r, s = -(-reference // NEIGHBOUR_BLOCK), -(-samples // NEIGHBOUR_BLOCK)
    return r * (r + 1) // 2 + (s * (s + 1) // 2 if with_precision else 0) + r * s


def neighbour_distances(
    features: Tensor,
    ks: tuple[int, ...],
    offset: Tensor | None = None,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Return each row's squared distance to its k-th nearest other row: [N, D] -> float64 [N, len(ks)].

    An equal row at another index is a neighbour at distance 0.

    Raises:
        UserError: fewer than k other rows.
    """
    if min(ks) < 1 or len(features) <= max(ks):
        raise UserError(
            f"{len(features)} images are too few for neighbours: k = {max(ks)} needs at least {max(ks) + 1}"
        )
    offset = features.mean(0) if offset is None else offset
    nearest = torch.full((len(features), max(ks)), torch.inf, dtype=torch.float64, device=features.device)
    for rows, x in _blocks(features, offset):
        for columns, y in _blocks(features, offset):
            if columns.start < rows.start:  # each pair of blocks once
                continue
            distances = _squared_distances(x, y)
            if rows == columns:
                distances.fill_diagonal_(torch.inf)
            else:
                nearest[columns] = _smallest(nearest[columns], distances.T)
            nearest[rows] = _smallest(nearest[rows], distances)
            if advance:
                advance(1)
    return nearest[:, [k - 1 for k in ks]]


class Comparison(NamedTuple):
    """The results of `compare`."""

    precision_recall: PrecisionRecall | None
    density_coverage: DensityCoverage | None


@torch.no_grad()
def compare(
    reference: FeatureArray,
    samples: FeatureArray,
    *,
    k: int | None = 3,
    density_k: int | None = 5,
    advance: Callable[[int], object] | None = None,
) -> Comparison:
    """Compute precision and recall with the k-th neighbour, density and coverage with the density_k-th. None skips a pair.

    Precision and recall follow arXiv 1904.06991 and guided-diffusion's evaluator, density and coverage arXiv 2002.09797, Eq. 4
    and 5. In all four, a point at exactly the radius is inside the ball.

    Args:
        reference: features [N, D]. samples: features [M, D], on the same device.
        advance: called with 1 after each block of pairs; `count_blocks` gives their number.

    Raises:
        UserError: too few images, unequal widths, or features that are not finite or above LARGEST.
    """
    real, generated = _check_features(reference, samples)
    assert k is not None or density_k is not None
    if len(generated) == 0:
        raise UserError("there are no samples to compare")
    offset = real.double().mean(0)
    ks = tuple({each for each in (k, density_k) if each is not None})
    lengths = (x.square().sum(1).max().item() for each in (real, generated) for _, x in _blocks(each, offset))
    tie = TIE * max(lengths)
    real_radii = dict(zip(ks, neighbour_distances(real, ks, offset, advance).T + tie, strict=True))
    generated_radii = neighbour_distances(generated, (k,), offset, advance)[:, 0] + tie if k is not None else None
    balls = {each: torch.zeros(len(generated), dtype=torch.int64, device=real.device) for each in ks}  # per sample
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)  # inside a sample's ball
    covered = torch.zeros_like(recalled)  # its ball contains a sample
    for rows, x in _blocks(real, offset):
        for columns, y in _blocks(generated, offset):
            distances = _squared_distances(x, y)
            for each in ks:
                inside = distances <= real_radii[each][rows, None]
                balls[each][columns] += inside.sum(0)
                if each == density_k:
                    covered[rows] |= inside.any(1)
            if generated_radii is not None:
                recalled[rows] |= (distances <= generated_radii[columns]).any(1)
            if advance:
                advance(1)
    precision_recall = density_coverage = None
    if k is not None:
        precision_recall = PrecisionRecall((balls[k] > 0).double().mean().item(), recalled.double().mean().item())
    if density_k is not None:
        density = balls[density_k].double().mean().item() / density_k
        density_coverage = DensityCoverage(density, covered.double().mean().item())
    return Comparison(precision_recall, density_coverage)


def mean_and_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the float64 mean [D] and covariance [D, D] of features [N, D], N >= 2."""
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(torch.from_numpy(features))
    return statistics.result()


@contextlib.contextmanager
def _one_thread() -> Generator[None]:
    """Run the block on one thread: on busy cores several threads make an eigenvalue problem several times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _factor(matrix: Tensor) -> Tensor:
    """Return F with F F^T = matrix, from Cholesky's decomposition or, for a singular matrix, from its eigenvectors."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt()  # rounding can make eigenvalues negative


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Return |mu1 - mu2|^2 + Tr(S1 + S2 - 2 sqrt(S1 S2)), the squared Wasserstein-2 distance of two Gaussians.

    S1 S2 has the eigenvalues of the symmetric F^T S2 F with F F^T = S1. Their roots give the trace without complex numbers, and
    singular covariances need no offset. With Inception's pool_3 features this is FID (arXiv 1706.08500).

    Raises:
        UserError: shapes that do not match, NaN or infinity.
    """
    mu1, sigma1, mu2, sigma2 = (np.array(a, np.float64, order="C") for a in (mu1, sigma1, mu2, sigma2))
    dim = mu1.size
    if mu1.shape != (dim,) or mu2.shape != (dim,) or sigma1.shape != (dim, dim) or sigma2.shape != (dim, dim):
        shapes = ", ".join(str(list(a.shape)) for a in (mu1, sigma1, mu2, sigma2))
        raise UserError(f"means [D] and covariances [D, D] have shapes that do not match: {shapes}")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("means or covariances hold NaN or infinity: make the statistics again")
    if any(np.abs(a).max(initial=0) > 1e100 for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("means or covariances exceed 1e100, and FD overflows: look for damaged images or weights")
    with _one_thread():
        factor = _factor(torch.from_numpy(sigma1))
        eigenvalues = torch.linalg.eigvalsh(factor.T @ torch.from_numpy(sigma2) @ factor).clamp(min=0)
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * eigenvalues.sqrt().sum().item()
    return float(max(distance, 0.0))


def inception_score(probs: FeatureArray, split_size: int = 5000) -> float:
    """Return exp(mean KL(p(y|x) || p(y))), averaged over consecutive splits (arXiv 1606.03498).

    Args:
        probs: class probabilities [N, C]. If they are sorted by class, splits lack classes and the score is too low.
        split_size: rows per split. A shorter last split counts the same, as in guided-diffusion's evaluator.

    Raises:
        UserError: no rows, NaN or infinity.
    """
    (probs,) = _check_features(probs)
    score = InceptionScore(len(probs), probs.shape[1], split_size, probs.device)
    score.update(probs, torch.arange(len(probs)))
    return score.result()


def precision_recall(reference: FeatureArray, samples: FeatureArray, k: int = 3) -> PrecisionRecall:
    """Return precision and recall by k-nearest-neighbour manifolds (arXiv 1904.06991), as `compare` does.

    Args:
        reference: features [N, D]. samples: features [M, D]; N and M above k.
        k: the neighbour whose distance is a ball's radius; the point itself is not counted.
    """
    found = compare(reference, samples, k=k, density_k=None).precision_recall
    assert found is not None
    return found


def density_coverage(reference: FeatureArray, samples: FeatureArray, k: int = 5) -> DensityCoverage:
    """Return density and coverage (arXiv 2002.09797), as `compare` does; arguments as for `precision_recall`."""
    found = compare(reference, samples, k=None, density_k=k).density_coverage
    assert found is not None
    return found


class KernelDistance(NamedTuple):
    """Mean and population standard deviation of KID over the subsets."""

    mean: float
    std: float


@torch.no_grad()
def kernel_distance(
    reference: FeatureArray,
    samples: FeatureArray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    advance: Callable[[int], object] | None = None,
) -> KernelDistance:
    """Return KID, the unbiased squared MMD with the kernel (x . y / D + 1)^3 over random subsets (arXiv 1801.01401).

    Subsets are drawn without replacement. A set smaller than `subset_size` limits the subsets of both. Computed in float64.

    Args:
        reference: features [N, D]. samples: features [M, D]; N and M >= 2, on the same device.
        advance: called with 1 after each subset.
    """
    real, generated = _check_features(reference, samples)
    size = min(subset_size, len(real), len(generated))
    if size < 2 or subsets < 1:
        raise UserError(f"KID needs subsets of at least 2 images: there are {len(real)} and {len(generated)}")
    rng = np.random.default_rng(seed)
    distances: list[float] = []
    for _ in range(subsets):
        chosen = [torch.from_numpy(rng.choice(len(s), size, replace=False)) for s in (real, generated)]
        x, y = (s[rows.to(s.device)].double() for s, rows in zip((real, generated), chosen, strict=True))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum((kernel.sum() - kernel.trace()).item() for kernel in (xx, yy)) / (size * (size - 1))
        distances.append(within - 2 * xy.mean().item())
        if advance:
            advance(1)
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)))


def region_statistics(images: np.ndarray, regions: int = 4) -> np.ndarray:
    """Mean and standard deviation of each colour in each region: uint8 [N, S, S, 3] -> float64 [N, regions^2 * 6].

    The side S must be a multiple of `regions`.
    """
    n, size = images.shape[:2]
    side = size // regions
    cells = images.reshape(n, regions, side, regions, side, 3).transpose(0, 1, 3, 2, 4, 5) / 255.0
    cells = cells.reshape(n, regions**2, side**2, 3)
    return np.concatenate([cells.mean(axis=2), cells.std(axis=2)], axis=-1).reshape(n, -1)
