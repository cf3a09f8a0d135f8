"""Streamed statistics against np.cov, whatever the pieces, their order and who saw them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from st_ar.errors import UserError
from st_ar.evaluation import metrics as statistics
from st_ar.evaluation.metrics import FeatureStatistics, Gaussian, InceptionScore, inception_score


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
def test_pieces_give_np_cov_and_not_a_bit_depends_on_them(
    count: int, dim: int, sizes: list[int], far: float, block: int, seed: int
) -> None:
    rows = features(count, dim, seed, far)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BLOCK", block)
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
    monkeypatch.setattr(statistics, "BLOCK", block)
    with pytest.raises(UserError, match="NaN or infinity"):
        streamed(np.array([[1.0, np.nan], [1.0, 2.0]]), [])


@given(st.integers(1, 40), st.integers(1, 15), st.integers(0, 1000))
def test_the_score_needs_places_and_no_order(count: int, split: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(4), count)
    found = InceptionScore(count, 4, split)
    for some in np.array_split(rng.permutation(count), 3):
        found.update(torch.from_numpy(probs[some]), torch.from_numpy(some))
    assert found.result() == pytest.approx(inception_score(probs, split), rel=1e-12)
