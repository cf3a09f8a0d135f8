"""`st-ar train-classifier` on the embedded digits, and the metrics of `st-ar evaluate --classifier` against naive formulas."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from st_ar.config import ClassifierConfig
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation.generation.classifier import (
    Classifier,
    decoded_images,
    load_classifier,
    train_classifier,
)
from st_ar.evaluation.generation.evaluate import choose_metrics
from st_ar.evaluation.generation.features import load_extractor
from st_ar.evaluation.metrics import frechet_distance, inception_score, mean_and_covariance
from st_ar.files import read_json
from st_ar.tokenizer import load_tokenizer
from tests.disk import flip_byte
from tests.evaluation.generation.test_evaluate import fails, st_ar

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token stores of the digits, and a classifier of them."""
    folder = tmp_path_factory.mktemp("digits")
    st_ar("train-tokenizer", "kmeans", "--images", "digits:train", "--vocab-size", "32", "--out", folder / "tokenizer")
    for split, crops in (("train", "ten"), ("test", "center")):
        arguments = ("--tokenizer", folder / "tokenizer", "--crops", crops, "--out", folder / split)
        st_ar("tokenize", "--images", f"digits:{split}", *arguments)
    data = ("--tokens", folder / "train", "--test-tokens", folder / "test", "--tokenizer", folder / "tokenizer")
    st_ar("train-classifier", *data, "--steps", "120", "--batch-size", "64", "--out", folder / "classifier")
    return folder


def decoded(folder: Path, split: str = "test") -> tuple[np.ndarray, np.ndarray]:
    images = decoded_images(TokenStore(folder / split), load_tokenizer(folder / "tokenizer"))
    assert images.labels is not None
    return np.stack([pixels for _, pixels in images.read(0, 1)]), images.labels


