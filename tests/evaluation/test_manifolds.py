"""Precision, recall, density, coverage, KID and the Inception score against loops written from their definitions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import st_ar
from st_ar.errors import UserError
from st_ar.evaluation import metrics as manifolds
from st_ar.evaluation.metrics import (
    blocks_of,
    compare,
    density_coverage,
    inception_score,
    kernel_distance,
    neighbour_distances,
    precision_recall,
)


def radius(members: np.ndarray, index: int, k: int) -> float:
    """Squared distance to the k-th nearest other member."""
    others = [((members[index] - m) ** 2).sum() for place, m in enumerate(members) if place != index]
    return sorted(others)[k - 1]


def balls(centers: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
    """bool [centers, others]: whether each other point lies in each center's ball."""
    radii = [radius(centers, index, k) for index in range(len(centers))]
    inside = [[((c - o) ** 2).sum() <= r for o in others] for c, r in zip(centers, radii, strict=True)]
    return np.array(inside)


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density, coverage."""
    in_real, in_drawn = balls(reference, samples, k), balls(samples, reference, k)
    return in_real.any(0).mean(), in_drawn.any(0).mean(), in_real.sum(0).mean() / k, in_real.any(1).mean()


Case = tuple[np.ndarray, np.ndarray, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two sets, some on a coarse lattice so that distances tie and members coincide, some far from the origin."""
    k, dim = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    n, m = draw(st.integers(k + 1, 20)), draw(st.integers(k + 1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    far = draw(st.sampled_from([0, 1000]))
    if draw(st.booleans()):
        x, y = rng.integers(0, 3, (n, dim)), rng.integers(0, 3, (m, dim))
    else:
        x, y = rng.normal(size=(n, dim)), rng.normal(0.5, 1.5, size=(m, dim))
    return (x + far).astype(np.float32), (y + far).astype(np.float32), k


@given(cases(), st.sampled_from([3, 7, 4096]))
def test_all_four_are_the_definitions_ties_and_twins_included(case: Case, block: int) -> None:
    reference, samples, k = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifolds, "BLOCK", block)
        found = (*precision_recall(reference, samples, k), *density_coverage(reference, samples, k))
    expected = brute_force(reference.astype(np.float64), samples.astype(np.float64), k)
    assert found == pytest.approx(expected, abs=1e-12)


@given(cases(), st.integers(1, 4))
def test_both_pairs_at_once_are_each_alone(case: Case, density_k: int) -> None:
    reference, samples, k = case
    density_k = min(density_k, len(reference) - 1)
    both = compare(reference, samples, k=k, density_k=density_k)
    assert both.precision_recall == precision_recall(reference, samples, k)
    assert both.density_coverage == density_coverage(reference, samples, density_k)


def test_distances_that_float32_products_cannot_tell_apart_are_decided_exactly() -> None:
    # Members far from their own mean, at distances of 1e-3: the products alone are off by more than that.
    rng = np.random.default_rng(0)
    clusters = rng.normal(0, 300, (4, 1, 16)) + rng.normal(0, 1e-3, (4, 12, 16))
    reference = clusters[:, :6].reshape(-1, 16).astype(np.float32)
    samples = clusters[:, 6:].reshape(-1, 16).astype(np.float32)
    expected = brute_force(reference.astype(np.float64), samples.astype(np.float64), 3)
    assert 0.2 < expected[0] < 1
    assert (*precision_recall(reference, samples), *density_coverage(reference, samples, 3)) == pytest.approx(expected)


def test_a_set_against_itself_is_wholly_inside() -> None:
    features = np.random.default_rng(1).normal(5, 1, (200, 64)).astype(np.float32)
    assert precision_recall(features, features) == (1, 1)
    assert density_coverage(features, features).coverage == 1
    assert precision_recall(features, features + 1000) == (0, 0)


def test_neighbours_are_the_exact_ones_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifolds, "BLOCK", 37)
    features = np.random.default_rng(2).normal(size=(150, 8)).astype(np.float32)
    distances = ((features[:, None].astype(np.float64) - features[None]) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    expected = np.sort(distances, axis=1)[:, [0, 2, 4]]
    found = neighbour_distances(torch.from_numpy(features), (1, 3, 5)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_contract_names_the_functions_in_st_ar_metrics() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(20, 4)), rng.normal(size=(30, 4))
    precision, recall = st_ar.metrics.precision_recall(x, y, k=3)
    assert (precision, recall) == pytest.approx(brute_force(x, y, 3)[:2])


@pytest.mark.parametrize(
    ("reference", "samples", "match"),
    [
        (np.zeros((3, 2)), np.zeros((9, 2)), "3 images are too few for neighbours: k = 3 needs at least 4"),
        (np.zeros((9, 2)), np.zeros((1, 2)), "1 images are too few"),
        (np.zeros((9, 2)), np.zeros((9, 3)), "features of 2 and of 3 numbers do not compare"),
        (np.zeros((9, 2)), np.full((9, 2), np.nan), "NaN or infinity"),
        (np.zeros(9), np.zeros((9, 2)), r"must have the shape \[N, D\], not \[9\]"),
    ],
)
def test_what_cannot_be_compared_is_named(reference: np.ndarray, samples: np.ndarray, match: str) -> None:
    with pytest.raises(UserError, match=match):
        precision_recall(reference, samples)


# KID


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate, pair by pair."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3)

    m, n = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a, b in itertools.product(x, y)) / (m * n)


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 1000))
def test_kid_of_whole_sets_is_the_unbiased_mmd(count: int, dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(count, dim)), rng.normal(1, 2, size=(count, dim))
    found = kernel_distance(x, y, subsets=3)
    assert found.mean == pytest.approx(mmd(x, y), rel=1e-9, abs=1e-9)
    assert found.std == pytest.approx(0, abs=1e-9)  # every subset is the whole


