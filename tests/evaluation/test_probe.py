"""Linear probing: no label leaks, and the accuracies are what they must be where that is known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation import probe as probe_module
from st_ar.evaluation.probe import ProbeMethod, accuracies, probe, probe_layers, require_classes
from st_ar.evaluation.probe_classifiers import Method, ProbeConfig
from st_ar.evaluation.probe_features import FeatureCache, uniform_steps
from tests.data.random_store import random_store, write_store
from tests.toys import TINY, random_model

SHORT = ProbeConfig(epochs=3, warmup_epochs=1, base_lr=1.0)
BRISK = ProbeConfig(epochs=12, warmup_epochs=1, base_lr=10.0, trust=0.1)
"""Converges on a hundred images, which MAE's rates do not."""


def store_for_tiny(
    folder: Path, *, images: int = 9, crops: int = 3, seed: int = 0
) -> tuple[Path, np.ndarray, np.ndarray]:
    return random_store(folder, images=images, crops=crops, grid=3, vocab_size=11, num_classes=3, seed=seed)


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


def test_accuracy_is_chance_before_any_token_is_read_and_1_after(
    telling: tuple[TokenStore, TokenStore],
) -> None:
    result = probe(random_model(), *telling, steps=[1, 2, 9], config=BRISK)
    shares = np.bincount(telling[1].labels, minlength=3) / 30
    assert any(result.top1[0] == pytest.approx(share) for share in shares)  # the same answer for every image
    assert result.top1[1:] == [1.0, 1.0]
    assert (result.steps, result.train_images, result.test_images) == ([1, 2, 9], 192, 30)  # both crops of 96 images


def test_a_probe_that_diverges_is_refused(telling: tuple[TokenStore, TokenStore]) -> None:
    config = ProbeConfig(epochs=3, warmup_epochs=0, base_lr=1e38)
    with pytest.raises(
        UserError, match="the probe's logits hold NaN: its training has diverged, so give a lower --base-"
    ):
        probe(random_model(), *telling, config=config)


def test_half_the_depth_and_eight_steps_are_the_defaults(telling: tuple[TokenStore, TokenStore]) -> None:
    result = probe(random_model(), *telling, config=SHORT)
    assert result.layer == 2
    assert result.steps == uniform_steps(9)
    assert len(result.top1) == 8
    assert result == probe(random_model(), *telling, layer=2, steps=uniform_steps(9), config=SHORT)


def test_only_the_crops_asked_for_are_read(telling: tuple[TokenStore, TokenStore]) -> None:
    result = probe(random_model(), *telling, steps=[9], train_crops=[1], config=SHORT)
    assert (result.train_images, result.test_images) == (96, 30)


def test_it_is_tested_on_the_centre_crops(tmp_path: Path, telling: tuple[TokenStore, TokenStore]) -> None:
    labels = np.random.default_rng(0).integers(0, 3, 30)
    crops = {
        shown: np.broadcast_to(code[:, None, None], (30, 1, 9))
        for shown, code in (("wrong", (labels + 1) % 3), ("right", labels))
    }

    def accuracy(name: str, codes: np.ndarray, *names: str) -> list[float]:
        folder = write_store(tmp_path / name, codes, labels, vocab_size=11, num_classes=3, crop_names=names)
        return probe(random_model(), telling[0], TokenStore(folder), steps=[9], config=SHORT).top1

    alone = {shown: accuracy(shown, codes) for shown, codes in crops.items()}
    both = np.concatenate(list(crops.values()), axis=1)
    assert accuracy("second", both, "top-left", "center") == alone["right"]
    assert accuracy("first", both, "center", "mirrored-center") == alone["wrong"]
    assert alone["right"] > alone["wrong"]


def test_the_network_is_left_as_it_was(telling: tuple[TokenStore, TokenStore]) -> None:
    model = random_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe(model, *telling, steps=[9], config=SHORT)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_result_depends_only_on_the_seed(tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match=f"no crop {crop}: .* has crops 0 to 1"):
        probe(random_model(), *telling, steps=[9], train_crops=[0, crop], config=SHORT)


