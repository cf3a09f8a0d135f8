"""Watching a run: what it shows is right, and changes nothing."""

import json
import math
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from st_ar.config import PLAIN, SampleSettings, SelfGuidedConfig, TrainConfig, WatchConfig
from st_ar.data.store import TokenStore
from st_ar.evaluation.probe_classifiers import ShallowClassifiers
from st_ar.evaluation.probe_features import FeatureSpec, extract_features
from st_ar.figures import strip
from st_ar.hardware import flops_per_token, training_flops
from st_ar.model.weights import load_model
from st_ar.sampling import sample_images
from st_ar.selfguided.guidance import make_teacher, sample_guidance
from st_ar.selfguided.objective import SelfGuided
from st_ar.tokenizer import load_tokenizer
from st_ar.training import watch
from st_ar.training import watch as glances
from st_ar.training.loop import Learner, forward_backward, train
from st_ar.training.watch import CollapseMonitor, RidgeProbe, effective_rank, feature_spread, spread_labels
from tests.data.random_store import random_store
from tests.disk import contents, refused
from tests.small_line import random_tokenizer
from tests.toys import NO_DROPOUT, random_model
from tests.training.dying import die, train_watched
from tests.training.toy_runs import GUIDED_RUN, PLAIN_RUN

NOTHING = WatchConfig(track=("none",))
RUN = replace(GUIDED_RUN, log_every=3)


def make_line(folder: Path) -> Path:
    """A tokenizer, and a training and a test store of its codes."""
    tokenizer = random_tokenizer(vocab_size=16)
    tokenizer.save(folder / "tokenizer")
    for name, images, seed in (("tokens", 20, 0), ("test", 30, 1)):
        random_store(folder / name, images=images, crops=4, seed=seed)
        meta = json.loads((folder / name / "meta.json").read_text())
        (folder / name / "meta.json").write_text(json.dumps(meta | {"tokenizer": tokenizer.fingerprint}))
    return folder


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_line(tmp_path_factory.mktemp("line"))


