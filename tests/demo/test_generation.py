"""Drawing for the page: previews that grow, images that the command line would draw, and what is refused."""

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from st_ar.config import SampleSettings
from st_ar.demo import generation
from st_ar.demo.generation import (
    PNG_KEY,
    Frame,
    GenerationRecord,
    PreviewDecoder,
    WeightsRecord,
    choose_labels,
    compare_images,
    generate_frames,
    match_weights,
    preview_delay,
    read_record,
    to_png,
)
from st_ar.demo.models import ModelPool
from st_ar.demo.setup import Setup
from st_ar.errors import UserError
from st_ar.files import sha256
from st_ar.model.weights import load_model
from st_ar.sampling import sample_images
from st_ar.settings import to_dict
from st_ar.tokenizer import load_tokenizer, to_uint8
from st_ar.tokenizer.vq import VQTokenizer
from tests.demo.small_page import export, small_setup
from tests.tokenizer.test_vq import SMALL, random_tensors
from tests.toys import TINY, random_model, save_export

SETTINGS = SampleSettings(cfg_scale=2.0, top_k=9, temperature=0.9, seed=4)


@pytest.fixture
def every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preview at each of them."""
    monkeypatch.setattr(generation, "preview_delay", lambda _: 0.0)


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    with small_setup(tmp_path) as (found, _):
        yield found


def last(setup: Setup, *names: str, labels: list[int], settings: SampleSettings = SETTINGS) -> list[Frame]:
    return [*generate_frames(setup.pool, names, labels, settings)][-1]


def test_the_page_draws_what_the_command_draws(setup: Setup, tmp_path: Path) -> None:
    [frame] = last(setup, "first", labels=[0, 1, 2, 0])
    expected = sample_images(
        load_model(tmp_path / "first"), load_tokenizer(tmp_path / "tokenizer"), [0, 1, 2, 0], SETTINGS
    )
    np.testing.assert_array_equal(frame.images, expected)
    assert frame.tokens is not None
    assert frame.tokens.shape == (4, 9)
    ema = last(setup, "first (EMA)", labels=[0, 1, 2, 0])[0]
    np.testing.assert_array_equal(
        ema.images,
        sample_images(
            load_model(tmp_path / "first", ema=True), load_tokenizer(tmp_path / "tokenizer"), [0, 1, 2, 0], SETTINGS
        ),
    )


@pytest.mark.usefixtures("every_token")
def test_previews_show_the_tokens_that_are_drawn_and_nothing_of_the_others(setup: Setup) -> None:
    frames = [frame for [frame] in generate_frames(setup.pool, ["first"], [0, 1], SETTINGS)]
    assert [frame.done for frame in frames] == [*range(1, 10)]
    whole = frames[-1].images
    for frame in frames[:-1]:
        assert (frame.tokens, frame.records, frame.total) == (None, (), 9)
        visible = frame.images[..., 3] == 255
        token = np.arange(9).reshape(3, 3).repeat(2, 0).repeat(2, 1)
        np.testing.assert_array_equal(visible, np.broadcast_to(token < frame.done, (2, 6, 6)))
        np.testing.assert_array_equal(frame.images[..., :3][visible], whole[visible])


@pytest.mark.usefixtures("every_token")
def test_previews_are_painted_in_the_type_that_draws_and_whole_images_exactly(tmp_path: Path) -> None:
    tokenizer = VQTokenizer(SMALL, random_tensors())
    tokenizer.save(tmp_path / "tokenizer")
    config = replace(TINY, vocab_size=SMALL.codebook_size)
    save_export(tmp_path / "model", random_model(config, 1), random_model(config, 2), {"step": 1, "preset": "toy"})
    pool = ModelPool([tmp_path / "model"], tmp_path / "tokenizer", device="cpu", dtype="bfloat16")
    *before, [whole] = generate_frames(pool, ["model"], [0, 1], SETTINGS)
    pool.close()
    assert whole.tokens is not None
    codes = whole.tokens.view(2, 3, 3)
    np.testing.assert_array_equal(whole.images, to_uint8(tokenizer.decode(codes)).numpy())
    near = tokenizer.to(torch.device("cpu"), torch.bfloat16)
    codes[:, 2, 2] = 0  # the last preview lacks the last token, and has code 0 in its place
    for row, drawn in enumerate((2, 5, 8)):
        sofar = torch.where(torch.arange(9).view(3, 3) < drawn, codes, 0)[:, : row + 1]
        expected = to_uint8(near.decode(sofar)).numpy()[:, 2 * row :]
        np.testing.assert_array_equal(before[drawn - 1][0].images[:, 2 * row : 2 * row + 2, :, :3], expected)


def test_a_preview_paints_two_rows_above_the_new_ones_with_them() -> None:
    tokenizer, codes = VQTokenizer(SMALL, random_tensors()), torch.arange(2 * 36).view(2, 36) % SMALL.codebook_size
    preview = PreviewDecoder(tokenizer, 6)
    preview.decode(codes[:, :19])
    found = preview.decode(codes[:, :27])  # rows 3 and 4 are new, and are painted with rows 1 and 2
    sofar = torch.where(torch.arange(30).view(5, 6) < 27, codes[:, :30].unflatten(1, (5, 6)), 0)
    expected = to_uint8(tokenizer.decode(sofar[:, 1:])).numpy()[:, 4:]
    np.testing.assert_array_equal(found[:, 6:10, :, :3], expected)
    np.testing.assert_array_equal(found[:, ::2, ::2, 3].reshape(2, 36) == 255, (torch.arange(36) < 27).expand(2, 36))


def test_two_models_draw_with_the_same_numbers_side_by_side(setup: Setup) -> None:
    both = last(setup, "first", "second", labels=[0, 1])
    for name, frame in zip(("first", "second"), both, strict=True):
        np.testing.assert_array_equal(frame.images, last(setup, name, labels=[0, 1])[0].images)
    assert not np.array_equal(both[0].images, both[1].images)


def test_another_seed_and_another_setting_draw_otherwise_with_the_same_memory(setup: Setup) -> None:
    first = last(setup, "first", labels=[0, 1])[0].images
    opened = setup.pool.run(lambda: setup.pool.open("first"))
    assert opened.sampler is not None
    token_sampler = opened.sampler.token_sampler
    other = last(
        setup, "first", labels=[0, 1], settings=SampleSettings(cfg_scale=2.0, top_k=9, temperature=0.9, seed=5)
    )
    assert opened.sampler.token_sampler is token_sampler
    assert not np.array_equal(first, other[0].images)
    last(setup, "first", labels=[0, 1], settings=SampleSettings(cfg_scale=3.0, seed=4))
    assert opened.sampler.token_sampler is not token_sampler
    np.testing.assert_array_equal(last(setup, "first", labels=[0, 1])[0].images, first)


@pytest.mark.usefixtures("every_token")
def test_a_drawing_that_is_left_ends_and_the_next_one_is_whole(setup: Setup) -> None:
    expected = last(setup, "first", labels=[0, 1])[0].images
    left = generate_frames(setup.pool, ["first"], [1, 0], SETTINGS)
    assert next(left)[0].done == 1
    left.close()
    assert [*left] == []
    np.testing.assert_array_equal(last(setup, "first", labels=[0, 1])[0].images, expected)


def test_an_image_is_drawn_again_from_its_file_bit_for_bit(setup: Setup) -> None:
    [frame] = last(setup, "second (EMA)", labels=[2, 0, 1])
    data = to_png(frame.images[2], frame.records[2])
    record = read_record(data)
    assert record == frame.records[2]
    assert (record.number, record.class_name, record.settings) == (2, "bee", SETTINGS)
    name = setup.pool.run(lambda: match_weights(setup.pool, record))
    assert name == "second (EMA)"
    assert record.weights.sha256 == sha256(setup.pool.find(name).source)
    [again] = last(setup, name, labels=list(record.labels), settings=record.settings)
    assert compare_images(again.images[2], frame.images[2], record, setup.pool) == "The same image, bit for bit."


def test_a_picture_that_was_changed_or_drawn_elsewhere_is_said_to_differ(setup: Setup) -> None:
    [frame] = last(setup, "first", labels=[0])
    changed, record = frame.images[0].copy(), frame.records[0]
    changed[0, :2] ^= 1
    said = compare_images(frame.images[0], changed, record, setup.pool)
    assert said == "2 of 36 pixels differ: the image was changed after it was saved."
    elsewhere = GenerationRecord(**{**vars(record), "threads": record.threads + 1})
    said = compare_images(frame.images[0], changed, elsewhere, setup.pool)
    assert said == f"2 of 36 pixels differ: threads was {record.threads + 1}, now {record.threads}."
    said = compare_images(frame.images[0], changed[:4], record, setup.pool)
    assert said.startswith("The saved image has another size")


def test_other_weights_tokenizers_and_types_than_the_files_are_named(setup: Setup, tmp_path: Path) -> None:
    [frame] = last(setup, "first", labels=[0])
    record = frame.records[0]
    other = ModelPool([export(tmp_path / "third", TINY, 30)], tmp_path / "tokenizer", device="cpu", dtype="float32")
    half = ModelPool([tmp_path / "first"], tmp_path / "tokenizer", device="cpu", dtype="bfloat16")
    try:
        with pytest.raises(
            UserError, match=r"generated with live weights of step 10 .* start the demo with their --model"
        ):
            match_weights(other, record)
        with pytest.raises(UserError, match="generated in float32, the demo uses bfloat16"):
            match_weights(half, record)
        with pytest.raises(UserError, match="decoded by tokenizer abc, the demo has"):
            match_weights(other, GenerationRecord(**{**vars(record), "tokenizer": "abc"}))
    finally:
        other.close()
        half.close()


def test_labels_are_the_chosen_classes_in_turn() -> None:
    assert choose_labels([2, 0], 5, 3) == [2, 0, 2, 0, 2]
    assert choose_labels([1], 1, 3) == [1]


@pytest.mark.parametrize(
    ("classes", "count", "match"),
    [
        ([], 4, "no class is chosen"),
        ([3], 4, "there is no class 3: the model has classes 0 to 2"),
        ([-1], 4, "there is no class -1"),
        (["ant"], 4, "there is no class ant"),
        ([True], 4, "there is no class True"),
    ],
)
def test_classes_and_counts_out_of_range_are_refused(classes: list[Any], count: int, match: str) -> None:
    with pytest.raises(UserError, match=match):
        choose_labels(classes, count, 3)


def test_names_and_labels_that_are_not_there_are_refused(setup: Setup) -> None:
    with pytest.raises(UserError, match="no weights are called 'third': choose one of first, second, first"):
        generate_frames(setup.pool, ["third"], [0], SETTINGS)
    with pytest.raises(UserError, match="both sides have the same weights"):
        generate_frames(setup.pool, ["first", "first"], [0], SETTINGS)
    with pytest.raises(UserError, match="label 9 is out of range"):
        last(setup, "first", labels=[9])
    with pytest.raises(UserError, match="top-k must lie in"):
        last(setup, "first", labels=[0], settings=SampleSettings(top_k=12))


def test_previews_take_a_quarter_of_the_time_and_come_12_times_a_second_at_most() -> None:
    assert preview_delay(1.0) == pytest.approx(3.0)
    assert preview_delay(0.0) == pytest.approx(1 / 12)


def test_all_work_of_the_models_is_done_in_one_thread(setup: Setup) -> None:
    import threading

    names = {setup.pool.run(lambda: threading.current_thread().name) for _ in range(3)}
    assert len(names) == 1
    assert names.pop().startswith("models")
    assert torch.is_grad_enabled()


RECORD = GenerationRecord(
    weights=WeightsRecord(file="model.safetensors", sha256="ab" * 32, ema=False, step=7),
    tokenizer="cd" * 32,
    settings=SampleSettings(cfg_scale=1.75, cfg_schedule="linear", top_k=3, top_p=0.9, temperature=0.8, seed=2**53 - 1),
    labels=(2, 0, 2),
    number=1,
    class_name="Straße <b>",
    dtype="bfloat16",
    device="cpu",
    threads=2,
    torch="2.13.0",
)
PICTURE = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)


def png(said: str | None) -> bytes:
    info = PngInfo()
    if said is not None:
        info.add_text(PNG_KEY, said)
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def changed(**values: Any) -> str:
    return json.dumps({**to_dict(RECORD), **values})


def test_a_file_gives_its_picture_and_its_recipe_back() -> None:
    data = to_png(PICTURE, RECORD)
    assert read_record(data) == RECORD
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), PICTURE)
    assert json.loads(Image.open(io.BytesIO(data)).info["st-ar"])["settings"]["cfg_scale"] == 1.75


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not a PNG"),
        (b"GIF89a", "not a PNG"),
        (to_png(PICTURE, RECORD)[:60], "has no record|not a PNG"),
        (png(None), "has no record of its settings"),
        (png("{"), "the record in this PNG is damaged"),
        (png("[" * 100_000), "the record in this PNG is damaged"),
        (png("[]"), "the settings of GenerationRecord are not a JSON object"),
        (png("{}"), r"settings \[.*'labels'.*\] are missing"),
        (png(changed(more=1)), r"unknown settings \['more'\]"),
        (png(changed(format_version=2)), "format_version 2 is not 1"),
        (png(changed(labels=[])), "there are 0 labels, not 1 to 16"),
        (png(changed(labels=[0] * 17)), "there are 17 labels, not 1 to 16"),
        (png(changed(labels=["a", "b"])), "labels must be"),
        (png(changed(labels=[-1, 0])), "label -1 is below 0"),
        (png(changed(number=3)), "number 3 is not one of 3 images"),
        (png(changed(number=True)), "number must be a whole number"),
        (png(changed(settings={"temperature": 0})), r"--temperature must lie in \[0.001, 1000\]"),
        (png(changed(settings={"seed": 2**70})), "seed must be a whole number"),
        (png(changed(weights={"file": "a", "sha256": "b", "ema": 1, "step": 0})), "weights.ema must be true or false"),
    ],
)
def test_other_files_are_refused_in_words(data: bytes, match: str) -> None:
    with pytest.raises(UserError, match=match):
        read_record(data)


def test_a_text_chunk_that_unpacks_to_gigabytes_is_refused() -> None:
    import struct
    import zlib

    bomb = zlib.compress(b"a" * (64 << 20), 9)
    body = b"st-ar\0\0" + bomb
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    data = png(None)
    with pytest.raises(UserError, match=r"not a PNG, or it is damaged|has no record"):
        read_record(data[:33] + chunk + data[33:])


@given(place=st.integers(0, 2000), value=st.integers(0, 255))
def test_a_damaged_byte_never_gives_another_recipe(place: int, value: int) -> None:
    data = bytearray(to_png(PICTURE, RECORD))
    data[place % len(data)] = value
    with contextlib.suppress(UserError):
        assert read_record(bytes(data)) == RECORD
