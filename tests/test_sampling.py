"""What is drawn: the right labels, the right settings, and images that depend on their own seed, number and label alone."""

import json
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import st_ar
from st_ar import sampling
from st_ar.cli import main
from st_ar.config import PUBLISHED_SCALES, SampleSettings
from st_ar.data.text import TextStore, write_text
from st_ar.errors import UserError
from st_ar.files import sha256
from st_ar.model.generate import generate
from st_ar.model.weights import open_model
from st_ar.presets import PRESETS
from st_ar.randomness import RandomStream, torch_seed
from st_ar.sampling import JOB, Sampler, SampleWriter, choose_conditions, choose_labels, sample_images, sample_to
from tests.disk import contents, full_disk, refused
from tests.sampling_processes import BATCH, INSTANTS, LABELS, SETTINGS, draw
from tests.small_line import SmallLine, make_line, random_tokenizer
from tests.toys import TINY, TINY_TEXT, random_captions, random_model, save_export

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


def test_a_model_trained_without_class_dropout_is_not_guided() -> None:
    published = replace(TINY, dim=768, n_layers=12, n_heads=12)
    for asked, class_dropout, scale, origin in (
        (None, 0.1, 2.0, "LlamaGen's for this size; --cfg-scale changes it"),
        (None, None, 2.0, "LlamaGen's for this size; --cfg-scale changes it"),
        (None, 0.0, 1.0, "the model was trained with --class-dropout 0"),
        (3.0, 0.1, 3.0, "as given"),
        (1.0, 0.0, 1.0, "as given"),
    ):
        settings = SampleSettings(cfg_scale=asked)
        assert settings.resolved(published, class_dropout).cfg_scale == scale
        assert settings.scale_origin(published, class_dropout) == origin
    with pytest.raises(
        UserError, match=r"--cfg-scale 3.0: the model was trained with --class-dropout 0, so it cannot be guided"
    ):
        SampleSettings(cfg_scale=3.0).resolved(published, 0.0)


def test_the_default_guidance_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = random_model(), random_tokenizer()
    plain = sample_images(model, tokenizer, [0, 1], SampleSettings(cfg_scale=1.0))
    np.testing.assert_array_equal(sample_images(model, tokenizer, [0, 1]), plain)
    monkeypatch.setitem(PUBLISHED_SCALES, (TINY.dim, TINY.n_layers), 2.0)
    assert Sampler(model, tokenizer, SampleSettings()).settings.cfg_scale == 2.0
    guided = sample_images(model, tokenizer, [0, 1], SampleSettings(cfg_scale=2.0))
    np.testing.assert_array_equal(sample_images(model, tokenizer, [0, 1]), guided)


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


SOME_SETTINGS = SampleSettings(
    seed=4, temperature=0.8, top_k=7, cfg_scale=2.0, cfg_schedule="power-cosine", cfg_power=2.0
)
SOME_LABELS = [0, 1, 2, 0, 1, 1, 2, 0]


def test_images_are_the_decoded_tokens() -> None:
    model = random_model()
    tokens = generate(
        model,
        torch.tensor(SOME_LABELS),
        seed=torch_seed(4, RandomStream.SAMPLING),
        temperature=0.8,
        top_k=7,
        cfg_scale=2.0,
        cfg_schedule="power-cosine",
        cfg_power=2.0,
    )
    images = sample_images(model, random_tokenizer(), SOME_LABELS, SOME_SETTINGS)
    assert images.dtype == np.uint8
    # One level is the rounding of float32 before the truncation.
    assert np.abs(images.astype(int) - painted(tokens).astype(int)).max() <= 1


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_images_are_the_same_in_batches_of_any_size(batch_size: int) -> None:
    model, tokenizer = random_model(), random_tokenizer()
    images = sample_images(model, tokenizer, SOME_LABELS, SOME_SETTINGS)
    np.testing.assert_array_equal(
        sample_images(model, tokenizer, SOME_LABELS, SOME_SETTINGS, batch_size=batch_size), images
    )