def test_the_classes_of_both_stores_are_the_same_ones(tmp_path: Path, telling: tuple[TokenStore, TokenStore]) -> None:
    other = random_store(tmp_path / "other", images=9, grid=3, vocab_size=11)[0]
    meta = replace(telling[1].meta, shards=TokenStore(other).meta.shards, images=9, crops=TokenStore(other).meta.crops)
    for names, match in (
        (["class-0", "class-2", "class-1"], "3 and 3, class 1 is 'class-1' and 'class-2'"),
        (["class-0", "class-1", "class-2", "x"], "3 and 4, one list has more names"),
    ):
        replace(meta, class_names=names).write(other)
        with pytest.raises(UserError, match=f"have different classes .{match}.: give stores of one data set"):
            require_classes(telling[0], TokenStore(other))
    replace(meta, class_names=["0", "1", "2"]).write(other)
    require_classes(telling[0], TokenStore(other))  # numbers are no names


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    """A store has a label for every image; of a source without labels they are all of one class."""
    codes = np.zeros((4, 1, 9), np.uint16)
    alone = TokenStore(write_store(tmp_path / "alone", codes, np.zeros(4), vocab_size=11, num_classes=1))
    with pytest.raises(UserError, match="alone has 1 class, and a probe needs 2 or more: tokenize images with classes"):
        require_classes(alone, alone)
    one = TokenStore(write_store(tmp_path / "one", codes, np.ones(4), vocab_size=11, num_classes=3))
    with pytest.raises(UserError, match=r"all images of .*one are of one class"):
        require_classes(one, one)


def test_top_5_is_a_count_of_the_likelier_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3, 8, generator=generator)
    labels = torch.randint(8, (40,), generator=generator)
    numbers = np.arange(40, dtype=np.float32)[:, None, None]
    found = accuracies(lambda rows: logits[rows[:, 0, 0].long()], numbers, labels, [1, 5])
    for k in (1, 5):
        for place in range(3):
            right = 0
            for image in range(40):
                own = logits[image, place, labels[image]]
                right += sum(bool(other > own) for other in logits[image, place]) < k
            assert found[k][place] == pytest.approx(right / 40)
    assert found[1] != found[5]


def test_top_5_is_there_for_more_than_five_classes(tmp_path: Path, telling: tuple[TokenStore, TokenStore]) -> None:
    stores = [
        TokenStore(random_store(tmp_path / str(n), images=n, grid=3, vocab_size=11, num_classes=7, crops=1)[0])
        for n in (70, 40)
    ]
    model = random_model(replace(TINY, num_classes=7))
    result = probe(model, *stores, steps=[1, 9], config=SHORT)
    assert result.top5 is not None
    assert all(five >= one for one, five in zip(result.top1, result.top5, strict=True))
    assert 0.4 < result.top5[1] < 1
    assert probe(random_model(), *telling, steps=[9], config=SHORT).top5 is None


def test_layers_do_not_affect_one_another_with_and_without_the_cache(
    tmp_path: Path, telling: tuple[TokenStore, TokenStore]
) -> None:
    alone = [probe(random_model(), *telling, layer=layer, steps=[2, 9], config=SHORT) for layer in (1, 3, 4)]
    for _ in range(2):
        cache = FeatureCache(tmp_path / "cache", 1e9)
        for where in (None, cache):
            together = probe_layers(
                random_model(),
                *telling,
                layers=[1, 3, 4],
                steps=[2, 9],
                method=ProbeMethod(config=SHORT),
                cache=where,
                weights="abc",
            )
            assert together == alone
    assert (cache.reused, cache.written) == (6, 0)


@pytest.mark.parametrize("name", ["mae", "ridge", "logistic"])
def test_every_method_finds_the_class(telling: tuple[TokenStore, TokenStore], name: Method) -> None:
    method = ProbeMethod(name=name, config=BRISK, mean_over_steps=True)
    (result,) = probe_layers(random_model(), *telling, steps=[1, 9], method=method)
    assert result.method == name
    assert result.top1[0] < 0.6
    assert (result.top1[1], result.mean_top1, result.mean_top5) == (1.0, 1.0, None)
    assert len(result.top1) == 2
