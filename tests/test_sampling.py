"""What is drawn: the right labels, the right settings, and images that depend on their own seed, number and label alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from st_ar.config import ModelConfig, SampleSettings
from st_ar.data.text import TextStore, write_text
from st_ar.errors import UserError
from st_ar.model.generate import generate
from st_ar.model.transformer import Transformer
from st_ar.presets import PRESETS
from st_ar.randomness import Purpose, torch_seed
from st_ar.sampling import Sampler, choose_conditions, choose_labels, sample_images
from tests.small_line import random_tokenizer
from tests.toys import TINY, TINY_TEXT, random_captions, random_model

# Labels


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 5))
def test_balanced_labels_take_the_classes_in_turn(num: int, num_classes: int, seed: int) -> None:
    expected = [index % num_classes for index in range(num)]
    assert choose_labels(num, num_classes, seed, mode="balanced") == expected


def test_chosen_classes_come_in_the_order_given() -> None:
    assert choose_labels(5, 9, 0, mode="balanced", only=(7, 2)) == [7, 2, 7, 2, 7]


def test_random_labels_are_even_and_a_function_of_the_seed() -> None:
    labels = choose_labels(3000, 3, 0, mode="random")
    assert labels == choose_labels(3000, 3, 0, mode="random")
    assert labels != choose_labels(3000, 3, 1, mode="random")
    assert np.bincount(labels).tolist() == pytest.approx([1000] * 3, abs=110)  # 4 standard deviations
    assert set(choose_labels(100, 9, 0, mode="random", only=(7, 2))) == {2, 7}


@pytest.mark.parametrize("mode", ["balanced", "random"])
@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_that_the_model_does_not_know_is_refused(mode: str, label: int) -> None:
    with pytest.raises(UserError, match=f"--labels {label} is out of range: the model knows classes 0 to 2"):
        choose_labels(4, 3, 0, mode=mode, only=(0, label))  # 3 would be the null class


@pytest.mark.parametrize("num", [0, -5])
def test_no_images_are_refused(num: int) -> None:
    with pytest.raises(UserError, match=f"--num must be at least 1, not {num}"):
        choose_labels(num, 3, 0, mode="balanced")


@given(per_class=st.integers(1, 6), num_classes=st.integers(1, 7))
def test_per_class_draws_so_many_of_each(per_class: int, num_classes: int) -> None:
    config = replace(TINY, num_classes=num_classes)
    labels = choose_conditions(config, None, None, 0, mode="balanced", per_class=per_class)
    assert labels == [*range(num_classes)] * per_class


def test_per_class_counts_a_class_that_is_named_twice_once() -> None:
    labels = choose_conditions(TINY, None, None, 0, mode="balanced", labels=(2, 0, 2), per_class=2)
    assert labels == [2, 0, 2, 0]


def test_per_class_contradicts_a_number_and_random_classes() -> None:
    with pytest.raises(UserError, match="give --num or --per-class, not both"):
        choose_conditions(TINY, None, 9, 0, mode="balanced", per_class=3)
    with pytest.raises(UserError, match="leave out --label-mode random, or give --num"):
        choose_conditions(TINY, None, None, 0, mode="random", per_class=3)
    with pytest.raises(UserError, match="--per-class must be at least 1, not 0"):
        choose_conditions(TINY, None, None, 0, mode="balanced", per_class=0)


# Guidance of a model


@pytest.mark.parametrize(
    ("preset", "scale"),
    [
        ("llamagen-b", 2.0),
        ("st-ar-b", 2.0),
        ("llamagen-l", 2.0),
        ("llamagen-xl", 1.75),
        ("llamagen-xxl", 1.75),
        ("llamagen-3b", 1.65),
        ("llamagen-photos", 1.0),
        ("st-ar-digits", 1.0),
        ("llamagen-xl-t2i", 1.0),
    ],
)
def test_a_models_published_guidance_is_its_default(preset: str, scale: float) -> None:
    config = PRESETS[preset]().model
    settings = SampleSettings(seed=3, top_k=5)
    assert settings.resolved(config) == replace(settings, cfg_scale=scale)
    given = replace(settings, cfg_scale=1.25)
    assert given.resolved(config) == given


def test_the_default_guidance_is_used() -> None:
    config = ModelConfig(
        dim=768,
        n_layers=12,
        n_heads=12,
        vocab_size=11,
        grid=2,
        num_classes=3,
        token_dropout=0.0,
        residual_dropout=0.0,
        ffn_dropout=0.0,
    )
    with torch.device("meta"):
        model = Transformer(config)
    sampler = Sampler(model, random_tokenizer(), SampleSettings())
    assert sampler.settings.cfg_scale == 2.0
    toy = sample_images(random_model(), random_tokenizer(), [0, 1])
    np.testing.assert_array_equal(
        toy, sample_images(random_model(), random_tokenizer(), [0, 1], SampleSettings(cfg_scale=1.0))
    )


# Images


def test_steps_show_the_tokens_so_far_and_end_with_them_all() -> None:
    labels = [2, 0, 1, 1]
    sampler = Sampler(random_model(), random_tokenizer(), SampleSettings(seed=3))
    whole = sampler.tokens(range(1, 4), labels)
    assert [tokens.tolist() for tokens in sampler.steps(range(1, 4), labels)] == [
        whole[:, :drawn].tolist() for drawn in range(1, 10)
    ]
    told: list[int] = []
    assert torch.equal(sampler.tokens(range(1, 4), labels, told.append), whole)
    assert (len(told), sum(told)) == (9, 3)


def painted(codes: torch.Tensor) -> np.ndarray:
    """Pictures of codes [B, 9], pixel by pixel: ADM's clamp(127.5 x + 128), truncated."""
    codebook = random_tokenizer().codebook.double().numpy().reshape(11, 3, 2, 2)
    pictures = np.zeros((len(codes), 6, 6, 3), np.uint8)
    for picture, image in zip(pictures, codes.tolist(), strict=True):
        for row in range(6):
            for column in range(6):
                patch = codebook[image[3 * (row // 2) + column // 2]]
                picture[row, column] = np.clip(127.5 * patch[:, row % 2, column % 2] + 128, 0, 255).astype(np.uint8)
    return pictures


SETTINGS = SampleSettings(seed=4, temperature=0.8, top_k=7, cfg_scale=2.0, cfg_schedule="power-cosine", cfg_power=2.0)
LABELS = [0, 1, 2, 0, 1, 1, 2, 0]


def test_pictures_are_the_tokens_painted() -> None:
    model = random_model()
    tokens = generate(
        model,
        torch.tensor(LABELS),
        seed=torch_seed(4, Purpose.SAMPLING),
        temperature=0.8,
        top_k=7,
        cfg_scale=2.0,
        cfg_schedule="power-cosine",
        cfg_power=2.0,
    )
    images = sample_images(model, random_tokenizer(), LABELS, SETTINGS)
    assert images.dtype == np.uint8
    # One level is the rounding of float32 before the truncation.
    assert np.abs(images.astype(int) - painted(tokens).astype(int)).max() <= 1


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_images_are_the_same_in_batches_of_any_size(batch_size: int) -> None:
    model, tokenizer = random_model(), random_tokenizer()
    images = sample_images(model, tokenizer, LABELS, SETTINGS)
    np.testing.assert_array_equal(sample_images(model, tokenizer, LABELS, SETTINGS, batch_size=batch_size), images)


@pytest.mark.parametrize("count", [1, 5, 9, 23])
def test_images_are_told_token_by_token(count: int) -> None:
    told: list[int] = []
    sampler = Sampler(random_model(), random_tokenizer(), SETTINGS)
    sampler.tokens(range(count), [0] * count, told.append)
    assert len(told) == TINY.sequence_length
    assert np.cumsum(told).tolist() == [count * drawn // 9 for drawn in range(1, 10)]


def test_pictures_are_painted_a_few_at_a_time() -> None:
    sampler, some = Sampler(random_model(), random_tokenizer(), SETTINGS), list[int]()
    tokens = torch.arange(40 * 9).view(40, 9) % 11
    pictures = sampler.pictures(tokens, lambda: some.append(1))
    assert len(some) == 3
    assert np.abs(pictures.astype(int) - painted(tokens).astype(int)).max() <= 1


def test_compiled_steps_draw_the_same_images() -> None:
    model, tokenizer = random_model(), random_tokenizer()
    sampler = Sampler(model, tokenizer, SETTINGS, compiled=True)
    drawn = sampler.pictures(sampler.tokens(range(8), LABELS))
    np.testing.assert_array_equal(drawn, sample_images(model, tokenizer, LABELS, SETTINGS))


def test_an_image_depends_on_its_own_number_and_label_alone() -> None:
    model, tokenizer = random_model(), random_tokenizer()
    sampler = Sampler(model, tokenizer, SETTINGS)
    images = sample_images(model, tokenizer, LABELS, SETTINGS)
    order = [5, 0, 7, 2]
    np.testing.assert_array_equal(sampler.pictures(sampler.tokens(order, LABELS)), images[order])
    np.testing.assert_array_equal(sample_images(model, tokenizer, LABELS[:3], SETTINGS), images[:3])
    others = [2, 2, 2, *LABELS[3:5], 0, *LABELS[6:]]
    changed = sample_images(model, tokenizer, others, SETTINGS)
    same = [n for n in range(8) if others[n] == LABELS[n]]
    np.testing.assert_array_equal(changed[same], images[same])
    assert all((changed[n] != images[n]).any() for n in range(8) if n not in same)
    assert len(np.unique(images.reshape(8, -1), axis=0)) == 8


def test_images_of_captions_depend_on_their_own_number_and_caption_alone(tmp_path: Path) -> None:
    rows = [row[row.any(-1)] for row in random_captions(TINY_TEXT, [1, 5, 3, 2])]
    write_text(tmp_path / "text.safetensors", rows)
    store, model, tokenizer = TextStore(tmp_path / "text.safetensors"), random_model(TINY_TEXT), random_tokenizer()
    captions, settings = [0, 1, 2, 3, 0, 1, 2], SampleSettings(seed=1, cfg_scale=1.5)
    images = sample_images(model, tokenizer, captions, settings, store)
    for batch_size in (1, 3):
        again = sample_images(model, tokenizer, captions, settings, store, batch_size=batch_size)
        np.testing.assert_array_equal(again, images)
    features = store.features(np.array(captions), TINY_TEXT.text_tokens)
    tokens = generate(model, features, seed=torch_seed(1, Purpose.SAMPLING), cfg_scale=1.5)
    assert np.abs(images.astype(int) - painted(tokens).astype(int)).max() <= 1
    assert (images[0] != images[4]).any()  # the same caption
    with pytest.raises(UserError, match="4"):
        sample_images(model, tokenizer, [0, 4], settings, store)


def test_a_seed_gives_the_same_images_and_another_seed_others() -> None:
    model, tokenizer, labels = random_model(), random_tokenizer(), [0, 1, 2]
    first = sample_images(model, tokenizer, labels, SampleSettings(seed=0))
    torch.rand(7)  # the global generator has no part in it
    np.testing.assert_array_equal(sample_images(model, tokenizer, labels, SampleSettings(seed=0)), first)
    assert not np.array_equal(sample_images(model, tokenizer, labels, SampleSettings(seed=1)), first)


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_the_likeliest_token_alone_is_greedy_sampling(cfg_scale: float) -> None:
    model, labels = random_model(), [2, 0]
    images = sample_images(model, random_tokenizer(), labels, SampleSettings(top_k=1, cfg_scale=cfg_scale))
    tokens = generate(model, torch.tensor(labels), greedy=True, cfg_scale=cfg_scale)
    assert np.abs(images.astype(int) - painted(tokens).astype(int)).max() <= 1


def test_a_tokenizer_of_another_codebook_is_refused() -> None:
    with pytest.raises(UserError, match="the tokenizer has 12 codes, the model 11"):
        sample_images(random_model(), random_tokenizer(12), [0])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="temperature must be above 0, not 0"):
        sample_images(random_model(), random_tokenizer(), [0], SampleSettings(temperature=0.0))
    with pytest.raises(UserError, match="label 9 is out of range"):
        sample_images(random_model(), random_tokenizer(), [9])


def test_guidance_without_end_is_refused() -> None:
    with pytest.raises(UserError, match="cfg-scale must be a finite number"):  # it makes NaN of the logits
        sample_images(random_model(), random_tokenizer(), [0], SampleSettings(cfg_scale=float("inf")))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_no_images_is_refused(batch_size: int) -> None:
    with pytest.raises(UserError, match=f"--batch-size must be at least 1, not {batch_size}"):
        sample_images(random_model(), random_tokenizer(), [0], batch_size=batch_size)


def test_no_labels_are_refused() -> None:
    with pytest.raises(UserError, match="no labels were given"):
        sample_images(random_model(), random_tokenizer(), [])
