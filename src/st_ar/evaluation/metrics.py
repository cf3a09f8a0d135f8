"""Metrics of generated images: Frechet distance, Inception Score, precision, recall, density, coverage, KID. Pure functions."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from st_ar.distributed import all_reduce_sum
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
        count = all_reduce_sum(torch.tensor([self.count], device=self._mean.device))
        mean = all_reduce_sum(self._mean * self.count) / count.clamp(min=1)
        apart = self._mean - mean
        self._squares = all_reduce_sum(self._squares.addr_(apart, apart, alpha=self.count))
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
        self._sums, self._entropy, self._counts = map(all_reduce_sum, (self._sums, self._entropy, self._counts))

    def result(self) -> float:
        """Mean over the splits of exp of the mean of KL(p(y|x) || p(y)) (arXiv 1606.03498)."""
        counts = self._counts[:, None]
        marginal = self._sums / counts
        # mean of sum p log p, less sum of mean p log of mean p
        return (self._entropy / self._counts - torch.xlogy(marginal, marginal).sum(1)).exp().mean().item()


NEIGHBOUR_BLOCK = 4096
"""Rows and columns of a block of distances: 134 MB in float64."""
TIE = 1e-12
"""Squared distances that differ by less than this share of the largest squared length are equal: float64 products round so much."""

Features = np.ndarray | Tensor


class PrecisionRecall(NamedTuple):
    """Of samples against a reference, each in [0, 1]."""

    precision: float
    """Share of the samples inside the reference's manifold."""
    recall: float
    """Share of the reference inside the samples' manifold."""


class DensityCoverage(NamedTuple):
    """Of samples against a reference."""

    density: float
    """How many of the reference's balls a sample lies in, over k; may be above 1."""
    coverage: float
    """Share of the reference's balls that hold a sample, in [0, 1]."""


def check_features(*sets: Features) -> list[Tensor]:
    """The sets as tensors [N, D], on the devices where they are.

    Raises:
        UserError: another shape, unequal widths, or numbers that are not finite.
    """
    tensors = [torch.as_tensor(features) for features in sets]
    for tensor in tensors:
        if tensor.dim() != 2 or not tensor.shape[1]:
            raise UserError(f"features must have the shape [N, D], not {list(tensor.shape)}")
        if tensor.shape[1] != tensors[0].shape[1]:
            raise UserError(f"features of {tensors[0].shape[1]} and of {tensor.shape[1]} numbers do not compare")
        if not all(part.isfinite().all() for part in tensor.split(NEIGHBOUR_BLOCK)):
            raise UserError("features hold NaN or infinity: look for damaged images or weights")
    return tensors


class _Blocks:
    """Features [N, D] in float64 blocks around a common offset, which keeps lengths close to distances."""

    def __init__(self, features: Tensor, offset: Tensor) -> None:
        self.features, self.offset = features, offset.double()

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.features), NEIGHBOUR_BLOCK):
            here = slice(start, start + NEIGHBOUR_BLOCK)
            yield here, self.features[here].double() - self.offset

    def longest(self) -> float:
        """The largest squared length."""
        return max(block.square().sum(1).max().item() for _, block in self)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[n, D] and [m, D] -> [n, m]; rounding may make them negative."""
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    return lengths.addmm_(x, y.T, alpha=-2)


def _smallest(found: Tensor, distances: Tensor) -> Tensor:
    """The k smallest of a row's distances so far [n, k], and of more [n, m]; sorted."""
    k = found.shape[1]
    return torch.cat([found, distances.topk(min(k, distances.shape[1]), largest=False).values], 1).sort().values[:, :k]


