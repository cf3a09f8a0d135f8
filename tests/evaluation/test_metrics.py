"""Frechet distance and its statistics, against scipy, closed forms and an independent identity."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from st_ar.errors import UserError
from st_ar.evaluation.metrics import frechet_distance, mean_and_covariance


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


def test_commuting_covariances_need_not_be_diagonal() -> None:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    std1, std2 = rng.uniform(0.1, 3, (2, 6))
    sigma1, sigma2 = (basis @ np.diag(std**2) @ basis.T for std in (std1, std2))
    expected = ((std1 - std2) ** 2).sum()
    assert frechet_distance(np.zeros(6), sigma1, np.zeros(6), sigma2) == pytest.approx(expected, rel=1e-9)


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


@pytest.mark.parametrize("count", [5, 200])
def test_a_set_is_at_no_distance_from_itself(count: int) -> None:
    statistics = mean_and_covariance(np.random.default_rng(1).normal(size=(count, 12)))
    found = frechet_distance(*statistics, *statistics)
    assert 0 <= found < 1e-5


@given(st.integers(1, 10), st.integers(0, 1000))
def test_the_distance_is_symmetric(dim: int, seed: int) -> None:
    first, second = gaussian(dim, seed), gaussian(dim, seed + 5000)
    assert frechet_distance(*first, *second) == pytest.approx(frechet_distance(*second, *first), rel=1e-9)


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


def test_what_does_not_belong_together_is_named() -> None:
    mean, covariance = np.zeros(3), np.eye(3)
    for match, arguments in (
        (r"do not belong together: \[3\], \[3, 3\], \[2\], \[2, 2\]", (mean, covariance, np.zeros(2), np.eye(2))),
        ("NaN or infinity", (mean, covariance, mean, covariance * np.nan)),
    ):
        with pytest.raises(UserError, match=match):
            frechet_distance(*arguments)
