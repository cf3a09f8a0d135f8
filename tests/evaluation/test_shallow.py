"""Ridge and logistic regression against their definitions, with NumPy alone."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from st_ar.errors import UserError
from st_ar.evaluation import probe_classifiers as shallow
from st_ar.evaluation.probe import ProbeMethod
from st_ar.evaluation.probe_classifiers import ShallowClassifiers


def clouds(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, Tensor]:
    """Features [count, 2, 5] of classes that overlap, neither centred nor of one scale, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    features = rng.normal(size=(count, 2, 5)) * [1, 2, 3, 4, 5] + 7
    features[:, :, 0] += labels[:, None]
    return features.astype(np.float32), torch.from_numpy(labels)


def standardised(train: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, deviation = train.mean(0), train.std(0)
    return (train - mean) / deviation, (new - mean) / deviation


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("penalty", [0.5, 100.0])
def test_ridge_is_its_closed_form(classes: int, penalty: float) -> None:
    features, labels = clouds(60, classes)
    new, _ = clouds(20, classes, seed=1)
    before = features.copy()
    found = ShallowClassifiers(features, labels, classes, "ridge", penalty, mean_over_steps=True)(torch.from_numpy(new))
    assert found.shape == (20, 3, classes)
    targets = 2.0 * F.one_hot(labels, classes).double().numpy() - 1
    for place in range(3):
        of_step = [(a.mean(1) if place == 2 else a[:, place]).astype(np.float64) for a in (features, new)]
        x, y = standardised(*of_step)
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(5), x.T @ (targets - targets.mean(0)))
        np.testing.assert_allclose(found[:, place], y @ weights + targets.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(features, before)


def test_logistic_regression_stands_where_its_gradient_vanishes() -> None:
    features, labels = clouds(60, 3)
    classify = ShallowClassifiers(features, labels, 3, "logistic", 2.0, mean_over_steps=False)
    for step in range(2):
        x, _ = standardised(features[:, step].astype(np.float64), features[:, step])
        weights = torch.from_numpy(classify.models[step][-1].coef_).double().requires_grad_()
        bias = torch.from_numpy(classify.models[step][-1].intercept_).double().requires_grad_()
        logits = F.linear(torch.from_numpy(x), weights, bias)
        loss = F.cross_entropy(logits, labels, reduction="sum") + weights.square().sum()  # 2.0 / 2
        for gradient in torch.autograd.grad(loss, (weights, bias)):
            assert gradient.abs().max() < 0.02
        torch.testing.assert_close(
            classify(torch.from_numpy(features))[:, step].softmax(-1), logits.softmax(-1).float(), rtol=1e-3, atol=1e-4
        )
    assert classify.notes() == ()


@pytest.mark.parametrize("method", ["ridge", "logistic"])
def test_a_class_without_training_images_is_never_guessed(method: shallow.Method) -> None:
    features, labels = clouds(60, 2)
    assert method != "mae"
    classify = ShallowClassifiers(features, labels * 3, 5, method, 1.0, mean_over_steps=False)
    scores = classify(torch.from_numpy(features))
    assert torch.isfinite(scores[..., [0, 3]]).all()
    assert (scores[..., [1, 2, 4]] == -torch.inf).all()
    assert (scores.argmax(-1)[:, 0] == labels * 3).float().mean() > 0.6


def test_a_regression_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shallow, "MAX_ITERATIONS", 1)
    classify = ShallowClassifiers(*clouds(60, 3), 3, "logistic", 1e-6, mean_over_steps=False)
    assert classify.notes() == (
        "2 of 2 logistic regressions had not converged after 1 iterations; a larger --penalty converges sooner",
    )


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    ProbeMethod(name="mae").require_library()
    with pytest.raises(UserError, match=r"scikit-learn's .*pip install 'st-ar\[quickstart\]', or give --method mae"):
        ProbeMethod(name="ridge").require_library()


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("inf"), float("nan")])
def test_a_penalty_of_nothing_is_refused(penalty: float) -> None:
    with pytest.raises(UserError, match="--penalty must be above 0"):
        ProbeMethod(name="ridge", penalty=penalty)