def blocks_of(reference: int, samples: int, both: bool) -> int:
    """How many blocks of pairs `compare` goes through; `both`: with precision and recall."""
    ours, theirs = -(-reference // NEIGHBOUR_BLOCK), -(-samples // NEIGHBOUR_BLOCK)
    return ours * (ours + 1) // 2 + (theirs * (theirs + 1) // 2 if both else 0) + ours * theirs


def neighbour_distances(
    features: Tensor,
    ks: tuple[int, ...],
    offset: Tensor | None = None,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Squared distances of each member to its k-th nearest other member: [N, D] -> float64 [N, len(ks)].

    Each pair is computed once. A twin at another index counts as another member at distance 0.

    Raises:
        UserError: fewer than k other members.
    """
    if min(ks) < 1 or len(features) <= max(ks):
        raise UserError(
            f"{len(features)} images are too few for neighbours: k = {max(ks)} needs at least {max(ks) + 1}"
        )
    members = _Blocks(features, features.mean(0) if offset is None else offset)
    nearest = torch.full((len(features), max(ks)), torch.inf, dtype=torch.float64, device=features.device)
    for rows, x in members:
        for columns, y in members:
            if columns.start < rows.start:
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
    """Both pairs of numbers."""

    precision_recall: PrecisionRecall | None
    density_coverage: DensityCoverage | None


@torch.no_grad()
def compare(
    reference: Features,
    samples: Features,
    *,
    k: int | None = 3,
    density_k: int | None = 5,
    advance: Callable[[int], object] | None = None,
) -> Comparison:
    """Precision and recall with the k-th neighbour, density and coverage with the density_k-th; None leaves a pair out.

    Precision and recall: arXiv 1904.06991 as in the evaluator of openai/guided-diffusion; density and coverage: arXiv 2002.09797,
    Eq. 4 and 5. A point at exactly the radius is inside in all four.

    Args:
        reference: [N, D]. samples: [M, D]; on one device, which computes.
        advance: is told of each of the `blocks_of` pairs that is done.

    Raises:
        UserError: too few members, unequal widths, or numbers that are not finite.
    """
    real, drawn = check_features(reference, samples)
    assert k is not None or density_k is not None
    if len(drawn) == 0:
        raise UserError("there are no samples to compare")
    offset = real.double().mean(0)
    ks = tuple({each for each in (k, density_k) if each is not None})
    ours, theirs = _Blocks(real, offset), _Blocks(drawn, offset)
    tie = TIE * max(ours.longest(), theirs.longest())
    radii = dict(zip(ks, neighbour_distances(real, ks, offset, advance).T + tie, strict=True))
    drawn_radii = neighbour_distances(drawn, (k,), offset, advance)[:, 0] + tie if k is not None else None
    balls = {each: torch.zeros(len(drawn), dtype=torch.int64, device=drawn.device) for each in ks}  # around each sample
    found = torch.zeros(len(real), dtype=torch.bool, device=real.device)  # in a sample's ball
    covered = torch.zeros_like(found)  # its ball holds a sample
    for rows, x in ours:
        for columns, y in theirs:
            distances = _squared_distances(x, y)
            for each in ks:
                inside = distances <= radii[each][rows, None]
                balls[each][columns] += inside.sum(0)
                if each == density_k:
                    covered[rows] |= inside.any(1)
            if drawn_radii is not None:
                found[rows] |= (distances <= drawn_radii[columns]).any(1)
            if advance:
                advance(1)
    pair, density = None, None
    if k is not None:
        pair = PrecisionRecall((balls[k] > 0).double().mean().item(), found.double().mean().item())
    if density_k is not None:
        density = DensityCoverage(balls[density_k].double().mean().item() / density_k, covered.double().mean().item())
    return Comparison(pair, density)


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


NAME = "FD-regions"
DESCRIPTION = (
    "Frechet distance between means and standard deviations of colour over a 4 x 4 grid of regions, pixels in [0, 1]"
)


def region_statistics(images: np.ndarray, regions: int = 4) -> np.ndarray:
    """Mean and standard deviation of each colour in each region.

    Args:
        images: uint8 [N, S, S, 3], S a multiple of `regions`.

    Returns:
        float64 [N, regions^2 * 6].
    """
    n, size = images.shape[:2]
    side = size // regions
    cells = images.reshape(n, regions, side, regions, side, 3).transpose(0, 1, 3, 2, 4, 5) / 255.0
    cells = cells.reshape(n, regions**2, side**2, 3)
    return np.concatenate([cells.mean(axis=2), cells.std(axis=2)], axis=-1).reshape(n, -1)
