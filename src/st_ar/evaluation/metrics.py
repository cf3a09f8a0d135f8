"""Numbers from statistics, as pure functions."""

import numpy as np

Array = np.ndarray


def mean_and_covariance(features: Array) -> tuple[Array, Array]:
    """Mean [D] and covariance [D, D] of features [N, D], in float64; N of 2 or more."""
    features = features.astype(np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def _root(matrix: Array) -> Array:
    """The symmetric square root of a positive semi-definite matrix; rounding's negative eigenvalues count as 0."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 sqrt(S1 S2)): the squared Wasserstein-2 distance of two Gaussians.

    The trace of sqrt(S1 S2) is taken from the eigenvalues of the symmetric sqrt(S1) S2 sqrt(S1), which are the same: no
    complex numbers, and singular covariances need no offset. With Inception's pool_3 features this is the FID
    (arXiv 1706.08500).

    Args:
        mu1, mu2: means [D]. sigma1, sigma2: covariances [D, D].
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    root = _root(sigma1)
    eigenvalues = np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(eigenvalues).sum()
    return float(max(distance, 0.0))