def everything(line: Path, **changes: Any) -> WatchConfig:
    return WatchConfig(
        **{
            "sample_every": 5,
            "sample_tokenizer": line / "tokenizer",
            "probe_every": 4,
            "probe_test_tokens": line / "test",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def watched(line: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(RUN, line / "tokens", tmp_path_factory.mktemp("watched") / "run", watching=everything(line))


@pytest.fixture(scope="module")
def unseen(line: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(RUN, line / "tokens", tmp_path_factory.mktemp("unseen") / "run", watching=NOTHING)


def log_of(run: Path) -> list[dict[str, float]]:
    """The log, read as strict JSON, without what depends on the machine."""

    def refuse(word: str) -> float:
        raise AssertionError(word)

    lines = [json.loads(line, parse_constant=refuse) for line in (run / "log.jsonl").read_text().splitlines()]
    machine = ("tokens_per_second", "memory_gb")
    return [{key: value for key, value in entry.items() if key not in machine} for entry in lines]


def weights(run: Path) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name in ("model", "ema")
        for key, value in load_file(run / "export" / f"{name}.safetensors").items()
    }


def assert_same_weights(run: Path, expected: Path) -> None:
    found, wanted = weights(run), weights(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# It changes nothing


def test_a_watched_run_ends_with_the_same_weights_bit_for_bit(watched: Path, unseen: Path) -> None:
    assert_same_weights(watched, unseen)
    assert sorted(path.name for path in unseen.iterdir()) == [
        *(".lock", "checkpoints", "config.json", "export", "log.jsonl")
    ]


def test_seldom_logged_or_always_the_weights_are_the_same(line: Path, unseen: Path, tmp_path: Path) -> None:
    for every in (1, 100):
        run = train(replace(RUN, log_every=every), line / "tokens", tmp_path / str(every), watching=NOTHING)
        assert_same_weights(run, unseen)


def test_the_global_generator_is_left_as_it_was(line: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    network = load_model_like(RUN)
    torch.set_rng_state(before)
    copy = glances.copy_on_rank0(network)
    assert copy is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert not copy.training
    assert network.training
    for (name, value), (same, expected) in zip(copy.state_dict().items(), network.state_dict().items(), strict=True):
        assert name == same
        assert torch.equal(value, expected)
        assert value.data_ptr() != expected.data_ptr()


def load_model_like(config: TrainConfig) -> Any:
    from st_ar.model.transformer import Transformer

    return Transformer(config.model).train()


@pytest.fixture(scope="module")
def dead(line: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return die(train_watched, tmp_path_factory.mktemp("dead"), line)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["SIGKILL-backward-7", "SIGKILL-log-8"])
def test_a_watched_run_killed_and_resumed_ends_and_logs_the_same(
    line: Path, watched: Path, unseen: Path, dead: Path, case: str
) -> None:
    out = dead / case / "run"
    assert int((dead / case / "status").read_text()) == -signal.SIGKILL, (dead / case / "said").read_text()
    train(RUN, line / "tokens", out, watching=everything(line), resume=True)
    assert_same_weights(out, unseen)
    assert log_of(out) == log_of(watched)
    assert contents(out / "samples") == contents(watched / "samples")
    pytest.importorskip("tensorboard")
    assert curve(out, "loss_ar") == curve(watched, "loss_ar")


def test_a_resumed_run_may_be_watched_differently(line: Path, unseen: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(replace(RUN, steps=7), line / "tokens", out, watching=NOTHING)
    train(RUN, line / "tokens", out, watching=everything(line, sample_every=2), resume=True)
    assert_same_weights(out, unseen)
    assert [path.name for path in sorted((out / "samples").iterdir())] == [f"step_{n:08d}.png" for n in (8, 10, 12)]


# What it shows


def test_steps_are_logged_when_they_are_looked_at(watched: Path, unseen: Path) -> None:
    assert [entry["step"] for entry in log_of(unseen)] == [3, 6, 9, 12]
    assert [entry["step"] for entry in log_of(watched)] == [3, 4, 5, 6, 8, 9, 10, 12]
    seen = {entry["step"]: entry for entry in log_of(watched)}
    for entry in log_of(unseen):
        assert {key: seen[entry["step"]][key] for key in entry} == entry


def test_the_log_has_the_indicators_of_collapse_and_the_memory(watched: Path) -> None:
    lines = [json.loads(line) for line in (watched / "log.jsonl").read_text().splitlines()]
    for entry in lines:
        assert all(math.isfinite(value) for value in entry.values())
        assert 0.05 < entry["memory_gb"] < 64
        assert "mfu" not in entry  # on a CPU
        for of in ("student", "projected", "teacher"):
            assert 0 <= entry[f"std_{of}"] <= 32**-0.5 + 1e-6
            assert 1 <= entry[f"rank_{of}"] <= 6 + 1e-6  # images of a batch


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_tensorboard_shows_what_the_log_has(watched: Path) -> None:
    pytest.importorskip("tensorboard")
    for tag in ("loss", "loss_view", "ema_decay", "lr", "grad_norm", "rank_projected"):
        expected = [(entry["step"], pytest.approx(entry[tag])) for entry in log_of(watched)]
        assert curve(watched, tag) == expected
    assert [step for step, _ in curve(watched, "ridge_probe_top1")] == [4, 8, 12]


def test_samples_are_those_that_the_weights_give(line: Path, tmp_path: Path) -> None:
    config = replace(PLAIN_RUN, steps=4)
    watching = everything(line, sample_every=4, sample_labels=(2, 0, 1), sample_cfg_scale=1.5)
    run = train(config, line / "tokens", tmp_path / "run", watching=watching)
    tokenizer = load_tokenizer(line / "tokenizer")
    images = sample_images(load_model(run), tokenizer, [2, 0, 1], SampleSettings(cfg_scale=1.5, seed=config.seed))
    found = np.asarray(Image.open(run / "samples" / "step_00000004.png"))
    np.testing.assert_array_equal(found, strip(images, 3))


def test_sixteen_classes_are_spread_evenly() -> None:
    assert spread_labels(range(3), 16) == [0] * 6 + [1] * 5 + [2] * 5
    assert spread_labels(range(1000), 16)[:4] == [0, 62, 125, 187]
    assert spread_labels(range(1000), 16)[-1] == 937
    assert spread_labels([2, 7], 4) == [2, 2, 7, 7]


def test_the_probe_is_ridge_regression_at_the_last_step(line: Path, watched: Path) -> None:
    model = load_model(watched)
    reading = FeatureSpec(layers=[1], steps=[16])
    train_features, test_features = (
        extract_features(model, TokenStore(line / name), reading) for name in ("tokens", "test")
    )
    classify = ShallowClassifiers(
        train_features.layers[1], train_features.labels, 3, "ridge", 1.0, mean_over_steps=False
    )
    right = classify(torch.from_numpy(test_features.layers[1]))[:, 0].argmax(-1) == test_features.labels
    assert log_of(watched)[-1]["ridge_probe_top1"] == pytest.approx(right.float().mean().item())


def test_the_probe_reads_few_images_of_a_large_store(line: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glances, "PROBE_IMAGES", 7)
    stores = TokenStore(line / "tokens"), TokenStore(line / "test")
    probe, again = RidgeProbe(*stores, RUN), RidgeProbe(*stores, RUN)
    for images, same, store in zip(probe.images, again.images, stores, strict=True):
        assert len(np.unique(images)) == 7
        assert images.max() < len(store)
        np.testing.assert_array_equal(images, same)
    assert 0 <= probe.accuracy(load_model_like(RUN).eval()) <= 1


def test_mfu_is_the_models_operations_over_the_peak(
    line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "peak_flops", lambda device, dtype: 1e12)
    run = train(replace(RUN, steps=3), line / "tokens", tmp_path / "run", watching=NOTHING)
    (entry,) = (json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())
    body, head = flops_per_token(RUN.model)
    expected = entry["tokens_per_second"] * (3 * (body + head) + body) / 1e12
    assert entry["mfu"] == pytest.approx(expected)
    ended = replace(RUN, steps=4, log_every=1, selfguided=replace(RUN.selfguided, until=0.5))
    run = train(ended, line / "tokens", tmp_path / "ended", watching=NOTHING)
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    operations = [1e12 * entry["mfu"] / entry["tokens_per_second"] for entry in entries]
    guided, plain = 3 * (body + head) + body, 3 * (body + head)
    assert operations == pytest.approx([guided, guided, plain, plain])
    assert training_flops(RUN, 20) == 12 * 6 * 2 * 16 * (4 * body + 3 * head)


# Trouble


def test_a_tracker_that_raises_does_not_stop_the_run(
    line: Path, unseen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    run = tmp_path / "run"
    train(replace(RUN, steps=3), line / "tokens", run, watching=NOTHING)
    (run / "tensorboard").write_text("no folder")
    train(RUN, line / "tokens", run, resume=True)
    assert_same_weights(run, unseen)
    assert capsys.readouterr().err.count("TensorBoard is switched off") == 1


def test_samples_and_probes_that_fail_are_switched_off(
    line: Path, unseen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> float:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(RidgeProbe, "accuracy", broken)
    monkeypatch.setattr(glances.SampleGrid, "draw", broken)
    run = train(RUN, line / "tokens", tmp_path / "run", watching=everything(line, track=("none",)))
    assert_same_weights(run, unseen)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"st-ar: {what} switched off: out of memory; training continues" for what in ("probe", "samples")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_tokenizer": "other"}, "the model uses the codes of"),
        ({"sample_tokenizer": "nowhere"}, "is not a tokenizer"),
        ({"sample_labels": (3,)}, "--sample-labels 3 is out of range: give 0 to 2"),
        ({"probe_test_tokens": "nowhere"}, "is not a token store"),
        ({"probe_test_tokens": "foreign"}, "--model.vocab-size"),
    ],
)
def test_what_could_not_be_shown_later_is_refused_before_anything_is_written(
    line: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    random_tokenizer(vocab_size=16, seed=1).save(tmp_path / "other")
    random_store(tmp_path / "foreign", vocab_size=32)
    here = {key: tmp_path / value if isinstance(value, str) else value for key, value in changes.items()}
    with refused(tmp_path, message):
        train(RUN, line / "tokens", tmp_path / "run", watching=everything(line, **here))


def test_scikit_learn_is_asked_for_before_anything_is_written(
    line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with refused(tmp_path, r"ridge and logistic methods need .*pip install 'st-ar\[quickstart\]'"):
        train(RUN, line / "tokens", tmp_path / "run", watching=everything(line))


def test_a_moved_run_continues(line: Path, unseen: Path, tmp_path: Path) -> None:
    train(replace(RUN, steps=7), line / "tokens", tmp_path / "run", watching=everything(line))
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "elsewhere"))
    train(RUN, line / "tokens", moved, watching=everything(line), resume=True)
    assert_same_weights(moved, unseen)


MODEL = replace(GUIDED_RUN.model, **NO_DROPOUT)


def naive_rank(features: Tensor) -> float:
    """RankMe's Eq. 2, place by place, by singular values."""
    ranks: list[float] = []
    for place in range(features.shape[1]):
        rows = F.normalize(features[:, place].double(), dim=-1)
        values = torch.linalg.svdvals(rows)
        shares = values / values.sum()
        entropy = -sum(float(p) * float(p.log()) for p in shares if p > 0)
        ranks.append(float(torch.tensor(entropy).exp()))
    return sum(ranks) / len(ranks)


@pytest.mark.parametrize("shape", [(5, 3, 8), (20, 2, 8), (8, 1, 8)])
def test_the_effective_rank_is_that_of_the_singular_values(shape: tuple[int, int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    assert effective_rank(features) == pytest.approx(naive_rank(features), rel=1e-4)


def test_the_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.ones(6, 2, 8) * torch.arange(1, 7)[:, None, None]) == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.eye(8)[:6, None]) == pytest.approx(6)
    assert effective_rank(torch.eye(4).repeat(5, 1)[:, None]) == pytest.approx(4)


def test_the_spread_is_none_for_one_point_and_the_largest_for_all_directions() -> None:
    assert feature_spread(torch.ones(6, 2, 8) * torch.arange(1, 7)[:, None, None]) == pytest.approx(0, abs=1e-6)
    everywhere = torch.randn(20000, 1, 16, generator=torch.Generator().manual_seed(0))
    assert feature_spread(everywhere) == pytest.approx(16**-0.5, rel=0.01)
    two = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])
    assert feature_spread(two) == pytest.approx(0.5)


def test_images_that_differ_only_by_position_have_collapsed() -> None:
    positions = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)).expand(6, 4, 8)
    assert feature_spread(positions) == pytest.approx(0, abs=1e-6)
    assert effective_rank(positions) == pytest.approx(1, abs=1e-4)


def step_of(config: SelfGuidedConfig, pieces: int, wanted: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What a step shows, and its gradients."""
    torch.manual_seed(3)
    teacher = make_teacher(random_model(MODEL, seed=1), config)
    student = SelfGuided(random_model(MODEL, seed=0), config).train()
    features = CollapseMonitor(student)
    tokens = torch.randint(16, (8, 2, 16), generator=torch.Generator().manual_seed(5))
    draws = sample_guidance(config, (8, 2, MODEL.sequence_length), seed=0, step=1)
    features.start_step(wanted)
    forward_backward(Learner(student, teacher, pieces, torch.float32), tokens, torch.zeros(8, dtype=torch.int64), draws)
    shown = features.measure()
    features.close()
    return shown, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def test_a_step_shows_the_contrasted_features() -> None:
    config = replace(GUIDED_RUN.selfguided, mask_ratio=0.0)
    shown, _ = step_of(config, 1, True)
    assert sorted(shown) == [f"{what}_{of}" for what in ("rank", "std") for of in ("projected", "student", "teacher")]
    torch.manual_seed(3)
    tokens = torch.randint(16, (8, 2, 16), generator=torch.Generator().manual_seed(5))
    positions = sample_guidance(config, (8, 2, MODEL.sequence_length), seed=0, step=1).positions
    teacher = random_model(MODEL, seed=1)
    with torch.no_grad():
        mid = teacher.features(tokens[:, 0, :-1], torch.zeros(8, dtype=torch.int64), layers=[1])[1][:, positions]
    assert shown["std_teacher"] == pytest.approx(feature_spread(mid), rel=1e-5)
    assert shown["rank_teacher"] == pytest.approx(naive_rank(mid), rel=1e-4)
    assert shown["rank_student"] != pytest.approx(shown["rank_teacher"], rel=1e-3)


def test_micro_batches_show_what_the_whole_batch_shows() -> None:
    whole, pieced = (step_of(GUIDED_RUN.selfguided, pieces, True)[0] for pieces in (1, 4))
    assert pieced == pytest.approx(whole, rel=1e-4)


def test_looking_changes_no_gradient() -> None:
    (shown, seen), (nothing, unseen) = (step_of(GUIDED_RUN.selfguided, 2, wanted) for wanted in (True, False))
    assert shown
    assert nothing == {}
    assert seen.keys() == unseen.keys()
    assert all(torch.equal(seen[name], unseen[name]) for name in seen)


def test_without_contrast_the_teachers_last_layer_is_shown_and_without_a_teacher_nothing() -> None:
    assert sorted(step_of(replace(GUIDED_RUN.selfguided, beta=0.0), 1, True)[0]) == [
        "rank_teacher_last",
        "std_teacher_last",
    ]
    assert step_of(PLAIN, 1, True)[0] == {}