@pytest.mark.parametrize("count", [1, 5, 9, 23])
def test_progress_counts_images_token_by_token(count: int) -> None:
    told: list[int] = []
    sampler = Sampler(random_model(), random_tokenizer(), SOME_SETTINGS)
    sampler.tokens(range(count), [0] * count, told.append)
    assert len(told) == TINY.sequence_length
    assert np.cumsum(told).tolist() == [count * drawn // 9 for drawn in range(1, 10)]


def test_images_are_decoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, some = Sampler(random_model(), random_tokenizer(), SOME_SETTINGS), list[int]()
    tokens = torch.arange(40 * 9).view(40, 9) % 11
    decode = sampling.decode_to_images
    monkeypatch.setattr(sampling, "decode_to_images", lambda *args: some.append(len(args[1])) or decode(*args))
    pictures = sampler.pictures(tokens)
    assert some == [16, 16, 8]
    assert np.abs(pictures.astype(int) - painted(tokens).astype(int)).max() <= 1


def test_compiled_steps_draw_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    # tests/model/test_decoder.py has a whole compilation; here the steps are traced only.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, tokenizer = random_model(), random_tokenizer()
    sampler = Sampler(model, tokenizer, SOME_SETTINGS, compiled=True)
    drawn = sampler.pictures(sampler.tokens(range(8), SOME_LABELS))
    np.testing.assert_array_equal(drawn, sample_images(model, tokenizer, SOME_LABELS, SOME_SETTINGS))


def test_an_image_depends_only_on_its_number_and_label() -> None:
    model, tokenizer = random_model(), random_tokenizer()
    sampler = Sampler(model, tokenizer, SOME_SETTINGS)
    images = sample_images(model, tokenizer, SOME_LABELS, SOME_SETTINGS)
    order = [5, 0, 7, 2]
    np.testing.assert_array_equal(sampler.pictures(sampler.tokens(order, SOME_LABELS)), images[order])
    np.testing.assert_array_equal(sample_images(model, tokenizer, SOME_LABELS[:3], SOME_SETTINGS), images[:3])
    others = [2, 2, 2, *SOME_LABELS[3:5], 0, *SOME_LABELS[6:]]
    changed = sample_images(model, tokenizer, others, SOME_SETTINGS)
    same = [n for n in range(8) if others[n] == SOME_LABELS[n]]
    np.testing.assert_array_equal(changed[same], images[same])
    assert all((changed[n] != images[n]).any() for n in range(8) if n not in same)
    assert len(np.unique(images.reshape(8, -1), axis=0)) == 8


def test_images_of_captions_depend_only_on_number_and_caption(tmp_path: Path) -> None:
    rows = [row[row.any(-1)] for row in random_captions(TINY_TEXT, [1, 5, 3, 2])]
    write_text(tmp_path / "text.safetensors", rows)
    store, model, tokenizer = TextStore(tmp_path / "text.safetensors"), random_model(TINY_TEXT), random_tokenizer()
    captions, settings = [0, 1, 2, 3, 0, 1, 2], SampleSettings(seed=1, cfg_scale=1.5)
    images = sample_images(model, tokenizer, captions, settings, store)
    for batch_size in (1, 3):
        again = sample_images(model, tokenizer, captions, settings, store, batch_size=batch_size)
        np.testing.assert_array_equal(again, images)
    features = store.features(np.array(captions), TINY_TEXT.text_tokens)
    tokens = generate(model, features, seed=torch_seed(1, RandomStream.SAMPLING), cfg_scale=1.5)
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
def test_top_k_1_is_greedy_sampling(cfg_scale: float) -> None:
    model, labels = random_model(), [2, 0]
    images = sample_images(model, random_tokenizer(), labels, SampleSettings(top_k=1, cfg_scale=cfg_scale))
    tokens = generate(model, torch.tensor(labels), greedy=True, cfg_scale=cfg_scale)
    assert np.abs(images.astype(int) - painted(tokens).astype(int)).max() <= 1


def test_a_tokenizer_of_another_codebook_is_refused() -> None:
    with pytest.raises(UserError, match="the tokenizer has 12 codes, the model 11"):
        sample_images(random_model(), random_tokenizer(12), [0])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"--temperature must lie in \[0.001, 1000\], not 0"):
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


ROOT = Path(__file__).parent.parent
BOTH = pytest.mark.parametrize("out", ["samples.npz", "samples"])


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> SmallLine:
    return make_line(tmp_path_factory.mktemp("line"))


