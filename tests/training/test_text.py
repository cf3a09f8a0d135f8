"""Text models from captions to images: a toy set is learned, self-guidance and resumption hold, mistakes are refused."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from st_ar.cli import main
from st_ar.config import ModelConfig, OptimConfig, SampleSettings, TrainConfig
from st_ar.data.store import TokenBatches, TokenStore
from st_ar.data.text import TextStore, write_text
from st_ar.errors import UserError
from st_ar.evaluation.attention_report import report_attention
from st_ar.evaluation.likelihood import validation_loss
from st_ar.evaluation.probe_features import FeatureSpec, extract_features
from st_ar.model.generate import generate
from st_ar.model.transformer import Transformer
from st_ar.model.weights import open_model
from st_ar.randomness import RandomStream, torch_seed
from st_ar.sampling import choose_conditions, sample_images
from st_ar.selfguided.guidance import make_teacher, sample_guidance
from st_ar.selfguided.losses import next_token_loss
from st_ar.selfguided.objective import SelfGuided
from st_ar.tokenizer import to_uint8
from st_ar.training.loop import Learner, drop_labels, forward_backward, train
from tests.data.random_store import write_store
from tests.disk import contents, refused
from tests.small_line import random_tokenizer
from tests.toys import NO_DROPOUT, TINY_TEXT, random_captions, random_model
from tests.training.toy_runs import GUIDED_RUN

IMAGES, ROWS, WIDTH = 8, 4, 6
MODEL = ModelConfig(
    dim=32,
    n_layers=2,
    n_heads=2,
    vocab_size=11,
    grid=3,
    condition="text",
    text_tokens=ROWS,
    text_dim=WIDTH,
    **NO_DROPOUT,
)
CLASSES = replace(MODEL, condition="class", num_classes=1, text_tokens=120, text_dim=2048)
LEARNING = TrainConfig(
    model=MODEL,
    optim=OptimConfig(lr=5e-3),
    steps=200,
    batch_size=16,
    class_dropout=0.2,
    checkpoint_every=200,
    device="cpu",
)
GUIDED = replace(GUIDED_RUN, model=replace(MODEL, token_dropout=0.1, residual_dropout=0.1, ffn_dropout=0.1))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose codes their captions tell and nothing else: all are different, and so are their first tokens."""
    codes = np.random.default_rng(0).integers(0, 11, (IMAGES, 1, 9))
    codes[:, 0, 0] = np.arange(IMAGES)
    crops = np.concatenate([codes] * 2, axis=1)  # equal crops: the image is all that there is to learn
    labels = np.zeros(IMAGES, np.int64)
    return write_store(tmp_path_factory.mktemp("data") / "tokens", crops, labels, vocab_size=11, num_classes=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of 1 to 6 rows, where the model reads 4."""
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("data") / "text.safetensors"
    lengths = [1, 2, 3, 4, 5, 6, 1, 2]
    write_text(path, [rng.normal(size=(length, WIDTH)).astype(np.float32) for length in lengths], encoder="toy")
    return path


@pytest.fixture(scope="module")
def learned(tokens: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(LEARNING, tokens, tmp_path_factory.mktemp("learned") / "run", text=text)


def all_codes(tokens: Path) -> Tensor:
    codes = TokenStore(tokens).codes(np.arange(IMAGES), np.zeros((IMAGES, 1), int))[:, 0]
    return torch.from_numpy(codes.astype(np.int64))


def all_captions(text: Path) -> Tensor:
    return TextStore(text).features(np.arange(IMAGES), ROWS)


# Learning


def test_a_toy_caption_set_is_learned(learned: Path, tokens: Path, text: Path) -> None:
    model, codes, captions = open_model(learned)[0], all_codes(tokens), all_captions(text)
    with torch.no_grad():
        told = model(codes[:, :0], captions).logits
        untold = model(codes[:, :0], model.null_condition(IMAGES)).logits
        whole = model(codes[:, :-1], captions).logits
    entropy = math.log(IMAGES)  # of the first token, for who does not read the caption
    assert next_token_loss(told, codes[:, :1]) < 0.1 * entropy
    assert next_token_loss(untold, codes[:, :1]) > 0.8 * entropy
    assert next_token_loss(whole, codes) < 0.1


def test_greedy_samples_are_the_captions_images(learned: Path, tokens: Path, text: Path) -> None:
    tokens_drawn = generate(open_model(learned)[0], all_captions(text), greedy=True)
    assert torch.equal(tokens_drawn, all_codes(tokens))


def test_greedy_samples_with_guidance_take_the_likeliest_by_both_predictions(learned: Path, text: Path) -> None:
    model, captions = open_model(learned)[0], all_captions(text)
    drawn = generate(model, captions, cfg_scale=2.0, greedy=True)
    with torch.no_grad():
        told = model(drawn[:, :-1], captions).logits
        untold = model(drawn[:, :-1], model.cls_embedding.null(captions)).logits
    guided = untold + 2 * (told - untold)
    chosen = guided.gather(-1, drawn[..., None])[..., 0]
    torch.testing.assert_close(chosen, guided.amax(dim=-1), atol=1e-3, rtol=1e-3)


# The parts of training


def test_batches_pair_each_image_with_its_own_caption(tokens: Path, text: Path) -> None:
    store, captions = TokenStore(tokens), all_captions(text)
    views = TokenBatches(
        store, batch_size=5, views=2, seed=0, conditions=lambda images: TextStore(text).features(images, ROWS)
    )
    plain = TokenBatches(store, batch_size=5, views=2, seed=0)
    for step in range(3):
        batch, conditions = views.batch(step)
        assert torch.equal(batch, plain.batch(step)[0])  # captions have no part in the order and the crops
        for image, condition in zip(batch[:, 0, 0].tolist(), conditions, strict=True):  # first tokens number the images
            assert torch.equal(condition, captions[image])


def test_dropped_captions_are_those_of_dropped_classes() -> None:
    model, captions = random_model(TINY_TEXT), random_captions(TINY_TEXT, [1, 3, 5, 2, 4] * 8)
    null = model.cls_embedding.null(captions)
    dropping = replace(GUIDED_RUN, class_dropout=0.5, seed=1)
    dropped = drop_labels(captions, null, dropping, step=2)
    which = drop_labels(torch.zeros(40, dtype=torch.int64), 1, dropping, step=2).bool()
    assert 0 < which.sum() < 40
    assert torch.equal(dropped[which], null[which])
    assert torch.equal(dropped[~which], captions[~which])


@pytest.mark.parametrize("own", [True, False])
def test_self_guided_gradients_are_finite_and_micro_batches_add_up(own: bool) -> None:
    config = replace(GUIDED.selfguided, mask_ratio=0.4, mask_own_position=own)
    gradients: list[dict[str, Tensor]] = []
    for pieces in (1, 4):
        torch.manual_seed(3)
        teacher, student = (
            make_teacher(random_model(TINY_TEXT, 1), config),
            SelfGuided(random_model(TINY_TEXT, 0), config),
        )
        codes = torch.randint(11, (4, 2, 9), generator=torch.Generator().manual_seed(5))
        draws = sample_guidance(config, (4, 2, TINY_TEXT.sequence_length), seed=0, step=1)
        captions = random_captions(TINY_TEXT, [1, 5, 3, 2])
        losses = forward_backward(Learner(student.train(), teacher, pieces, torch.float32), codes, captions, draws)
        assert all(loss > 0 for loss in losses)
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    whole, pieced = gradients
    assert {"model.cls_embedding.cap_proj.fc1.weight", "model.cls_embedding.cap_proj.fc2.weight"} <= whole.keys()
    for name, expected in whole.items():
        assert expected.isfinite().all(), name
        assert expected.any(), name
        torch.testing.assert_close(pieced[name], expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_views_share_their_images_caption() -> None:
    config = replace(GUIDED.selfguided, mask_ratio=0.0, beta=0.0)
    student, teacher = SelfGuided(random_model(TINY_TEXT), config), make_teacher(random_model(TINY_TEXT), config)
    codes = torch.randint(11, (2, 3, 9), generator=torch.Generator().manual_seed(5))
    captions = random_captions(TINY_TEXT, [2, 5])
    draws = sample_guidance(config, (2, 3, TINY_TEXT.sequence_length), seed=0, step=1)
    with torch.no_grad():
        targets = student.teach(teacher, codes, captions, draws.positions)
        losses = student.eval()(codes, captions, draws, targets)
        alone = [
            next_token_loss(student.model(codes[b, m : m + 1, :-1], captions[b : b + 1]).logits, codes[b, m : m + 1])
            for b in range(2)
            for m in range(3)
        ]
    torch.testing.assert_close(losses.ar, torch.stack(alone).mean())
    assert losses.mim.abs() < 1e-5  # the teacher is the student, and saw the same


# Runs


def test_a_self_guided_run_resumes_bit_for_bit(tokens: Path, text: Path, tmp_path: Path) -> None:
    straight = train(replace(GUIDED, steps=6), tokens, tmp_path / "straight", text=text)
    run = train(replace(GUIDED, steps=3), tokens, tmp_path / "run", text=text)
    train(replace(GUIDED, steps=6), tokens, run, text=text, resume=True)
    expected = contents(straight / "export")
    assert {name: content for name, content in contents(run / "export").items() if expected[name] != content} == {}
    model, ema = open_model(run)[0], open_model(run, ema=True)[0]
    torch.manual_seed(torch_seed(GUIDED.seed, RandomStream.INITIALISATION))
    drawn = Transformer(GUIDED.model).cls_embedding.uncond_embedding
    for each in (model, ema):
        assert torch.equal(each.state_dict()["cls_embedding.uncond_embedding"], drawn)  # untrained, as it was drawn


def test_a_run_remembers_its_captions(learned: Path, tokens: Path, text: Path, tmp_path: Path) -> None:
    saved = json.loads((learned / "config.json").read_text())
    assert saved["text"] == {"encoder": "toy", "fingerprint": TextStore(text).fingerprint}
    assert open_model(learned)[1].encoder == "toy"
    rows = [np.ones((1, WIDTH), np.float32)] * IMAGES
    write_text(tmp_path / "other.safetensors", rows, encoder="toy")
    run = shutil.copytree(learned, tmp_path / "run")
    with refused(run, r"begun with other settings: text.fingerprint was"):
        train(LEARNING, tokens, run, text=tmp_path / "other.safetensors", resume=True)
    train(LEARNING, tokens, run, text=text, resume=True)


def test_a_run_from_before_text_models_resumes(tmp_path: Path, tokens: Path) -> None:
    config = replace(LEARNING, model=CLASSES, steps=1)
    run = train(config, tokens, tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    assert "text" not in saved
    for name in ("condition", "text_tokens", "text_dim"):
        del saved["config"]["model"][name]
    (run / "config.json").write_text(json.dumps(saved))
    train(replace(config, steps=2), tokens, run, resume=True)
    assert open_model(run)[1].step == 2


# The command line, and what is drawn


def command(*arguments: str | Path | int) -> None:
    main([str(argument) for argument in arguments])


def mistake(capsys: pytest.CaptureFixture[str], message: str, *arguments: str | Path | int) -> None:
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_the_pipeline_step_by_step(
    tokens: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_tokenizer().save(tmp_path / "tokenizer")
    shape = [
        "--model.dim",
        16,
        "--model.n-layers",
        2,
        "--model.n-heads",
        2,
        "--model.vocab-size",
        11,
        "--model.grid",
        3,
    ]
    rest = ["--steps", 2, "--batch-size", 4, "--device", "cpu", "--tokens", tokens]
    guided = ["--selfguided.projector-hidden", 8, "--selfguided.contrast-layer", 1]
    training = [*shape, *rest, *guided, "--model.text-tokens", ROWS, "--model.text-dim", WIDTH]
    command("train", "st-ar-xl-t2i", *training, "--text", text, "--out", tmp_path / "run")
    edit = json.loads((tmp_path / "run/export/config.json").read_text())
    edit["tokenizer"] = ""  # the store's codes are random, no tokenizer's
    (tmp_path / "run/export/config.json").write_text(json.dumps(edit))
    sampling = [
        "--model",
        tmp_path / "run",
        "--tokenizer",
        tmp_path / "tokenizer",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    command("sample", *sampling, "--text", text, "--cfg-scale", 1.5, "--out", tmp_path / "all.npz", "--batch-size", 3)
    command("sample", *sampling, "--text", text, "--num", 10, "--out", tmp_path / "ten")

    saved = json.loads((tmp_path / "all.json").read_text())
    assert saved["captions"] == list(range(IMAGES))
    assert saved["text"] == {"encoder": "toy", "fingerprint": TextStore(text).fingerprint}
    assert "labels" not in saved
    model, tokenizer = open_model(tmp_path / "run")[0], random_tokenizer()
    with np.load(tmp_path / "all.npz") as drawn:
        assert drawn["arr_1"].tolist() == list(range(IMAGES))
        codes = generate(model, all_captions(text), cfg_scale=1.5, seed=torch_seed(0, RandomStream.SAMPLING))
        expected = to_uint8(tokenizer.decode(codes.unflatten(1, (3, 3)))).numpy()
        np.testing.assert_array_equal(drawn["arr_0"], expected)
    assert json.loads((tmp_path / "ten/metadata.json").read_text())["captions"] == [*range(IMAGES), 0, 1]
    with Image.open(tmp_path / "ten/000009.png") as image:
        assert image.size == (6, 6)

    capsys.readouterr()
    before = contents(tmp_path)
    out = tmp_path / "nothing"
    mistake(capsys, "needs captions: give their features with --text", "sample", *sampling, "--out", out)
    mistake(capsys, "--labels are classes", "sample", *sampling, "--text", text, "--labels", 1, "--out", out)
    mistake(capsys, "--num must be at least 1", "sample", *sampling, "--text", text, "--num", 0, "--out", out)
    mistake(capsys, "needs captions: give their features with --text", "train", "st-ar-xl-t2i", *training, "--out", out)
    wrong = ["--model.text-dim", 7]
    mistake(
        capsys,
        "train with --model.text-dim 6",
        "train",
        "st-ar-xl-t2i",
        *training,
        *wrong,
        "--text",
        text,
        "--out",
        out,
    )
    of_classes = [*shape, *rest, "--model.num-classes", 1, "--text", text]
    mistake(capsys, "this one is for 1 classes", "train", "llamagen-b", *of_classes, "--out", out)
    write_text(tmp_path / "few.safetensors", [np.ones((1, WIDTH), np.float32)] * 3)
    few = ["--text", tmp_path / "few.safetensors"]
    mistake(capsys, "has 3 captions", "train", "st-ar-xl-t2i", *training, *few, "--out", out)
    (tmp_path / "few.safetensors").unlink()
    write_text(tmp_path / "other.safetensors", [np.ones((1, WIDTH), np.float32)], encoder="other")
    mistake(
        capsys,
        "trained on captions by 'toy'",
        "sample",
        *sampling,
        "--text",
        tmp_path / "other.safetensors",
        "--out",
        out,
    )
    (tmp_path / "other.safetensors").unlink()
    assert contents(tmp_path) == before


def test_captions_are_chosen_in_turn_or_at_random(text: Path) -> None:
    store = TextStore(text)
    assert choose_conditions(MODEL, store, None, 0, mode="balanced") == list(range(IMAGES))
    assert choose_conditions(MODEL, store, 3, 0, mode="balanced") == [0, 1, 2]
    assert set(choose_conditions(MODEL, store, 200, 0, mode="random")) == set(range(IMAGES))
    assert choose_conditions(MODEL, store, None, 0, mode="balanced", per_class=2) == [*range(IMAGES)] * 2
    assert choose_conditions(CLASSES, None, None, 0, mode="balanced") == [0] * 64


def test_samples_need_the_models_own_kind_of_condition(text: Path) -> None:
    store, settings = TextStore(text), SampleSettings()
    with pytest.raises(UserError, match="captions of 5 x 6 features: give captions to a text model"):
        sample_images(random_model(TINY_TEXT), random_tokenizer(), [0], settings)
    with pytest.raises(UserError, match="is for 3 classes: give captions to a text model"):
        sample_images(random_model(), random_tokenizer(), [0], settings, store)


# Evaluation


def test_probes_read_a_text_model_without_a_caption(learned: Path, tokens: Path) -> None:
    model, codes = open_model(learned)[0], all_codes(tokens)
    found = extract_features(model, TokenStore(tokens), FeatureSpec(layers=[1], steps=[1, 9]))
    features = torch.from_numpy(found.layers[1])
    with torch.no_grad():
        hidden = model(codes[:, :-1], model.null_condition(IMAGES), hidden=[1]).hidden[1]
    torch.testing.assert_close(features, hidden[:, [0, 8]])
    assert torch.equal(features[:1, 0], features[1:2, 0])  # nothing of the image is read at step 1


def test_what_needs_captions_says_so(learned: Path, tokens: Path, tmp_path: Path) -> None:
    model = open_model(learned)[0]
    with pytest.raises(
        UserError, match=r"the validation loss needs each image's condition.*text models are not supported"
    ):
        validation_loss(model, TokenStore(tokens))
    with pytest.raises(UserError, match="st-ar attention needs each image's condition"):
        report_attention([learned], tokens, tmp_path, tmp_path / "maps")