def test_kid_draws_subsets_by_its_seed() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), rng.normal(0.5, 1, size=(40, 3))
    first = kernel_distance(x, y, subsets=5, subset_size=10, seed=1)
    assert first == kernel_distance(x, y, subsets=5, subset_size=10, seed=1)
    assert first != kernel_distance(x, y, subsets=5, subset_size=10, seed=2)
    assert first.std > 0
    many = kernel_distance(x, y, subsets=2000, subset_size=10)
    whole = mmd(x, y)
    assert many.mean == pytest.approx(whole, abs=4 * many.std / math.sqrt(2000) + 0.05 * whole)


def test_kid_of_one_distribution_is_about_0() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(500, 8)), rng.normal(size=(500, 8))
    assert abs(kernel_distance(x, y, subsets=20, subset_size=200).mean) < 0.02 < kernel_distance(x, y + 1).mean


# Inception score


def score(probs: np.ndarray, split_size: int) -> float:
    """By the definition, image by image."""
    found: list[float] = []
    for start in range(0, len(probs), split_size):
        part = probs[start : start + split_size]
        marginal = part.mean(0)
        divergences = [sum(p * math.log(p / q) for p, q in zip(row, marginal, strict=True) if p > 0) for row in part]
        found.append(math.exp(sum(divergences) / len(part)))
    return sum(found) / len(found)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 31), st.booleans(), st.integers(0, 1000))
def test_the_score_is_the_definition(count: int, classes: int, split: int, sharp: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(classes, 0.3), count)
    if sharp:
        probs = np.eye(classes)[probs.argmax(1)]  # zeros count as 0 log 0 = 0
    assert inception_score(probs, split) == pytest.approx(score(probs, split), rel=1e-9)


def test_scores_that_are_known() -> None:
    sure = np.eye(10)[np.arange(100) % 10]
    assert inception_score(sure) == pytest.approx(10)
    assert inception_score(np.full((100, 10), 0.1)) == pytest.approx(1)
    assert inception_score(np.sort(sure.argmax(1))[:, None] == np.arange(10.0), 10) == pytest.approx(1)  # class-sorted


@pytest.mark.parametrize(("real", "drawn"), [(5, 7), (14, 15), (30, 8)])
@pytest.mark.parametrize("both", [True, False])
def test_every_block_is_told_of(monkeypatch: pytest.MonkeyPatch, real: int, drawn: int, both: bool) -> None:
    monkeypatch.setattr(manifolds, "BLOCK", 7)
    features = torch.randn(real + drawn, 3, generator=torch.Generator().manual_seed(0))
    told: list[int] = []
    compare(features[:real], features[real:], k=3 if both else None, density_k=2, advance=told.append)
    assert sum(told) == len(told) == blocks_of(real, drawn, both)
    told.clear()
    kernel_distance(features[:real], features[real:], subsets=4, advance=told.append)
    assert told == [1, 1, 1, 1]