@pytest.fixture(scope="module")
def straight(line: SmallLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples of an undisturbed job, as a file and as a folder: straight / out / out."""
    folder = tmp_path_factory.mktemp("straight")
    for out in INSTANTS:
        draw(line.model, folder / out / out)
    return folder


@pytest.fixture(scope="module")
def images(line: SmallLine) -> np.ndarray:
    return sample_images(open_model(line.model)[0], random_tokenizer(), LABELS, SETTINGS)


# Formats


def test_an_npz_has_adms_layout(straight: Path, images: np.ndarray) -> None:
    folder = straight / "samples.npz"
    assert set(contents(folder)) == {"samples.npz", "samples.json", "samples.npz.preview.png"}
    assert not (folder / "samples.npz.parts").exists()
    with np.load(folder / "samples.npz", allow_pickle=False) as saved:
        assert list(saved) == ["arr_0", "arr_1"]
        assert (saved["arr_0"].dtype, saved["arr_1"].dtype) == (np.uint8, np.int64)
        assert saved["arr_0"].flags.c_contiguous
        np.testing.assert_array_equal(saved["arr_0"], images)
        assert saved["arr_1"].tolist() == LABELS
    with zipfile.ZipFile(folder / "samples.npz") as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            assert (entry.date_time, entry.compress_type) == (
                (1980, 1, 1, 0, 0, 0),
                zipfile.ZIP_STORED,
            )  # no clock in it


def test_pngs_hold_every_pixel(straight: Path, images: np.ndarray) -> None:
    names = [f"{index:06d}.png" for index in range(7)]
    assert set(contents(straight / "samples" / "samples")) == {*names, "metadata.json"}
    for name, image in zip(names, images, strict=True):
        with Image.open(straight / "samples" / "samples" / name) as opened:
            assert (opened.format, opened.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(opened), image)


@BOTH
def test_the_preview_shows_the_first_images_row_by_row(straight: Path, images: np.ndarray, out: str) -> None:
    preview = np.asarray(Image.open(straight / out / f"{out}.preview.png"))
    np.testing.assert_array_equal(preview, np.concatenate(list(images), axis=1))  # seven are one row


@BOTH
def test_the_preview_has_at_most_64_images_in_rows_of_8(line: SmallLine, tmp_path: Path, out: str) -> None:
    labels = [0, 1, 2] * 22
    draw(line.model, tmp_path / out, labels=labels, batch_size=25)
    every = sample_images(open_model(line.model)[0], random_tokenizer(), labels, SETTINGS)
    preview = np.asarray(Image.open(tmp_path / f"{out}.preview.png"))
    rows = [np.concatenate(list(every[start : start + 8]), axis=1) for start in range(0, 64, 8)]
    np.testing.assert_array_equal(preview, np.concatenate(rows))


@BOTH
@pytest.mark.parametrize("ema", [False, True])
def test_samples_say_how_they_were_made(line: SmallLine, tmp_path: Path, out: str, ema: bool) -> None:
    draw(line.model, tmp_path / out, ema=ema, cfg_scale=None, cfg_schedule="linear", labels=[0, 2, 1])
    saved = json.loads((tmp_path / ("samples.json" if out == "samples.npz" else "samples/metadata.json")).read_text())
    environment = saved.pop("environment")
    weights = line.model / ("ema.safetensors" if ema else "model.safetensors")
    settings = {**asdict(SETTINGS), "cfg_scale": 1.0, "cfg_schedule": "linear"}  # the scale that was used
    assert saved == {
        "images": 3,
        "batch_size": BATCH,
        "weights": {"file": weights.name, "sha256": sha256(weights), "ema": ema, "step": 7},
        "dtype": "float32",
        "compiled": False,
        "tokenizer": random_tokenizer().fingerprint,
        "settings": settings,
        "cfg_scale_origin": "as given",
        "label_mode": "balanced",
        "labels": [0, 2, 1],
    }
    assert (environment["torch"], environment["st_ar"]) == (torch.__version__, st_ar.__version__)


def test_samples_of_captions_name_them_and_their_store(tmp_path: Path) -> None:
    write_text(tmp_path / "text.safetensors", list(random_captions(TINY_TEXT, [5, 5])), encoder="toy")
    save_export(tmp_path / "model", random_model(TINY_TEXT), random_model(TINY_TEXT), {"step": 1, "encoder": "toy"})
    model, info = open_model(tmp_path / "model")
    text = TextStore(tmp_path / "text.safetensors")
    sampler = Sampler(model, random_tokenizer(), SampleSettings(seed=2), text)
    sample_to(tmp_path / "all.npz", sampler, [1, 0, 1], info, batch_size=2)
    saved = json.loads((tmp_path / "all.json").read_text())
    assert saved["captions"] == [1, 0, 1]
    assert saved["text"] == {"encoder": "toy", "fingerprint": text.fingerprint}
    assert "labels" not in saved
    with np.load(tmp_path / "all.npz", allow_pickle=False) as drawn:
        expected = sample_images(model, random_tokenizer(), [1, 0, 1], SampleSettings(seed=2), text)
        np.testing.assert_array_equal(drawn["arr_0"], expected)
        assert drawn["arr_1"].tolist() == [1, 0, 1]


# The same, whoever draws it and whenever it stops


@pytest.fixture(scope="module")
def disturbed(line: SmallLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests.sampling_processes leaves."""
    folder = tmp_path_factory.mktemp("disturbed")
    command = [sys.executable, "-m", "tests.sampling_processes", str(line.model), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("out", "instant"), [(out, instant) for out in INSTANTS for instant in INSTANTS[out]])
def test_a_killed_job_continues_to_the_same_files(
    line: SmallLine, disturbed: Path, straight: Path, out: str, instant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = disturbed / f"{out}-{instant}"
    there = contents(folder)
    assert any(name.endswith(JOB) for name in there)
    drawn: list[int] = []
    tokens = Sampler.tokens
    monkeypatch.setattr(Sampler, "tokens", lambda self, *args: drawn.extend(args[0]) or tokens(self, *args))
    draw(line.model, folder / out)
    assert contents(folder) == contents(straight / out)
    assert not (folder / "samples.npz.parts").exists()
    first = {"part-000000": 0, "000000": 0, "000003": 2, "part-000002": 4}.get(instant.split(".")[0], 7)
    assert drawn == list(range(first, 7))  # and no finished part is drawn again


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_of_any_size_write_the_same_npz(
    line: SmallLine, straight: Path, tmp_path: Path, batch_size: int
) -> None:
    draw(line.model, tmp_path / "samples.npz", batch_size=batch_size)
    for name in ("samples.npz", "samples.npz.preview.png"):
        assert (tmp_path / name).read_bytes() == (straight / "samples.npz" / name).read_bytes()


# Refusals


def begin(line: SmallLine, out: Path) -> None:
    """A job that was stopped before its end."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleWriter, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            draw(line.model, out)


@BOTH
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 10}, r"settings\.seed was 9, now 10\. Give the old ones"),
        ({"cfg_scale": None}, r"settings\.cfg_scale was 1\.5, now 1\.0"),
        ({"ema": True}, r"weights\.ema was False, now True"),
        ({"labels": [0, 2, 1, 0, 0, 1, 1]}, r"labels was \[0, 2, .*, now \[0, 2, "),
        ({"labels": [0, 2]}, r"images was 7, now 2; labels was"),
        ({"batch_size": 3}, "batch_size was 2, now 3"),
    ],
)
def test_going_on_with_other_settings_is_refused(
    line: SmallLine, tmp_path: Path, out: str, changes: dict[str, Any], named: str
) -> None:
    begin(line, tmp_path / out)
    with refused(tmp_path, f"was begun with other settings: .*{named}"):
        draw(line.model, tmp_path / out, **changes)


@BOTH
def test_finished_samples_are_refused(line: SmallLine, tmp_path: Path, out: str) -> None:
    draw(line.model, tmp_path / out)
    with refused(tmp_path, f"{out} exists already and is not empty"):
        draw(line.model, tmp_path / out)


@pytest.mark.parametrize(
    ("out", "taken"),
    [
        ("samples.npz", "samples.npz"),
        ("samples.npz", "samples.json"),
        ("samples.npz", "samples.npz.preview.png"),
        ("samples.npz", "samples.npz.parts/mine.txt"),
        ("samples", "samples"),
        ("samples", "samples/000000.png"),
        ("samples", "samples.preview.png"),
    ],
)
def test_what_is_in_the_way_is_refused(line: SmallLine, tmp_path: Path, out: str, taken: str) -> None:
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_bytes(b"precious")
    with refused(
        tmp_path, f"{taken.split('/')[0]} exists already and is not empty: a set of samples is never overwritten"
    ):
        draw(line.model, tmp_path / out)


def test_an_empty_folder_is_taken(line: SmallLine, straight: Path, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    draw(line.model, tmp_path / "samples")
    assert contents(tmp_path) == contents(straight / "samples")


def test_a_folder_may_be_named_for_a_number(line: SmallLine, straight: Path, tmp_path: Path) -> None:
    draw(line.model, tmp_path / "samples-cfg1.5")
    assert contents(tmp_path / "samples-cfg1.5") == contents(straight / "samples" / "samples")


@pytest.mark.parametrize("name", ["samples.png", "samples.NPZ", "samples.v2"])
def test_another_kind_of_file_is_refused(line: SmallLine, tmp_path: Path, name: str) -> None:
    with refused(tmp_path, "to a .npz file or to a folder of PNGs"):
        draw(line.model, tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"labels": [0, 9]}, "label 9 is out of range"),
        ({"labels": []}, "no labels were given"),
        ({"top_k": 12}, r"--top-k must lie in \[0, 11\], the size of the codebook, not 12"),
        ({"batch_size": 0}, "--batch-size must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(
    line: SmallLine, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with refused(tmp_path, match):
        draw(line.model, tmp_path / "samples.npz", **changes)
    assert list(tmp_path.iterdir()) == []


# A full disk


@pytest.mark.parametrize(
    ("out", "free", "match", "left"),
    [
        ("samples.npz", 300, r"job\.json: File too large", set()),
        ("samples.npz", 900, r"samples\.npz: File too large", {"job.json", "part-000000.npy"}),
        ("samples", 100, r"job\.json: File too large", set()),
    ],
)
def test_a_full_disk_leaves_no_incomplete_file_and_the_job_continues(
    line: SmallLine, straight: Path, tmp_path: Path, out: str, free: int, match: str, left: set[str]
) -> None:
    with pytest.raises(UserError, match=f"cannot write .*{match}; nothing there was changed"), full_disk(free):
        draw(line.model, tmp_path / out)
    there = contents(tmp_path)
    assert not [name for name in there if name.endswith((".partial", out))]
    assert left <= {Path(name).name for name in there}
    draw(line.model, tmp_path / out)
    assert contents(tmp_path) == contents(straight / out)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"noise",
        pytest.param(np.zeros((1, 6, 6, 3), np.uint8), id="fewer"),
        pytest.param(np.zeros((BATCH, 7, 6, 3), np.uint8), id="larger"),
        pytest.param(np.zeros((BATCH, 6, 6, 3), np.float32), id="floats"),
        pytest.param(np.zeros((BATCH, 6, 6, 3), np.uint8), id="other pictures"),
    ],
)
def test_a_damaged_part_is_refused_and_drawn_again_when_removed(
    line: SmallLine, straight: Path, tmp_path: Path, damage: bytes | np.ndarray
) -> None:
    begin(line, tmp_path / "samples.npz")
    part = tmp_path / "samples.npz.parts" / "part-000002.npy"
    if isinstance(damage, bytes):
        part.write_bytes(damage)
    else:
        np.save(part, damage)
    with pytest.raises(UserError, match=r"part-000002\.npy is damaged .*remove it and give the same command"):
        draw(line.model, tmp_path / "samples.npz")
    part.unlink()
    draw(line.model, tmp_path / "samples.npz")
    assert (tmp_path / "samples.npz").read_bytes() == (straight / "samples.npz" / "samples.npz").read_bytes()


@pytest.mark.parametrize("size", [None, 7])
def test_a_damaged_image_is_refused_and_drawn_again_when_removed(
    line: SmallLine, straight: Path, tmp_path: Path, size: int | None
) -> None:
    begin(line, tmp_path / "samples")
    picture = tmp_path / "samples" / "000004.png"
    picture.write_bytes(b"noise")
    if size is not None:
        Image.new("RGB", (size, size)).save(picture)
    with pytest.raises(UserError, match=r"000004\.png is damaged .*remove it and give the same command"):
        draw(line.model, tmp_path / "samples")
    picture.unlink()
    draw(line.model, tmp_path / "samples")
    assert contents(tmp_path) == contents(straight / "samples")


@pytest.mark.parametrize("command", ["sample", "sweep"])
def test_guidance_that_was_never_trained_is_refused_by_command(
    line: SmallLine, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    model = random_model()
    save_export(tmp_path / "model", model, model, {"class_dropout": 0.0})
    common = f"{command} --model {tmp_path / 'model'} --tokenizer {line.tokenizer} --num 3 --device cpu".split()
    more = ["--cfg-scale", "3", "--out", str(tmp_path / "out.npz")]
    if command == "sweep":
        more = [
            "--cfg-scales",
            "1",
            "3",
            "--reference",
            "digits",
            "--extractor",
            "efficientnet",
            "--out",
            str(tmp_path / "out"),
        ]
    with pytest.raises(SystemExit):
        main([*common, *more])
    assert (
        "--cfg-scale 3.0: the model was trained with --class-dropout 0, so it cannot be guided"
        in capsys.readouterr().err
    )
    if command == "sample":
        main([*common, "--out", str(tmp_path / "out.npz")])
        assert "st-ar: note: guidance scale 1: the model was trained with --class-dropout 0" in capsys.readouterr().err
