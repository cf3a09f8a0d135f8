"""Linear probing: no label leaks, the optimizer is MAE's, and the accuracies are what they must be where that is known."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation.probe import (
    Lars,
    ProbeConfig,
    extract_features,
    fit_classifiers,
    probe,
    probe_rate,
    uniform_steps,
)
from st_ar.randomness import Purpose, torch_generator
from tests.data.random_store import random_store, write_store
from tests.toys import TINY, random_model

SHORT = ProbeConfig(epochs=3, warmup_epochs=1, base_lr=1.0)
BRISK = ProbeConfig(epochs=12, warmup_epochs=1, base_lr=10.0, trust=0.1)
"""Converges on a hundred images, which MAE's rates do not."""


def store_for_tiny(
    folder: Path, *, images: int = 9, crops: int = 3, seed: int = 0
) -> tuple[Path, np.ndarray, np.ndarray]:
    return random_store(folder, images=images, crops=crops, grid=3, vocab_size=11, num_classes=3, seed=seed)


# Steps


def test_eight_steps_of_an_image_of_256_tokens_are_the_multiples_of_32() -> None:
    assert uniform_steps(256) == [32, 64, 96, 128, 160, 192, 224, 256]


@given(st.integers(1, 300), st.data())
def test_steps_rise_to_the_last_and_lie_evenly(length: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, length))
    steps = uniform_steps(length, count)
    assert len(steps) == count
    assert steps[-1] == length
    assert steps == sorted(set(steps))
    assert steps[0] >= 1
    assert all(abs(step - length * (i + 1) / count) <= 0.5 for i, step in enumerate(steps))


@pytest.mark.parametrize("count", [0, 10])
def test_more_steps_than_tokens_or_none_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=f"{count} steps asked for; an image of this model has 9: give 1 to that many"):
        uniform_steps(9, count)


# Features


@torch.no_grad()
def test_a_steps_features_have_read_the_null_class_and_the_tokens_before_it(tmp_path: Path) -> None:
    folder, codes, labels = store_for_tiny(tmp_path / "tokens")
    model = random_model()
    found, found_labels = extract_features(model, TokenStore(folder), layer=3, steps=[1, 4, 9], crops=[2, 0])
    tokens = torch.from_numpy(codes[:, [2, 0]].astype(np.int64)).transpose(0, 1).flatten(0, 1)  # crop by crop
    null = torch.full((18,), TINY.null_class)
    for place, step in enumerate([1, 4, 9]):
        expected = model.features(tokens[:, : step - 1], null, layers={3})[3][:, -1]  # has seen nothing later
        torch.testing.assert_close(found[:, place], expected, rtol=1e-4, atol=1e-5)
    assert found_labels.tolist() == [*labels, *labels]
    assert found.dtype == torch.float32


def test_the_stored_labels_do_not_reach_the_features(tmp_path: Path) -> None:
    folder, codes, labels = store_for_tiny(tmp_path / "tokens")
    others = (labels + 1) % 3
    write_store(tmp_path / "others", codes, others, vocab_size=11, num_classes=3)
    features, _ = extract_features(random_model(), TokenStore(folder), layer=2, steps=[1, 9])
    same, changed = extract_features(random_model(), TokenStore(tmp_path / "others"), layer=2, steps=[1, 9])
    assert torch.equal(features, same)
    assert changed.tolist() == others.tolist()


def test_the_batch_size_does_not_change_features(tmp_path: Path) -> None:
    store, model = TokenStore(store_for_tiny(tmp_path / "tokens")[0]), random_model()
    expected, labels = extract_features(model, store, layer=4, steps=[3, 9], crops=[0, 1])
    for batch_size in (1, 4, 9):
        found, found_labels = extract_features(model, store, layer=4, steps=[3, 9], crops=[0, 1], batch_size=batch_size)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(found_labels, labels)


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
    optimizer = Lars(weights, biases, momentum=0.9, trust=0.01)
    for lr in (0.5, 0.5, 0.2, 0.1, 0.0):
        gradients = [torch.randn(*shape, generator=generator) for shape in ((4, 3, 5), (4, 3))]
        gradients[0][3] = 0  # no gradient: no trust ratio either
        optimizer.step(gradients, lr)
        for i in range(4):
            maes_lars(own[i], [g[i] for g in gradients], velocities[i], lr=lr, momentum=0.9, trust=0.01)
            torch.testing.assert_close(weights[i], own[i][0])
            torch.testing.assert_close(biases[i], own[i][1])


def test_biases_are_exempt_from_the_trust_ratio() -> None:
    weights, biases = torch.full((1, 1, 1), 2.0), torch.full((1, 1), 2.0)
    Lars(weights, biases, momentum=0.9, trust=1e-3).step([torch.full((1, 1, 1), 4.0), torch.full((1, 1), 4.0)], 1.0)
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


@pytest.mark.parametrize("epochs", [1, 2])
def test_training_is_autograds_through_batch_norm_and_a_linear_layer(epochs: int) -> None:
    features, labels = separable(165, 0, noise=1.0)  # batches of 5, and 33 of them
    config = ProbeConfig(epochs=epochs, warmup_epochs=0, base_lr=10.0, min_lr=0, trust=0.1, seed=3)
    classify = fit_classifiers(features, labels, 3, config)

    generator = torch_generator(3, Purpose.PROBE)
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
    classify = fit_classifiers(features, labels, 3, BRISK)
    new, truth = separable(1500, 1)
    accuracy = (classify(new).argmax(-1) == truth[:, None]).float().mean(0)
    assert accuracy[0] >= 0.99
    assert accuracy[1] == pytest.approx(1 / 3, abs=0.05)  # 4 standard deviations


