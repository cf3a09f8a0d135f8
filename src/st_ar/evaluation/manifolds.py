"""Precision, recall, density and coverage: two sets of features compared by balls around their members.

The manifold of a set is the union of balls around its members, each as large as the distance to the member's k-th nearest
other member. Distances are computed in blocks as float32 matrix products; wherever rounding could decide, the distance is
computed again in float64 from the differences. Nothing of the size of all pairs is ever held.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from st_ar.errors import UserError
from st_ar.hardware import full_precision

BLOCK = 4096
"""Rows and columns of a block of distances: 67 MB in float32."""
SPARE = 2
"""Candidates beyond the k-th that are measured exactly."""
DOUBT = 64 * torch.finfo(torch.float32).eps
"""Relative to the two squared lengths: within this a float32 distance is not trusted to be larger or smaller than another."""
CHUNK = 1 << 20
"""Differences that are held at once where distances are computed exactly."""

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
        if not all(part.isfinite().all() for part in tensor.split(BLOCK)):
            raise UserError("features hold NaN or infinity: look for damaged images or weights")
    return tensors


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Exact squared distances of pairs, float64: [.., D] and [.., D], broadcast -> [..]."""
    return (x.double() - y.double()).square().sum(-1)


class _Set:
    """Features that are shifted by a common offset as blocks are read, so that lengths are not much above distances."""

    def __init__(self, features: Tensor, offset: Tensor) -> None:
        self.features, self.offset = features, offset
        self.lengths = torch.cat([self.block(start).square().sum(1) for start in self.starts()])

    def __len__(self) -> int:
        return len(self.features)

    def starts(self) -> range:
        return range(0, len(self.features), BLOCK)

    def block(self, start: int) -> Tensor:
        return (self.features[start : start + BLOCK] - self.offset).float()

    def distances(self, start: int, other: "_Set", other_start: int) -> Tensor:
        """Squared distances float32 of a block to a block of another set: [rows, columns]; rounding may make them negative."""
        x, y = self.block(start), other.block(other_start)
        found = torch.addmm(
            other.lengths[other_start : other_start + len(y)][None].expand(len(x), -1), x, y.T, alpha=-2
        )
        return found.add_(self.lengths[start : start + len(x), None])


class _Nearest:
    """The candidates for the nearest others of each member, by float32 distances."""

    def __init__(self, count: int, keep: int, device: torch.device) -> None:
        self.keep = keep
        self.values = torch.full((count, keep), torch.inf, device=device)
        self.indices = torch.zeros((count, keep), dtype=torch.int64, device=device)

    def add(self, start: int, distances: Tensor, first: int) -> None:
        """Distances [rows, columns] of the members from `start` on to those from `first` on."""
        rows = slice(start, start + len(distances))
        found = distances.topk(min(self.keep, distances.shape[1]), dim=1, largest=False, sorted=False)
        values = torch.cat([self.values[rows], found.values], 1)
        indices = torch.cat([self.indices[rows], found.indices + first], 1)
        best = values.topk(self.keep, dim=1, largest=False, sorted=False)
        self.values[rows], self.indices[rows] = best.values, indices.gather(1, best.indices)


