"""Batches of views: pure functions of (seed, step), every image once an epoch, different crops of an image."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from st_ar.data.store import TokenStore, Views
from st_ar.distributed import Ranks
from tests.data.random_store import random_store, write_store
from tests.disk import refused


def telling_store(folder: Path, *, images: int, crops: int) -> TokenStore:
    """A store each of whose codes is image * crops + crop, and each label the image's number modulo 7."""
    codes = np.arange(images * crops).reshape(images, crops, 1).repeat(4, axis=2)
    write_store(folder, codes, np.arange(images) % 7, vocab_size=1 << 16, num_classes=7, shards=min(3, images))
    return TokenStore(folder)


@given(images=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 1 << 31))
def test_every_epoch_visits_every_image_exactly_once(images: int, batch: int, seed: int) -> None:
    with TemporaryDirectory() as temporary:
        views = Views(
            telling_store(Path(temporary) / "s", images=images, crops=1), batch_size=batch, views=1, seed=seed
        )
        steps = -(-3 * images // batch)
        visited = np.concatenate([views.images(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(visited[epoch * images : (epoch + 1) * images]) == list(range(images))


@given(images=st.integers(1, 25), batch=st.integers(1, 30), count=st.integers(1, 5), step=st.integers(0, 1000))
def test_views_are_different_crops_of_the_labelled_image(images: int, batch: int, count: int, step: int) -> None:
    with TemporaryDirectory() as temporary:
        views = Views(
            telling_store(Path(temporary) / "s", images=images, crops=5), batch_size=batch, views=count, seed=1
        )
        tokens, labels = views.batch(step)
        chosen = views.images(step)
    assert (tokens.dtype, labels.dtype) == (torch.int64, torch.int64)
    assert tokens.shape == (batch, count, 4)
    assert (tokens == tokens[..., :1]).all()
    assert (tokens[..., 0] // 5 == torch.from_numpy(chosen)[:, None]).all()
    assert labels.tolist() == [int(image) % 7 for image in chosen]
    assert all(len(set(crops)) == count for crops in (tokens[..., 0] % 5).tolist())


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    store = TokenStore(random_store(tmp_path / "store", shards=3)[0])
    views = Views(store, batch_size=7, views=2, seed=3)
    forward = [views.batch(step) for step in range(20)]
    for step in [19, 4, 4, 0, 11, 3]:  # over several epochs, back and forth
        fresh = Views(TokenStore(tmp_path / "store"), batch_size=7, views=2, seed=3).batch(step)
        for expected, again, anew in zip(forward[step], views.batch(step), fresh, strict=True):
            assert torch.equal(expected, again)
            assert torch.equal(expected, anew)


def test_other_seeds_give_other_orders_and_crops(tmp_path: Path) -> None:
    store = telling_store(tmp_path / "store", images=50, crops=10)
    batches = [Views(store, batch_size=50, views=1, seed=seed).batch(0)[0][:, 0, 0] for seed in (0, 1)]
    assert (batches[0] // 10).tolist() != (batches[1] // 10).tolist()
    crops_by_image = [(batch % 10)[(batch // 10).argsort()].tolist() for batch in batches]
    assert crops_by_image[0] != crops_by_image[1]


def test_other_epochs_have_other_orders_and_crops(tmp_path: Path) -> None:
    views = Views(telling_store(tmp_path / "store", images=50, crops=10), batch_size=50, views=1, seed=0)
    epochs = [views.batch(step)[0][:, 0, 0] for step in (0, 1)]
    assert (epochs[0] // 10).tolist() != (epochs[1] // 10).tolist()
    crops_by_image = [(batch % 10)[(batch // 10).argsort()].tolist() for batch in epochs]
    assert crops_by_image[0] != crops_by_image[1]


def test_every_crop_is_drawn_equally_often(tmp_path: Path) -> None:
    views = Views(telling_store(tmp_path / "store", images=50, crops=10), batch_size=50, views=2, seed=0)
    drawn = Counter(int(code) % 10 for step in range(40) for code in views.batch(step)[0][..., 0].flatten())
    assert sorted(drawn) == list(range(10))
    # 4,000 draws of 10 crops: 400 each, with a standard deviation of 18 (distinct within an image, so a bit less).
    assert all(abs(count - 400) < 90 for count in drawn.values()), drawn


def test_the_data_order_never_changes(tmp_path: Path) -> None:
    # Runs begun with one version of st-ar are resumed with another: the order is part of the format.
    views = Views(telling_store(tmp_path / "store", images=10, crops=5), batch_size=4, views=2, seed=6)
    epochs = [np.random.default_rng([6, 1, epoch]).permutation(10) for epoch in (0, 1)]
    images = np.concatenate(epochs)[8:12]  # of step 2: the end of one epoch and the beginning of the next
    crops = np.random.default_rng([6, 2, 2]).random((4, 5)).argsort(axis=1)[:, :2]
    assert views.images(2).tolist() == images.tolist()
    assert views.batch(2)[0][..., 0].tolist() == (5 * images[:, None] + crops).tolist()


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_ranks_batches_joined_are_those_of_one(tmp_path: Path, world: int) -> None:
    store = telling_store(tmp_path / "store", images=20, crops=5)
    settings: dict[str, Any] = {"batch_size": 6, "views": 2, "seed": 1}
    alone = Views(store, **settings)
    ranks = [Views(store, **settings, ranks=Ranks(rank=rank, world=world)) for rank in range(world)]
    for step in (0, 3):  # step 3 has the end of one epoch and the beginning of the next
        tokens, labels = (torch.cat(parts) for parts in zip(*(rank.batch(step) for rank in ranks), strict=True))
        assert torch.equal(tokens, alone.batch(step)[0])
        assert torch.equal(labels, alone.batch(step)[1])


def test_more_views_than_crops_are_refused_with_both_and_the_remedy(tmp_path: Path) -> None:
    store = TokenStore(random_store(tmp_path / "store", crops=1)[0])
    with refused(
        tmp_path, "--views 2 asks for different crops of an image, .* has 1 of each: tokenize with --crops ten"
    ):
        Views(store, batch_size=4, views=2, seed=0)
