"""MAE's optimizer and schedule against their formulas, and classifiers that are what autograd would make of them."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from st_ar.errors import UserError
from st_ar.evaluation import probe_classifiers as probe_classifiers
from st_ar.evaluation.probe import ProbeMethod
from st_ar.evaluation.probe_classifiers import (
    Classifiers,
    ProbeConfig,
    ShallowClassifiers,
    fit_classifiers,
    lars_step,
    probe_rate,
    read_rows,
)
from st_ar.randomness import RandomStream, torch_generator

SHORT = ProbeConfig(epochs=3, warmup_epochs=1, base_lr=1.0)
BRISK = ProbeConfig(epochs=12, warmup_epochs=1, base_lr=10.0, trust=0.1)
"""Converges on a hundred images, which MAE's rates do not."""


# The optimizer


def maes_lars(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    velocities: list[Tensor],
    *,
    lr: float,
    momentum: float,
    trust: float,
) -> None:
    """One step of MAE's util/lars.py with weight decay 0, parameter by parameter."""
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        update = gradient
        if parameter.dim() > 1:
            norm, grad_norm = parameter.norm().item(), gradient.norm().item()
            update = gradient * (trust * norm / grad_norm if norm > 0 and grad_norm > 0 else 1.0)
        velocities[index] = momentum * velocities[index] + update
        parameter -= lr * velocities[index]


def test_lars_treats_each_classifier_as_maes_treats_a_network_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, biases = (torch.randn(*shape, generator=generator) for shape in ((4, 3, 5), (4, 3)))
    weights[1] = 0  # no norm: no trust ratio
    weights[2] *= 100  # a ratio of one would show in all of them
    own = [[weights[i].clone(), biases[i].clone()] for i in range(4)]
    velocities = [[torch.zeros(3, 5), torch.zeros(3)] for _ in range(4)]
    together = torch.zeros_like(weights), torch.zeros_like(biases)
    for lr in (0.5, 0.5, 0.2, 0.1, 0.0):
        gradients = [torch.randn(*shape, generator=generator) for shape in ((4, 3, 5), (4, 3))]
        gradients[0][3] = 0  # no gradient: no trust ratio either
        lars_step((weights, biases), together, gradients, lr=lr, momentum=0.9, trust=0.01)
        for i in range(4):
            maes_lars(own[i], [g[i] for g in gradients], velocities[i], lr=lr, momentum=0.9, trust=0.01)
            torch.testing.assert_close(weights[i], own[i][0])
            torch.testing.assert_close(biases[i], own[i][1])


def test_biases_are_exempt_from_the_trust_ratio() -> None:
    weights, biases = torch.full((1, 1, 1), 2.0), torch.full((1, 1), 2.0)
    gradients = torch.full((1, 1, 1), 4.0), torch.full((1, 1), 4.0)
    velocities = torch.zeros(1, 1, 1), torch.zeros(1, 1)
    lars_step((weights, biases), velocities, gradients, lr=1.0, momentum=0.9, trust=1e-3)
    assert weights.item() == pytest.approx(2 - 1e-3 * 2)  # trust * norm / grad_norm * gradient = trust * norm
    assert biases.item() == -2


@given(st.floats(0, 90), st.integers(1, 20000))
def test_the_rate_is_maes_schedule(epoch: float, batch_size: int) -> None:
    peak = 0.1 * batch_size / 256
    after_warm_up = peak * 0.5 * (1.0 + math.cos(math.pi * (epoch - 10) / (90 - 10)))
    expected = peak * epoch / 10 if epoch < 10 else after_warm_up
    assert probe_rate(ProbeConfig(min_lr=0), epoch, batch_size) == pytest.approx(expected, abs=1e-12)


def test_the_rate_begins_at_0_peaks_after_the_warm_up_and_ends_at_0() -> None:
    config = ProbeConfig(epochs=20, warmup_epochs=4, base_lr=0.3, min_lr=0.6)
    assert probe_rate(config, 0, 512) == 0
    assert probe_rate(config, 4, 512) == pytest.approx(0.6)
    assert probe_rate(config, 12, 512) == pytest.approx(0.3)
    assert probe_rate(config, 20, 512) == pytest.approx(0, abs=1e-12)


def test_the_peak_of_a_small_batch_is_not_scaled_below_the_least_rate() -> None:
    assert probe_rate(ProbeConfig(), 10, 256) == 1.0  # 0.1 by the linear rule
    assert probe_rate(ProbeConfig(), 5, 256) == pytest.approx(0.5)
    assert probe_rate(ProbeConfig(), 10, 16384) == pytest.approx(6.4)


