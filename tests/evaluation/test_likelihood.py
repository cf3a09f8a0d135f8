"""The validation loss, token by token."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation.attention import ImageMasks
from st_ar.evaluation.likelihood import validation_loss
from st_ar.model.transformer import Transformer
from tests.data.random_store import random_store, write_store
from tests.toys import TINY, random_model


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    names = ("top-left", "center", "mirrored-center")
    return random_store(
        tmp_path / "tokens", images=7, crops=3, grid=3, vocab_size=11, num_classes=3, shards=2, crop_names=names
    )


@torch.no_grad()
def test_it_is_the_mean_surprise_at_each_token_of_the_centre_crop(written: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, codes, labels = written
    model = random_model()
    surprises: list[float] = []
    for image, label in zip(codes[:, 1].astype(int), labels, strict=True):
        for place, token in enumerate(image):
            read = torch.tensor(image[:place])[None]  # nothing after the token can help
            logits = model(read, torch.tensor([label])).logits[0, -1].double()
            surprises.append(math.log(logits.exp().sum().item()) - logits[token].item())
    assert validation_loss(model, TokenStore(folder)) == pytest.approx(sum(surprises) / (7 * 9), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("own", [True, False])
def test_masked_keys_are_hidden_as_in_training(written: tuple[Path, np.ndarray, np.ndarray], own: bool) -> None:
    folder, codes, labels = written
    model = random_model()
    masks = ImageMasks(ratio=0.5, seed=3, own_position=own)
    surprises: list[float] = []
    for image, (tokens, label) in enumerate(zip(codes[:, 1].astype(int), labels, strict=True)):
        mask = masks.draw([image], 9)
        assert mask is not None
        logits = model(torch.tensor(tokens[:-1])[None], torch.tensor([label]), key_mask=mask).logits[0].double()
        surprises += (-logits.log_softmax(-1)[range(9), tokens]).tolist()
    found = validation_loss(model, TokenStore(folder), masks=masks, batch_size=4)
    assert found == pytest.approx(sum(surprises) / (7 * 9), rel=1e-5)
    assert found != pytest.approx(validation_loss(model, TokenStore(folder)), rel=1e-4)


def test_the_batch_size_changes_nothing(written: tuple[Path, np.ndarray, np.ndarray]) -> None:
    store, model = TokenStore(written[0]), random_model()
    expected = validation_loss(model, store)
    for batch_size in (1, 2, 3, 7, 100):  # 2 and 3 leave a smaller last batch
        told: list[int] = []
        loss = validation_loss(model, store, batch_size=batch_size, advance=told.append)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert (sum(told), max(told)) == (7, min(7, batch_size))


@pytest.mark.parametrize(("images", "chosen"), [(1, [0]), (3, [0, 3, 6]), (7, range(7)), (100, range(7))])
def test_some_of_the_images_are_taken_from_all_over_the_store(
    written: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path, images: int, chosen: list[int]
) -> None:
    _, codes, labels = written
    those = write_store(tmp_path / "those", codes[chosen][:, 1:2], labels[chosen], vocab_size=11, num_classes=3)
    model = random_model()
    expected = validation_loss(model, TokenStore(those))
    assert validation_loss(model, TokenStore(written[0]), images=images, batch_size=2) == pytest.approx(
        expected, rel=1e-5
    )


def test_an_untrained_model_guesses_evenly(written: tuple[Path, np.ndarray, np.ndarray]) -> None:
    assert validation_loss(Transformer(TINY).eval(), TokenStore(written[0])) == pytest.approx(math.log(11), rel=1e-6)


def test_a_store_of_another_codebook_is_refused(tmp_path: Path) -> None:
    folder, _, _ = random_store(tmp_path / "tokens", images=2, grid=3, vocab_size=12)
    with pytest.raises(UserError, match="12 tokens in the codebook, the model 11"):
        validation_loss(random_model(), TokenStore(folder))