def test_a_features_class_does_not_depend_on_what_it_is_classified_with() -> None:
    classify = fit_classifiers(*separable(128, 0), 3, SHORT)
    new, _ = separable(6, 1)
    together = classify(new)
    for index in range(6):
        torch.testing.assert_close(classify(new[index : index + 1])[0], together[index])


@pytest.mark.parametrize("count", [3, 20, 63])
def test_a_handful_of_features_is_enough(count: int) -> None:
    features, labels = separable(count, 0)
    logits = fit_classifiers(features, labels, 3, SHORT)(features)
    assert logits.shape == (count, 2, 3)
    assert torch.isfinite(logits).all()


# The whole probe


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenStore, TokenStore]:
    """Stores whose every token is the image's label: the class is there for all to see once one token is read."""
    stores: list[TokenStore] = []
    for name, images in (("train", 96), ("test", 30)):
        labels = np.random.default_rng(images).integers(0, 3, images)
        codes = np.broadcast_to(labels[:, None, None], (images, 2, 9))
        folder = tmp_path_factory.mktemp("telling") / name
        stores.append(TokenStore(write_store(folder, codes, labels, vocab_size=11, num_classes=3)))
    return stores[0], stores[1]


def test_before_any_token_is_read_nothing_is_known_and_after_all_of_them_everything(
    telling: tuple[TokenStore, TokenStore],
) -> None:
    result = probe(random_model(), *telling, steps=[1, 2, 9], config=BRISK)
    shares = np.bincount(telling[1].labels, minlength=3) / 30
    assert any(result.top1[0] == pytest.approx(share) for share in shares)  # the same answer for every image
    assert result.top1[1:] == [1.0, 1.0]
    assert (result.steps, result.train_images, result.test_images) == ([1, 2, 9], 192, 30)  # both crops of 96 images


def test_half_the_depth_and_eight_steps_are_the_defaults(telling: tuple[TokenStore, TokenStore]) -> None:
    result = probe(random_model(), *telling, config=SHORT)
    assert result.layer == 2
    assert result.steps == uniform_steps(9)
    assert len(result.top1) == 8
    assert result == probe(random_model(), *telling, layer=2, steps=uniform_steps(9), config=SHORT)


def test_all_the_crops_asked_for_are_read(telling: tuple[TokenStore, TokenStore]) -> None:
    result = probe(random_model(), *telling, steps=[9], train_crops=[0, 1], config=SHORT)
    assert (result.train_images, result.test_images) == (192, 30)


def test_the_network_is_left_as_it_was(telling: tuple[TokenStore, TokenStore]) -> None:
    model = random_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe(model, *telling, steps=[9], config=SHORT)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_seed_gives_the_same_result_whatever_was_drawn_before(tmp_path: Path) -> None:
    stores = [TokenStore(store_for_tiny(tmp_path / str(s), images=n, seed=s)[0]) for s, n in ((0, 96), (1, 200))]
    torch.manual_seed(0)
    first = probe(random_model(), stores[0], stores[1], config=SHORT)
    torch.manual_seed(1)
    assert probe(random_model(), stores[0], stores[1], config=SHORT) == first
    assert probe(random_model(), stores[0], stores[1], config=replace(SHORT, seed=1)).top1 != first.top1


@pytest.mark.parametrize("other", ["train", "test"])
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_classes": 5}, "5 classes, the model 3"),
        ({"vocab_size": 12}, "12 tokens in the codebook, the model 11"),
        ({"grid": 4}, "4 tokens a side, the model 3"),
    ],
)
def test_a_store_that_is_not_the_models_is_refused(
    tmp_path: Path, telling: tuple[TokenStore, TokenStore], other: str, changes: dict[str, int], match: str
) -> None:
    sizes = {"grid": 3, "vocab_size": 11, "num_classes": 3} | changes
    wrong = TokenStore(random_store(tmp_path / "wrong", images=4, **sizes)[0])
    stores = (wrong, telling[1]) if other == "train" else (telling[0], wrong)
    with pytest.raises(UserError, match=match):
        probe(random_model(), *stores, steps=[9], config=SHORT)


@pytest.mark.parametrize("layer", [-1, 0, 5])
def test_a_layer_out_of_range_is_refused(telling: tuple[TokenStore, TokenStore], layer: int) -> None:
    with pytest.raises(UserError, match=f"no layer {layer}: this network has layers 1 to 4"):
        probe(random_model(), *telling, layer=layer, steps=[9], config=SHORT)


@pytest.mark.parametrize("step", [-1, 0, 10])
def test_a_step_out_of_range_is_refused(telling: tuple[TokenStore, TokenStore], step: int) -> None:
    with pytest.raises(UserError, match=f"no step {step}: this model's images have steps 1 to 9"):
        probe(random_model(), *telling, steps=[9, step], config=SHORT)


@pytest.mark.parametrize("crop", [-1, 2])
def test_a_crop_out_of_range_is_refused(telling: tuple[TokenStore, TokenStore], crop: int) -> None:
    with pytest.raises(UserError, match=f"no crop {crop} in .*: it has 2 of each image"):
        probe(random_model(), *telling, steps=[9], train_crops=[0, crop], config=SHORT)
