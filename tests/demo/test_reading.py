"""What the page says of a model that reads an image: attention, entropy and guesses, by other ways to compute them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from st_ar.data.store import TokenStore
from st_ar.demo import reading
from st_ar.demo.models import ModelPool
from st_ar.demo.reading import NO_CLASS, OWN_CLASS, ClassProbe, Reading, choose_label, read_tokens
from st_ar.demo.setup import CACHED_READINGS, DemoImage, Setup
from st_ar.errors import UserError
from st_ar.evaluation.attention import attention_maps, center_crops
from st_ar.evaluation.probe_features import uniform_steps
from st_ar.model.weights import load_model
from tests.demo.small_page import export, small_setup
from tests.toys import TINY


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    with small_setup(tmp_path) as (found, _):
        yield found


def seen(setup: Setup, image: int = 1) -> DemoImage:
    return setup.from_store(image)


def test_a_reading_is_the_models_attention_and_likelihood(setup: Setup, tmp_path: Path) -> None:
    image = seen(setup)
    assert (image.title, image.label) == ("image 1 of the store: bee", 1)
    found = setup.read("second", image, 1)
    model = load_model(tmp_path / "second")
    tokens, labels = image.tokens[None], torch.tensor([1])
    maps = attention_maps(model, tokens[:, :-1], labels, layers=range(1, 5))
    assert found.attention.shape == (4, 2, 9, 9)
    for layer in range(1, 5):
        np.testing.assert_allclose(found.attention[layer - 1], maps[layer][0].numpy(), atol=1e-3)
    with torch.no_grad():
        chances = model(tokens[:, :-1], labels).logits[0].double().softmax(-1)
    for place, token in enumerate(image.tokens.tolist()):
        row = chances[place]
        assert found.entropy[place] == pytest.approx(-(row * row.log()).sum().item(), rel=1e-4)
        assert found.probability[place] == pytest.approx(row[token].item(), rel=1e-4)
        assert found.rank[place] == (row > row[token]).sum().item()


def test_a_class_none_and_another_model_are_other_readings_and_few_are_kept(setup: Setup) -> None:
    image = seen(setup)
    first = setup.read("first", image, 1)
    assert setup.read("first", image, 1) is first
    assert not np.array_equal(setup.read("first", image, TINY.null_class).entropy, first.entropy)
    assert not np.array_equal(setup.read("second", image, 1).entropy, first.entropy)
    for other in range(2, 2 + CACHED_READINGS):
        setup.read("first", seen(setup, other), 0)
    assert setup.read_cached.cache_info().currsize == CACHED_READINGS
    assert setup.read("first", image, 1) is not first


def test_images_of_other_models_and_classes_that_are_not_there_are_refused(setup: Setup) -> None:
    image = seen(setup)
    opened = setup.pool.open("first")
    with pytest.raises(UserError, match="first reads 9 tokens of 11 codes, and the image has others"):
        read_tokens(opened, image.tokens[:8], 0)
    with pytest.raises(UserError, match="first reads 9 tokens of 11 codes"):
        read_tokens(opened, image.tokens + 11, 0)
    with pytest.raises(UserError, match="label 4 is out of range"):
        setup.read("first", image, 4)
    with pytest.raises(UserError, match="has no image 8: choose 0 to 7"):
        setup.from_store(8)
    with pytest.raises(UserError, match="no weights are called 'x'"):
        setup.read("x", image, 0)


def test_the_class_that_a_model_is_given() -> None:
    assert [choose_label(choice, 1, 3, has_null_class=True) for choice in (OWN_CLASS, NO_CLASS, 0, 2)] == [1, 3, 0, 2]
    assert choose_label(OWN_CLASS, None, 3, has_null_class=True) == 3
    assert choose_label(OWN_CLASS, 1, 3, has_null_class=False) == 1
    with pytest.raises(UserError, match="has no null class: choose a class"):
        choose_label(OWN_CLASS, None, 3, has_null_class=False)
    with pytest.raises(UserError, match="the class must be a whole number from -2 to 2, not 3"):
        choose_label(3, 1, 3, has_null_class=True)
    with pytest.raises(UserError, match="the class must be a whole number"):
        choose_label("bee", 1, 3, has_null_class=True)


def test_guesses_are_those_of_scikit_learns_ridge_regression(setup: Setup) -> None:
    from sklearn.linear_model import RidgeClassifier
    from sklearn.preprocessing import StandardScaler

    image = seen(setup, 2)
    told = [*setup.predict("first", image)]
    assert (told[0].fitted, told[0].total, told[0].by_step) == (0, 8, ())
    assert [*setup.predict("first", image)] == told[-1:]  # fitted once
    store = setup.store
    assert store is not None
    model, steps = setup.pool.loaded["first"].network, uniform_steps(9)
    tokens, labels = center_crops(store, range(8))
    with torch.no_grad():
        states = model.features(tokens[:, :-1], model.null_condition(8), layers=[2])[2].numpy()
    assert [read for read, _ in told[-1].by_step] == [step - 1 for step in steps]
    for step, (_, names) in zip(steps, told[-1].by_step, strict=True):
        scaler = StandardScaler().fit(states[:, step - 1])
        ridge = RidgeClassifier(solver="cholesky").fit(scaler.transform(states[:, step - 1]), labels.numpy())
        scores = ridge.decision_function(scaler.transform(states[2:3, step - 1]))[0]
        assert list(names) == [store.meta.class_names[c] for c in np.argsort(-scores)]


def test_a_fit_that_is_left_is_begun_anew(setup: Setup) -> None:
    left = setup.predict("first", seen(setup))
    next(left)
    left.close()
    assert setup.probes == {}
    assert [*setup.predict("first", seen(setup))][-1].by_step


def test_a_store_without_a_recorded_tokenizer_has_probes_too(setup: Setup, tmp_path: Path) -> None:
    meta = tmp_path / "tokens" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"tokenizer": ""}))
    found = Setup(pool=setup.pool, probe_store=TokenStore(tmp_path / "tokens"))
    assert [*found.predict("first", seen(setup))][-1].by_step


def test_what_no_probe_can_be_fitted_on_is_refused(setup: Setup, tmp_path: Path) -> None:
    image = seen(setup)
    setup.probe_store = None
    with pytest.raises(UserError, match="start it with --probe-tokens STORE"):
        [*setup.predict("first", image)]
    store = TokenStore(tmp_path / "tokens")
    store.labels[:] = 1
    with pytest.raises(UserError, match="images of one class only"):
        ClassProbe(setup.pool.open("first"), store, 8)


def test_a_model_without_a_null_class_is_probed_by_none(tmp_path: Path) -> None:
    with small_setup(tmp_path) as (setup, line):
        card = export(tmp_path / "sure", TINY, 1) / "config.json"
        card.write_text(json.dumps(json.loads(card.read_text()) | {"class_dropout": 0.0}))
        pool = ModelPool([tmp_path / "sure"], line.tokenizer, device="cpu")
        assert setup.store is not None
        try:
            with pytest.raises(UserError, match="--class-dropout 0 and has no null class"):
                ClassProbe(pool.open("sure"), setup.store, 8)
        finally:
            pool.close()


def test_an_upload_becomes_the_tokens_of_its_centre(setup: Setup) -> None:
    import io

    from PIL import Image

    codebook = setup.pool.tokenizer.decode(torch.arange(9).view(1, 3, 3))
    pixels = ((codebook[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(file, format="PNG")
    found = setup.from_upload(file.getvalue(), "first")
    assert (found.label, found.title.endswith(", whose class is unknown")) == (None, True)
    assert found.tokens.tolist() == [*range(9)]


PICTURE = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)


@given(grid=st.integers(1, 40), row=st.integers(0, 39), column=st.integers(0, 39))
def test_a_click_inside_a_token_is_that_token(grid: int, row: int, column: int) -> None:
    row, column = row % grid, column % grid
    side = reading.enlarge(np.zeros((2 * grid, 2 * grid, 3), np.uint8), grid).shape[0]
    cell = side / grid
    assert cell == side // grid
    for place in (0.01, 0.5, 0.99):
        x, y = int((column + place) * cell), int((row + place) * cell)
        assert reading.token_at(x, y, grid) == row * grid + column


def test_a_click_outside_is_the_nearest_token() -> None:
    assert reading.token_at(-5, 10**6, 3) == 6
    assert reading.token_at(10**6, 10**6, 3) == 8


def test_the_enlarged_picture_keeps_its_pixels() -> None:
    large = reading.enlarge(PICTURE, 3)
    assert large.shape[0] >= reading.SIDE
    centres = ((np.arange(12) + 0.5) * large.shape[0] / 12).astype(int)
    np.testing.assert_array_equal(large[centres][:, centres], PICTURE)


def at(picture: np.ndarray, token: int, grid: int = 3) -> np.ndarray:
    """The middle pixel of a token."""
    cell = picture.shape[0] // grid
    return picture[token // grid * cell + cell // 2, token % grid * cell + cell // 2].astype(int)


@pytest.mark.parametrize("token", [0, 1, 5, 8])
def test_attention_shows_the_past_and_leaves_the_future_blank(token: int) -> None:
    weights = np.array([0.5, *np.linspace(0.01, 0.2, 8)])
    shown = reading.render_attention(PICTURE, weights, 3, token)
    for place in range(9):
        assert at(shown, place)[3] == (255 if place < token else 0)
    cell = shown.shape[0] // 3
    corner = shown[token // 3 * cell, token % 3 * cell]
    assert tuple(corner) == (*reading.TARGET, 255)
    if token > 2:
        flat = reading.render_attention(np.full_like(PICTURE, 90), weights, 3, token)
        assert at(flat, token - 1)[:3].sum() > at(flat, 0)[:3].sum()


def test_entropy_is_brightest_where_it_is_most() -> None:
    entropy = np.arange(9, dtype=np.float32)[::-1] / 9
    shown = reading.render_entropy(np.full_like(PICTURE, 90), entropy, 3, 4)
    light = [int(at(shown, place).sum()) for place in range(9)]
    assert light == sorted(light, reverse=True)
    assert light[0] > light[8] + 100
    reading.render_entropy(PICTURE, np.zeros(9, np.float32), 3, 0)  # of a certain model


def test_the_overview_has_each_head_where_a_click_finds_it() -> None:
    attention = np.zeros((2, 3, 9, 9), np.float16)
    for layer in range(2):
        for head in range(3):
            attention[layer, head, 8, 1 + layer * 3 + head] = 1
    nothing = np.zeros(9, np.float32)
    found = Reading(attention=attention, entropy=nothing, probability=nothing, rank=nothing.astype(np.int64))
    shown = reading.render_heads(found, 3, 8, (2, 1))
    height, width = shown.shape[0] // 2, shown.shape[1] // 3
    assert (height * 2, width * 3) == shown.shape[:2]
    for layer in range(2):
        for head in range(3):
            top, left = layer * height, head * width
            assert reading.head_at(left + width // 2, top + height // 2, 3, 3) == (layer + 1, head + 1)
            inside = shown[
                top + reading.MARGIN : top + height - reading.MARGIN,
                left + reading.MARGIN : left + width - reading.MARGIN,
            ]
            light = [int(at(inside, place).sum()) for place in range(9)]
            assert light.index(max(light)) == layer * 3 + head
            framed = tuple(shown[top, left]) == reading.TARGET
            assert framed == ((layer, head) == (1, 0))
    whole = reading.render_heads(found, 3, 8, (1, None))
    assert [tuple(whole[0, head * width]) == reading.TARGET for head in range(3)] == [True] * 3