# Classifiers


def separable(count: int, seed: int, *, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Features [count, 2, 6] of 3 classes: the classes lie apart in step 0; step 1 is noise alone. Not centred on 0."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    features = 5 + noise * torch.randn(count, 2, 6, generator=generator)
    features[:, 0, :3] += 2 * F.one_hot(labels, 3)
    return features, labels


def fit(features: Tensor, labels: Tensor, config: ProbeConfig, *, mean_over_steps: bool = False) -> Classifiers:
    return fit_classifiers([features.numpy()], labels, 3, config, mean_over_steps=mean_over_steps)[0]


@pytest.mark.parametrize("epochs", [1, 2])
def test_training_is_autograds_through_batch_norm_and_a_linear_layer(epochs: int) -> None:
    features, labels = separable(165, 0, noise=1.0)  # batches of 5, and 33 of them
    config = ProbeConfig(epochs=epochs, warmup_epochs=0, base_lr=10.0, min_lr=0, trust=0.1, seed=3)
    classify = fit(features, labels, config)

    generator = torch_generator(3, RandomStream.PROBE)
    weights = nn.init.trunc_normal_(torch.empty(2, 3, 6), std=0.01, generator=generator)
    norms = [nn.BatchNorm1d(6, affine=False, eps=1e-6) for _ in range(2)]
    parameters = [[weights[i].clone(), torch.zeros(3)] for i in range(2)]
    velocities = [[torch.zeros(3, 6), torch.zeros(3)] for _ in range(2)]
    for epoch in range(epochs):
        order = torch.randperm(165, generator=generator)
        for index in range(33):
            chosen = order[5 * index : 5 * index + 5]
            lr = 10.0 * 5 / 256 * 0.5 * (1 + math.cos(math.pi * (epoch + index / 33) / epochs))
            for i in range(2):
                leaves = [p.clone().requires_grad_() for p in parameters[i]]
                loss = F.cross_entropy(F.linear(norms[i](features[chosen, i]), *leaves), labels[chosen])
                gradients = torch.autograd.grad(loss, leaves)
                maes_lars(parameters[i], gradients, velocities[i], lr=lr, momentum=0.9, trust=0.1)
    new, _ = separable(20, 1)
    with torch.no_grad():
        expected = [F.linear(norms[i].eval()(new[:, i]), *parameters[i]) for i in range(2)]
    assert (parameters[0][0] - weights[0]).norm() > weights[0].norm()  # far from where it began
    torch.testing.assert_close(classify(new), torch.stack(expected, dim=1), rtol=1e-3, atol=1e-4)


def test_separable_classes_are_told_apart_and_noise_stays_at_chance() -> None:
    features, labels = separable(640, 0)
    classify = fit(features, labels, BRISK)
    new, truth = separable(1500, 1)
    accuracy = (classify(new).argmax(-1) == truth[:, None]).float().mean(0)
    assert accuracy[0] >= 0.99
    assert accuracy[1] == pytest.approx(1 / 3, abs=0.05)  # 4 standard deviations


def test_a_features_class_does_not_depend_on_what_it_is_classified_with() -> None:
    classify = fit(*separable(128, 0), SHORT)
    new, _ = separable(6, 1)
    together = classify(new)
    for index in range(6):
        torch.testing.assert_close(classify(new[index : index + 1])[0], together[index])


@pytest.mark.parametrize("count", [3, 20, 63])
def test_a_handful_of_features_is_enough(count: int) -> None:
    features, labels = separable(count, 0)
    logits = fit(features, labels, SHORT)(features)
    assert logits.shape == (count, 2, 3)
    assert torch.isfinite(logits).all()


def test_one_image_is_too_few() -> None:
    with pytest.raises(UserError, match="1 training images are too few for a probe"):
        fit(*separable(1, 0), SHORT)


def test_a_sweep_of_layers_in_one_pass_gives_each_what_it_gets_alone() -> None:
    (first, labels), (second, _) = separable(96, 0), separable(96, 5)
    together = fit_classifiers([first.numpy(), second.numpy()], labels, 3, SHORT)
    for features, classify in zip((first, second), together, strict=True):
        assert torch.equal(classify(features), fit(features, labels, SHORT)(features))


def test_the_mean_is_one_more_step_and_leaves_the_others_as_they_are() -> None:
    features, labels = separable(96, 0)
    classify = fit(features, labels, SHORT, mean_over_steps=True)
    logits = classify(features)
    assert logits.shape == (96, 3, 3)
    torch.testing.assert_close(logits[:, :2], fit(features, labels, SHORT)(features))
    own = torch_generator(0, RandomStream.PROBE, 1)
    weights = nn.init.trunc_normal_(torch.empty(1, 3, 6), std=0.01, generator=own)
    alone, generator = Classifiers(weights, SHORT, mean_over_steps=False), torch_generator(0, RandomStream.PROBE)
    nn.init.trunc_normal_(torch.empty(2, 3, 6), std=0.01, generator=generator)
    for epoch in range(3):
        order = torch.randperm(96, generator=generator)
        for index in range(32):
            chosen = order[3 * index : 3 * index + 3]
            rate = probe_rate(SHORT, epoch + index / 32, 3)
            alone.step(features[chosen].mean(1, keepdim=True), labels[chosen], rate)
    torch.testing.assert_close(logits[:, 2], alone(features.mean(1, keepdim=True))[:, 0])


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_rows_are_read_in_any_order_from_memory_and_from_disk(tmp_path: Path, stored: type[np.generic]) -> None:
    array = np.random.default_rng(0).normal(size=(20, 2, 3)).astype(stored)
    np.save(tmp_path / "features.npy", array)
    rows = torch.tensor([7, 0, 19, 7, 3])
    for features in (array, np.load(tmp_path / "features.npy", mmap_mode="r")):
        found = read_rows(features, rows)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), array[[7, 0, 19, 7, 3]].astype(np.float32))