def blocks_of(reference: int, samples: int, both: bool) -> int:
    """How many blocks of pairs `compare` goes through; `both`: with precision and recall."""
    ours, theirs = -(-reference // BLOCK), -(-samples // BLOCK)
    return ours * (ours + 1) // 2 + (theirs * (theirs + 1) // 2 if both else 0) + ours * theirs


def neighbour_distances(
    features: Tensor,
    ks: tuple[int, ...],
    offset: Tensor | None = None,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Squared distances of each member to its k-th nearest other member: [N, D] -> float64 [N, len(ks)].

    Each pair is computed once; a member's twin at another index counts as another at distance 0.

    Raises:
        UserError: fewer than k other members.
    """
    if min(ks) < 1 or len(features) <= max(ks):
        raise UserError(
            f"{len(features)} images are too few for neighbours: k = {max(ks)} needs at least {max(ks) + 1}"
        )
    members = _Set(features, features.mean(0) if offset is None else offset)
    nearest = _Nearest(len(features), min(max(ks) + SPARE, len(features) - 1), features.device)
    for start in members.starts():
        for other in range(start, len(features), BLOCK):
            distances = members.distances(start, members, other)
            if start == other:
                distances.fill_diagonal_(torch.inf)
            else:
                nearest.add(other, distances.T.contiguous(), start)
            nearest.add(start, distances, other)
            if advance:
                advance(1)
    exact = torch.empty(nearest.values.shape, dtype=torch.float64, device=features.device)
    rows = max(1, CHUNK // (nearest.keep * features.shape[1]))
    for start in range(0, len(features), rows):
        some = slice(start, start + rows)
        exact[some] = squared_distances(features[some, None], features[nearest.indices[some]])
    return exact.sort(dim=1).values[:, [k - 1 for k in ks]]


class _Inside:
    """Which pairs (center, member of another set) have the member in the center's ball; blocks come in any order."""

    def __init__(self, centers: Tensor, radii: Tensor, members: Tensor) -> None:
        self.centers, self.radii, self.members = centers, radii, members
        self.small = radii.float()
        self.balls = torch.zeros(len(members), dtype=torch.int64, device=members.device)  # that each member lies in
        self.filled = torch.zeros(len(centers), dtype=torch.bool, device=members.device)  # balls that hold a member

    def add(self, start: int, distances: Tensor, first: int, doubt: Tensor) -> None:
        """Distances [rows, columns] from centers from `start` on to members from `first` on, and what they may be wrong by."""
        beyond = distances - self.small[start : start + len(distances), None]
        inside = beyond <= -doubt
        row, column = (beyond.abs() < doubt).nonzero(as_tuple=True)
        for some in range(0, len(row), pairs := max(1, CHUNK // self.centers.shape[1])):
            r, c = row[some : some + pairs], column[some : some + pairs]
            exact = squared_distances(self.centers[start + r], self.members[first + c])
            inside[r, c] = exact <= self.radii[start + r]
        self.balls[first : first + distances.shape[1]] += inside.sum(0)
        self.filled[start : start + len(distances)] |= inside.any(1)


class Comparison(NamedTuple):
    """Both pairs of numbers."""

    precision_recall: PrecisionRecall | None
    density_coverage: DensityCoverage | None


@torch.no_grad()
@full_precision()
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
    offset = real.mean(0)
    ks = tuple(each for each in (k, density_k) if each is not None)
    radii = neighbour_distances(real, ks, offset, advance)
    in_real = {each: _Inside(real, radii[:, place], drawn) for place, each in enumerate(ks)}
    in_drawn = _Inside(drawn, neighbour_distances(drawn, (k,), offset, advance)[:, 0], real) if k is not None else None
    ours, theirs = _Set(real, offset), _Set(drawn, offset)
    for start in ours.starts():
        for other in theirs.starts():
            distances = ours.distances(start, theirs, other)
            doubt = (ours.lengths[start : start + BLOCK, None] + theirs.lengths[other : other + BLOCK]).mul_(DOUBT)
            if advance:
                advance(1)
            for inside in in_real.values():
                inside.add(start, distances, other, doubt)
            if in_drawn:
                in_drawn.add(other, distances.T, start, doubt.T)
    found, dense = None, None
    if in_drawn and k is not None:
        precision = (in_real[k].balls > 0).double().mean().item()
        found = PrecisionRecall(precision, (in_drawn.balls > 0).double().mean().item())
    if density_k is not None:
        inside = in_real[density_k]
        dense = DensityCoverage(inside.balls.double().mean().item() / density_k, inside.filled.double().mean().item())
    return Comparison(found, dense)
