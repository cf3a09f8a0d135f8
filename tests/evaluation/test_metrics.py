"""Metrics against scipy, closed forms and brute force."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

import st_ar
from st_ar.errors import UserError
from st_ar.evaluation import metrics
from st_ar.evaluation.metrics import (
    FeatureStatistics,
    Gaussian,
    InceptionScore,
    compare,
    count_blocks,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_and_covariance,
    neighbour_distances,
    precision_recall,
    region_statistics,
)


def gaussian(dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random mean and a random covariance of full rank."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(dim, 2 * dim))
    return rng.normal(size=dim), factor @ factor.T / dim


@given(st.integers(1, 12), st.integers(0, 1000))
def test_full_rank_covariances_give_the_written_out_formula_with_scipys_matrix_root(dim: int, seed: int) -> None:
    (mu1, sigma1), (mu2, sigma2) = gaussian(dim, seed), gaussian(dim, seed + 5000)
    root = sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-8)


def test_spectra_that_fall_off_as_those_of_features_agree_with_sqrtm_to_a_millionth() -> None:
    rng = np.random.default_rng(0)
    covariances: list[np.ndarray] = []
    for _ in range(2):
        basis, _ = np.linalg.qr(rng.normal(size=(200, 200)))
        covariances.append(basis @ np.diag(np.logspace(0, -7, 200)) @ basis.T)
    root = sqrtm(covariances[0] @ covariances[1]).real
    zeros = np.zeros(200)
    expected = np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(zeros, covariances[0], zeros, covariances[1]) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.tuples(*[st.floats(-5, 5)] * 2, *[st.floats(0, 4)] * 2), min_size=1, max_size=8))
def test_diagonal_gaussians_have_the_closed_form_of_each_dimension(
    dimensions: list[tuple[float, float, float, float]],
) -> None:
    mu1, mu2, std1, std2 = np.array(dimensions).T
    expected = ((mu1 - mu2) ** 2 + (std1 - std2) ** 2).sum()
    assert frechet_distance(mu1, np.diag(std1**2), mu2, np.diag(std2**2)) == pytest.approx(expected, abs=1e-9)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 20), st.integers(0, 1000))
def test_sets_smaller_than_their_dimension_need_no_offset(n1: int, n2: int, dim: int, seed: int) -> None:
    # With S = A^T A of centred rows A, Tr sqrt(S1 S2) is the sum of the singular values of A1 A2^T: no root of anything
    # singular is taken.
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n1, dim)), rng.normal(1, 2, size=(n2, dim))
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * overlap
    found = frechet_distance(*mean_and_covariance(x), *mean_and_covariance(y))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_shift_of_all_features_adds_its_square() -> None:
    features = np.random.default_rng(2).normal(size=(50, 4))
    found = frechet_distance(*mean_and_covariance(features), *mean_and_covariance(features + np.array([3, 0, -4, 0])))
    assert found == pytest.approx(25, abs=1e-6)


@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 1000))
def test_mean_and_covariance_are_those_of_the_definition(count: int, dim: int, seed: int) -> None:
    features = np.random.default_rng(seed).normal(3, 2, size=(count, dim)).astype(np.float32)
    mean, covariance = mean_and_covariance(features)
    assert mean.dtype == covariance.dtype == np.float64
    rows = [row.astype(np.float64) for row in features]
    expected_mean = sum(rows) / count
    expected = sum(np.outer(row - expected_mean, row - expected_mean) for row in rows) / (count - 1)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-12)
    np.testing.assert_allclose(covariance, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64), rowvar=False).reshape(dim, dim))


def test_shapes_that_do_not_match_and_nan_are_refused() -> None:
    mean, covariance = np.zeros(3), np.eye(3)
    for match, arguments in (
        (
            r"have shapes that do not match: \[3\], \[3, 3\], \[2\], \[2, 2\]",
            (mean, covariance, np.zeros(2), np.eye(2)),
        ),
        ("NaN or infinity", (mean, covariance, mean, covariance * np.nan)),
    ):
        with pytest.raises(UserError, match=match):
            frechet_distance(*arguments)


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
    in_real, in_samples = balls(reference, samples, k), balls(samples, reference, k)
    return in_real.any(0).mean(), in_samples.any(0).mean(), in_real.sum(0).mean() / k, in_real.any(1).mean()


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
def test_all_four_match_brute_force_with_ties_and_twins(case: Case, block: int) -> None:
    reference, samples, k = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "NEIGHBOUR_BLOCK", block)
        found = (*precision_recall(reference, samples, k), *density_coverage(reference, samples, k))
    expected = brute_force(reference.astype(np.float64), samples.astype(np.float64), k)
    assert found == pytest.approx(expected, abs=1e-12)


@given(cases(), st.integers(1, 4))
def test_both_pairs_at_once_equal_each_pair_by_itself(case: Case, density_k: int) -> None:
    reference, samples, k = case
    density_k = min(density_k, len(reference) - 1)
    both = compare(reference, samples, k=k, density_k=density_k)
    assert both.precision_recall == precision_recall(reference, samples, k)
    assert both.density_coverage == density_coverage(reference, samples, density_k)


def test_distances_too_small_for_float32_products() -> None:
    # Members far from their own mean, at distances of 0.1: products in float32 would be off by more than that.
    rng = np.random.default_rng(0)
    clusters = rng.normal(0, 300, (4, 1, 16)) + rng.normal(0, 0.03, (4, 12, 16))
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
    monkeypatch.setattr(metrics, "NEIGHBOUR_BLOCK", 37)
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


@pytest.mark.parametrize("measure", [precision_recall, density_coverage, kernel_distance])
def test_features_that_hide_distances_are_refused(measure: Callable[..., object]) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(60, 8)), rng.normal(size=(50, 8))
    for huge in (1e20, -2e5):
        far = y.copy()
        far[3, 2] = huge
        with pytest.raises(UserError, match=r"features of image 3 reach .*, above 100000: look for damaged"):
            measure(x, far)
        with pytest.raises(UserError, match=r"features of image 3 reach"):
            measure(np.concatenate([far, x]), y)


def test_a_large_feature_gives_the_right_numbers() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(60, 8)), rng.normal(size=(50, 8))
    x[3, 2] = -1e4
    found = (*precision_recall(x, y), *density_coverage(x, y))
    assert found == pytest.approx((*brute_force(x, y, 3)[:2], *brute_force(x, y, 5)[2:]))


def test_statistics_whose_distance_overflows_are_refused() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)), rng.normal(size=(50, 4))
    with pytest.raises(UserError, match="exceed 1e100, and FD overflows: look for damaged images or weights"):
        frechet_distance(*mean_and_covariance(x * 1e100), *mean_and_covariance(y * 1e100))


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
    """The definition, image by image."""
    found: list[float] = []
    for start in range(0, len(probs), split_size):
        part = probs[start : start + split_size]
        marginal = part.mean(0)
        divergences = [sum(p * math.log(p / q) for p, q in zip(row, marginal, strict=True) if p > 0) for row in part]
        found.append(math.exp(sum(divergences) / len(part)))
    return sum(found) / len(found)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 31), st.booleans(), st.integers(0, 1000))
def test_the_score_matches_its_definition(count: int, classes: int, split: int, sharp: bool, seed: int) -> None:
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
def test_advance_is_called_once_per_block(monkeypatch: pytest.MonkeyPatch, real: int, drawn: int, both: bool) -> None:
    monkeypatch.setattr(metrics, "NEIGHBOUR_BLOCK", 7)
    features = torch.randn(real + drawn, 3, generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    compare(features[:real], features[real:], k=3 if both else None, density_k=2, advance=calls.append)
    assert sum(calls) == len(calls) == count_blocks(real, drawn, both)
    calls.clear()
    kernel_distance(features[:real], features[real:], subsets=4, advance=calls.append)
    assert calls == [1, 1, 1, 1]


def features(count: int, dim: int, seed: int, far: float = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + far).astype(np.float32)


def streamed(rows: np.ndarray, sizes: list[int]) -> Gaussian:
    found = FeatureStatistics(rows.shape[1])
    start = 0
    for size in [*sizes, len(rows)]:
        found.update(torch.from_numpy(rows[start : start + size]))
        start += size
    return found.result()


@given(
    st.integers(2, 60), st.integers(1, 5), st.lists(st.integers(0, 20), max_size=6), st.sampled_from([0, 1e4]),
    st.integers(1, 30), st.integers(0, 1000),
)  # fmt: skip
def test_batches_give_np_cov_and_do_not_change_a_bit(
    count: int, dim: int, sizes: list[int], far: float, block: int, seed: int
) -> None:
    rows = features(count, dim, seed, far)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "STATISTICS_BLOCK", block)
        found, whole = streamed(rows, sizes), streamed(rows, [])
    np.testing.assert_array_equal(found.mean, whole.mean)
    np.testing.assert_array_equal(found.covariance, whole.covariance)
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-12, atol=1e-12)
    expected = np.cov(exact - exact[0], rowvar=False).reshape(dim, dim)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-9, atol=1e-9)


def test_features_far_from_0_keep_their_digits() -> None:
    rows = np.random.default_rng(0).normal(size=(5000, 4)) + 1e7
    found = streamed(rows, [1000] * 4)
    np.testing.assert_allclose(found.covariance, np.cov(rows - 1e7, rowvar=False), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_have_no_covariance(count: int) -> None:
    found = FeatureStatistics(3)
    found.update(torch.zeros(count, 3))
    with pytest.raises(UserError, match=f"{count} images? cannot have a covariance: give at least 2"):
        found.result()


@pytest.mark.parametrize("block", [1, 1024])
def test_numbers_that_are_not_finite_are_refused(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "STATISTICS_BLOCK", block)
    with pytest.raises(UserError, match="NaN or infinity"):
        streamed(np.array([[1.0, np.nan], [1.0, 2.0]]), [])


@given(st.integers(1, 40), st.integers(1, 15), st.integers(0, 1000))
def test_the_score_depends_on_positions_not_on_the_order_of_batches(count: int, split: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(4), count)
    found = InceptionScore(count, 4, split)
    for some in np.array_split(rng.permutation(count), 3):
        found.update(torch.from_numpy(probs[some]), torch.from_numpy(some))
    assert found.result() == pytest.approx(inception_score(probs, split), rel=1e-12)


def random_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_each_region_gives_three_means_then_three_deviations_in_raster_order(
    count: int, regions: int, side: int, seed: int
) -> None:
    images = random_images(count, regions * side, seed)
    expected: list[list[float]] = []
    for image in images:
        row: list[float] = []
        for top in range(0, regions * side, side):
            for left in range(0, regions * side, side):
                pixels = image[top : top + side, left : left + side].reshape(-1, 3).astype(np.float64) / 255
                mean = pixels.sum(0) / side**2
                row += [*mean, *np.sqrt(((pixels - mean) ** 2).sum(0) / side**2)]
        expected.append(row)
    np.testing.assert_allclose(region_statistics(images, regions), expected, atol=1e-12)