def test_features_on_disk_train_the_same_classifiers(tmp_path: Path) -> None:
    features, labels = separable(96, 0)
    np.save(tmp_path / "features.npy", features.numpy())
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    classify = fit_classifiers([mapped], labels, 3, SHORT)[0]
    assert torch.equal(classify(features), fit(features, labels, SHORT)(features))


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_features_held_on_the_device_train_the_same_classifiers(
    monkeypatch: pytest.MonkeyPatch, stored: type[np.generic]
) -> None:
    features, labels = separable(96, 0)
    array = features.numpy().astype(stored)
    expected = fit_classifiers([array, -array], labels, 3, SHORT)
    copied = probe_classifiers.copy_to_device(array, torch.device("cpu"), rows=40)
    assert copied.dtype == torch.float32
    np.testing.assert_array_equal(copied.numpy(), array.astype(np.float32))
    monkeypatch.setattr(
        probe_classifiers,
        "copy_if_it_fits",
        lambda features, device, share: probe_classifiers.copy_to_device(features, device),
    )
    found = fit_classifiers([array, -array], labels, 3, SHORT)
    assert all(torch.equal(a(features), b(features)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("epochs", "said"), [(2, True), (3, True), (4, False)])
def test_an_end_within_the_warm_up_is_said(epochs: int, said: bool) -> None:
    config = ProbeConfig(epochs=epochs, warmup_epochs=3)
    note = f"{epochs} epochs end within the 3 of the warm-up: these classifiers are far from trained"
    assert fit(*separable(20, 0), config).notes() == ((note,) if said else ())


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
def test_a_class_without_training_images_is_never_guessed(method: probe_classifiers.Method) -> None:
    features, labels = clouds(60, 2)
    assert method != "mae"
    classify = ShallowClassifiers(features, labels * 3, 5, method, 1.0, mean_over_steps=False)
    scores = classify(torch.from_numpy(features))
    assert torch.isfinite(scores[..., [0, 3]]).all()
    assert (scores[..., [1, 2, 4]] == -torch.inf).all()
    assert (scores.argmax(-1)[:, 0] == labels * 3).float().mean() > 0.6


def test_a_regression_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_classifiers, "MAX_ITERATIONS", 1)
    classify = ShallowClassifiers(*clouds(60, 3), 3, "logistic", 1e-6, mean_over_steps=False)
    assert classify.notes() == (
        "2 of 2 logistic regressions had not converged after 1 iterations; a larger --penalty converges sooner",
    )


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    ProbeMethod(name="mae")
    with pytest.raises(
        UserError,
        match=r"k-means tokenizers and the probe's ridge and logistic methods need sklearn .*pip install 'st-ar\[quickstart\]'",
    ):
        ProbeMethod(name="ridge")


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("inf"), float("nan")])
def test_a_penalty_that_is_not_positive_and_finite_is_refused(penalty: float) -> None:
    with pytest.raises(UserError, match=r"--penalty must be (above 0|a finite number)"):
        ProbeMethod(name="ridge", penalty=penalty)