def test_it_learns_the_decoded_digits_and_records_what_it_is(folder: Path) -> None:
    record = read_json(folder / "classifier/config.json", "a classifier")
    pixels, labels = decoded(folder)
    extractor = load_classifier(folder / "classifier", CPU)
    logits = extractor.extract(torch.from_numpy(pixels)).logits
    assert logits is not None
    accuracy = (logits.argmax(1).numpy() == labels).mean()
    assert record["test_accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.85  # chance is 0.1
    assert (record["weights"], record["test_images"], record["config"]["seed"]) == (extractor.weights, len(labels), 0)
    assert record["tokens"]["fingerprint"] == TokenStore(folder / "train").fingerprint


def test_features_are_normalised_over_the_training_images(folder: Path) -> None:
    pixels, _ = decoded(folder, "train")
    features = load_classifier(folder / "classifier", CPU).extract(torch.from_numpy(pixels)).features
    assert features.shape == (len(pixels), 128)
    assert features.mean(0).abs().max() < 1e-4
    live = features.std(0) > 0
    torch.testing.assert_close(features.std(0)[live], torch.ones(int(live.sum())), atol=1e-3, rtol=0)


def test_numbers_of_samples_are_those_of_naive_formulas(folder: Path, tmp_path: Path) -> None:
    """The samples are decoded training digits, a fifth of them with a wrong label."""
    pixels, labels = decoded(folder, "train")
    pixels, asked = pixels[:400], labels[:400].copy()
    asked[:80] = (asked[:80] + 1) % 10
    np.savez(tmp_path / "samples.npz", arr_0=pixels, arr_1=asked)
    out = tmp_path / "result.json"
    st_ar("evaluate", tmp_path / "samples.npz", "--classifier", folder / "classifier", "--json", out)
    result = json.loads(out.read_text())

    extractor = load_classifier(folder / "classifier", CPU)
    found = extractor.extract(torch.from_numpy(pixels))
    real = extractor.extract(torch.from_numpy(decoded(folder)[0])).features
    assert found.logits is not None
    right = found.logits.argmax(1).numpy() == asked
    probabilities = found.logits.double().softmax(1)
    expected = {
        "class accuracy (classifier)": right.mean(),
        "FD-classifier": frechet_distance(
            *mean_and_covariance(real.numpy()), *mean_and_covariance(found.features.numpy())
        ),
        "IS-classifier": (probabilities * (probabilities / probabilities.mean(0)).log()).sum(1).mean().exp().item(),
    }
    metrics, errors = result["metrics"], result["standard_errors"]
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert {name: row["recall"] for name, row in result["classes"].items()} == pytest.approx(
        {str(label): right[asked == label].mean() for label in range(10)}
    )
    assert [row["samples"] for row in result["classes"].values()] == np.bincount(asked).tolist()
    share = right.mean()
    assert errors["class accuracy (classifier)"] == pytest.approx((share * (1 - share) / 400) ** 0.5)
    # a jackknife is another estimate of the errors that the bootstrap gives
    without = [inception_score(np.delete(probabilities.numpy(), index, axis=0)) for index in range(400)]
    jackknife = (399 / 400 * np.sum((without - np.mean(without)) ** 2)) ** 0.5
    assert errors["IS-classifier"] == pytest.approx(jackknife, rel=0.35)
    assert 0 < errors["FD-classifier"] < expected["FD-classifier"]


def test_equal_seeds_train_equal_classifiers_and_others_differ(folder: Path, tmp_path: Path) -> None:
    stores = TokenStore(folder / "train"), TokenStore(folder / "test"), load_tokenizer(folder / "tokenizer")
    weights = [
        train_classifier(*stores, tmp_path / str(n), ClassifierConfig(steps=3, batch_size=8, seed=seed), CPU)["weights"]
        for n, seed in enumerate((5, 5, 6))
    ]
    assert weights[0] == weights[1] != weights[2]


def test_sizes_that_are_no_power_of_two_are_read() -> None:
    features, logits = Classifier(3).eval()(torch.zeros(2, 36, 20, 3, dtype=torch.uint8))
    assert (features.shape, logits.shape) == ((2, 128), (2, 3))


def test_efficientnet_judges_imagenets_classes() -> None:
    """A photograph of a cat, at the size of the network's training: tabby, tiger cat or Egyptian cat."""
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(data.chelsea()[:, 75:375]).unsqueeze(0)
    logits = load_extractor("efficientnet", CPU).extract(image).logits
    assert logits is not None
    assert logits.shape == (1, 1000)
    assert logits.argmax().item() in (281, 282, 285)


@pytest.mark.parametrize(
    ("metrics", "extractor", "expected"),
    [
        ([], "inception", ["fid", "sfid", "is", "precision", "recall"]),
        ([], "classifier", ["class-accuracy", "fd", "is", "precision", "recall"]),
        (["recall", "class-accuracy"], "efficientnet", ["class-accuracy", "recall"]),
    ],
)
def test_metrics_of_each_network(metrics: list, extractor: str, expected: list) -> None:  # pyright: ignore[reportMissingTypeArgument]
    assert choose_metrics(metrics, extractor) == expected


def test_class_accuracy_needs_a_network_that_knows_the_classes() -> None:
    with pytest.raises(UserError, match="needs another network: give --classifier FOLDER or --extractor efficientnet"):
        choose_metrics(["class-accuracy"], "inception")


def test_mistakes_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    pixels, labels = decoded(folder)
    classifier = ("--classifier", folder / "classifier")
    np.savez(tmp_path / "unlabelled.npz", arr_0=pixels[:20])
    fails(capsys, "has no labels: class accuracy needs arr_1", "evaluate", tmp_path / "unlabelled.npz", *classifier)
    np.savez(tmp_path / "others.npz", arr_0=pixels[:20], arr_1=np.arange(20))
    fails(capsys, "labels from 0 to 19, the classifier 10 classes", "evaluate", tmp_path / "others.npz", *classifier)
    np.savez(tmp_path / "samples.npz", arr_0=pixels[:20], arr_1=labels[:20])
    fails(capsys, "give --reference", "evaluate", tmp_path / "samples.npz")
    fails(capsys, "is not a classifier: no such", "evaluate", tmp_path / "samples.npz", "--classifier", tmp_path / "x")
    both = ("--extractor", "efficientnet")
    fails(capsys, "leave --extractor and --inception out", "evaluate", tmp_path / "samples.npz", *classifier, *both)
    shutil.copytree(folder / "classifier", tmp_path / "broken")
    flip_byte(tmp_path / "broken/model.safetensors", -5)
    broken = ("--classifier", tmp_path / "broken")
    fails(capsys, r"broken/model.safetensors is damaged", "evaluate", tmp_path / "samples.npz", *broken)

    data = ("--tokens", folder / "train", "--test-tokens", folder / "test", "--tokenizer", folder / "tokenizer")
    fails(capsys, "classifier exists already", "train-classifier", *data, "--out", folder / "classifier")
    st_ar("train-tokenizer", "kmeans", "--images", "digits:train", "--vocab-size", "16", "--out", tmp_path / "other")
    capsys.readouterr()
    others = ("--tokens", folder / "train", "--test-tokens", folder / "test", "--tokenizer", tmp_path / "other")
    fails(capsys, "was made by another tokenizer", "train-classifier", *others, "--out", tmp_path / "new")
    fails(capsys, "--steps must be at least 1", "train-classifier", *data, "--steps", "0", "--out", tmp_path / "new")
    fails(capsys, "--lr must be above 0", "train-classifier", *data, "--lr", "-1", "--out", tmp_path / "new")
