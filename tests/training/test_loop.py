"""The training loop: exact gradients, exact resumption, and no harm to what is on the disk."""

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from st_ar import load_model
from st_ar.config import ModelConfig, SelfGuidedConfig, TrainConfig
from st_ar.data.ranks import Ranks
from st_ar.data.store import TokenStore
from st_ar.data.views import Views
from st_ar.errors import Interrupted, UserError
from st_ar.evaluation.likelihood import validation_loss
from st_ar.model.transformer import Transformer
from st_ar.model.weights import open_model
from st_ar.randomness import Purpose, torch_seed
from st_ar.selfguided.objective import Losses, SelfGuided, draw
from st_ar.selfguided.teacher import Teacher
from st_ar.training import loop
from st_ar.training.checkpoint import Checkpoints
from st_ar.training.log import append_log
from st_ar.training.loop import backward, drop_labels, train
from st_ar.training.manifest import list_checkpoints, read_record
from st_ar.training.optim import adamw
from st_ar.training.state import State
from st_ar.training.stopping import stop_on_signal
from tests.data.random_store import FINGERPRINT, random_store
from tests.disk import contents, flip_byte, full_disk, refused
from tests.killing import survivors
from tests.toys import NO_DROPOUT, random_model
from tests.training.toy_runs import GUIDED_RUN, PLAIN_RUN

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_store(tmp_path_factory.mktemp("data") / "tokens", images=20, crops=4, shards=2)[0]


@pytest.fixture(scope="module")
def straight(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GUIDED_RUN, never stopped. Tests that change a run take a copy: `run`."""
    return train(GUIDED_RUN, tokens, tmp_path_factory.mktemp("straight") / "run", preset="toy")


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    return shutil.copytree(straight, tmp_path / "run")


def log_of(run: Path) -> list[dict[str, float]]:
    """The log without its columns that depend on the machine."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    machine = ("tokens_per_second", "memory_gb")
    return [{key: value for key, value in entry.items() if key not in machine} for entry in entries]


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def assert_same_result(run: Path, expected: Path) -> None:
    """Equal bytes in live and averaged weights and what is said of them, and equal logs."""
    found, wanted = contents(run / "export"), contents(expected / "export")
    assert sorted(found) == ["config.json", "ema.safetensors", "model.safetensors"]
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert log_of(run) == log_of(expected)


# Gradients


def trainee(config: SelfGuidedConfig, model: ModelConfig) -> tuple[SelfGuided, Teacher]:
    """A student with weights far from zero and a teacher that differs from it, in training mode."""
    torch.manual_seed(3)
    teacher = Teacher(random_model(model, seed=1), config)
    return SelfGuided(random_model(model, seed=0), config).train(), teacher


def gradients(config: SelfGuidedConfig, pieces: int) -> tuple[dict[str, Tensor], Losses]:
    """The gradients of one batch of 8 images, computed in so many pieces."""
    model = replace(PLAIN_RUN.model, **NO_DROPOUT)
    student, teacher = trainee(config, model)
    generator = torch.Generator().manual_seed(5)
    batch = torch.randint(16, (8, 2, 16), generator=generator)
    labels = torch.randint(4, (8,), generator=generator)  # the null class among them
    draws = draw(config, model, images=8, views=2, seed=0, step=1)
    losses = backward(student, teacher, batch, labels, draws, pieces, torch.float32)
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}, losses


GUIDED = replace(GUIDED_RUN.selfguided, mask_ratio=0.4)
VARIANTS = {
    "all losses": GUIDED,
    "sum over pairs": replace(GUIDED, reduction="sum"),
    "own position seen": replace(GUIDED, mask_own_position=False, mim_features="after_norm"),
    "contrast alone": replace(GUIDED, mask_ratio=0.0, alpha=0.0),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_micro_batches_add_up_to_the_large_batch(variant: str, pieces: int) -> None:
    whole, whole_losses = gradients(VARIANTS[variant], 1)
    pieced, losses = gradients(VARIANTS[variant], pieces)
    assert pieced.keys() == whole.keys()
    assert any(name.startswith("projector") for name in whole)
    for name, expected in whole.items():
        scale = float(expected.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(pieced[name], expected, rtol=0, atol=1e-6 * max(1.0, scale), msg=name)
    torch.testing.assert_close(torch.stack(losses), torch.stack(whole_losses), rtol=1e-5, atol=1e-6)


def test_with_local_negatives_micro_batches_see_fewer_of_them() -> None:
    local = replace(GUIDED, negatives="local")
    whole, whole_losses = gradients(GUIDED, 1)
    same, _ = gradients(local, 1)
    assert_same_weights(same, whole)
    pieced, losses = gradients(local, 4)
    assert losses.step < whole_losses.step - 0.1  # two candidates are easier to tell apart than eight
    assert losses.view < whole_losses.view - 0.1
    torch.testing.assert_close(losses.ar, whole_losses.ar)
    assert (pieced["projector.0.weight"] - whole["projector.0.weight"]).abs().max() > 1e-4


def test_no_gradient_reaches_the_teacher() -> None:
    model = replace(PLAIN_RUN.model, **NO_DROPOUT)
    student, teacher = trainee(GUIDED, model)
    draws = draw(GUIDED, model, images=4, views=2, seed=0, step=1)
    batch = torch.randint(16, (4, 2, 16), generator=torch.Generator().manual_seed(5))
    backward(student, teacher, batch, torch.zeros(4, dtype=torch.int64), draws, 2, torch.float32)
    assert all(parameter.grad is None for parameter in teacher.parameters())


# Plain autoregressive training


def plain_training(config: TrainConfig, tokens: Path) -> dict[str, Tensor]:
    """LlamaGen's training, written from LLAMAGEN.md, on the same batches, labels and seeds."""
    views = Views(TokenStore(tokens), batch_size=config.batch_size, views=config.views, seed=config.seed)
    torch.manual_seed(torch_seed(config.seed, Purpose.INITIALISATION))
    model = Transformer(config.model).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=(0.9, 0.95), fused=True)
    assert config.steps is not None
    for step in range(1, config.steps + 1):
        codes, labels = views.batch(step - 1)
        labels = drop_labels(labels, config.model.num_classes, 0.1, seed=config.seed, step=step)
        x, y = codes.flatten(0, 1), labels.repeat_interleave(config.views)
        torch.manual_seed(torch_seed(config.seed, Purpose.DROPOUT, step))
        logits = model(x[:, :-1], y).logits
        loss = F.cross_entropy(logits.reshape(-1, config.model.vocab_size), x.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        if config.optim.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(("views", "clip"), [(1, 1.0), (2, 0.2), (2, 0.0)])
def test_without_self_guidance_it_is_plain_training_bit_for_bit(
    tokens: Path, tmp_path: Path, views: int, clip: float
) -> None:
    optim = replace(PLAIN_RUN.optim, grad_clip=clip)
    config = replace(PLAIN_RUN, steps=20, views=views, seed=views, checkpoint_every=20, optim=optim)
    train(config, tokens, tmp_path / "run")
    assert max(entry["grad_norm"] for entry in log_of(tmp_path / "run")) > 0.2  # some are clipped at 0.2
    assert_same_weights(load_file(tmp_path / "run" / "export" / "model.safetensors"), plain_training(config, tokens))


def test_self_guidance_that_never_begins_is_plain_training_bit_for_bit(tokens: Path, tmp_path: Path) -> None:
    config = replace(
        GUIDED_RUN,
        selfguided=replace(GUIDED_RUN.selfguided, until=0.0),
        optim=replace(GUIDED_RUN.optim, grad_clip=0.0),
        checkpoint_every=12,
    )
    run = train(config, tokens, tmp_path / "run")
    assert_same_weights(load_file(run / "export" / "model.safetensors"), plain_training(config, tokens))


def test_steps_without_self_guidance_are_plain_and_the_others_are_as_ever(tokens: Path, tmp_path: Path) -> None:
    config = replace(GUIDED_RUN, selfguided=replace(GUIDED_RUN.selfguided, every=3, until=0.7))
    log = log_of(train(config, tokens, tmp_path / "run"))
    guided = [entry for entry in log if entry["loss"] != entry["loss_ar"]]
    assert [entry["step"] for entry in guided] == [1, 4, 7]  # the last of them within 0.7 of 12 steps
    for entry in log:
        terms = [entry[f"loss_{name}"] for name in ("mim", "step", "view")]
        assert min(terms) > 0 if entry in guided else terms == [0, 0, 0]


def seen_by(
    config: TrainConfig, tokens: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensor, Tensor]]:
    """The batches and labels of a run."""
    seen: list[tuple[Tensor, Tensor]] = []
    with monkeypatch.context() as patch:

        def watched(student: Any, teacher: Any, batch: Tensor, labels: Tensor, *rest: Any) -> Losses:
            seen.append((batch.clone(), labels.clone()))
            return backward(student, teacher, batch, labels, *rest)

        patch.setattr(loop, "backward", watched)
        train(config, tokens, out)
    return seen


def test_plain_and_self_guided_training_see_the_same_batches(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(GUIDED_RUN, steps=5, checkpoint_every=5)
    guided = seen_by(short, tokens, tmp_path / "guided", monkeypatch)
    plain = seen_by(
        replace(short, selfguided=PLAIN_RUN.selfguided, accumulate=3), tokens, tmp_path / "plain", monkeypatch
    )
    assert len(guided) == len(plain) == 5
    for (codes, labels), (same_codes, same_labels) in zip(guided, plain, strict=True):
        assert torch.equal(codes, same_codes)
        assert torch.equal(labels, same_labels)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_compiled_blocks_train_alike(tokens: Path, tmp_path: Path) -> None:
    still = replace(GUIDED_RUN, model=replace(GUIDED_RUN.model, **NO_DROPOUT), steps=3)  # dropout draws differ
    plain, compiled = (
        log_of(train(replace(still, compile=compiles), tokens, tmp_path / str(compiles))) for compiles in (False, True)
    )
    for expected, found in zip(plain, compiled, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


# Label dropout


def test_labels_are_dropped_in_the_given_share() -> None:
    labels = torch.arange(50_000) % 7
    dropped = drop_labels(labels, 7, 0.1, seed=0, step=1)
    assert (dropped == 7).float().mean().item() == pytest.approx(0.1, abs=0.005)  # four standard deviations
    assert torch.equal(dropped[dropped != 7], labels[dropped != 7])
    assert torch.equal(labels, torch.arange(50_000) % 7)


def test_dropped_labels_depend_on_seed_and_step_alone() -> None:
    labels = torch.zeros(200, dtype=torch.int64)

    def at(seed: int, step: int) -> list[int]:
        return drop_labels(labels, 1, 0.5, seed=seed, step=step).tolist()

    expected = at(3, 7)
    torch.rand(5)  # the global generator has no part in it
    assert at(3, 7) == expected
    assert at(3, 8) != expected
    assert at(4, 7) != expected


def test_each_rank_drops_its_part_of_what_one_rank_drops() -> None:
    labels = torch.arange(12)
    ranks = [Ranks(rank=rank, world=3) for rank in range(3)]
    parts = [drop_labels(labels[r.share(12)], 99, 0.5, seed=3, step=7, ranks=r) for r in ranks]
    assert torch.equal(torch.cat(parts), drop_labels(labels, 99, 0.5, seed=3, step=7))


def test_a_share_of_zero_drops_no_label() -> None:
    labels = torch.arange(100) % 3
    assert torch.equal(drop_labels(labels, 3, 0.0, seed=0, step=1), labels)


# What a run leaves


def test_a_run_is_what_the_design_says(straight: Path) -> None:
    left = ["checkpoints", "config.json", "export", "log.jsonl", "tensorboard"]
    assert sorted(path.name for path in straight.iterdir()) == left
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"]
    saved = json.loads((straight / "config.json").read_text())
    assert saved["preset"] == "toy"
    assert saved["config"]["selfguided"]["positions"] == 3
    assert saved["tokens"]["tokenizer"] == FINGERPRINT
    assert saved["environment"]["torch"] == torch.__version__


def test_the_logged_losses_add_up_to_equation_8(straight: Path) -> None:
    log = log_of(straight)
    assert [entry["step"] for entry in log] == list(range(1, 13))
    assert log[0]["loss_ar"] == pytest.approx(math.log(16))  # the output head begins at zero
    for entry in log:
        contrast = (entry["loss_step"] + entry["loss_view"]) / 2
        assert entry["loss"] == pytest.approx(entry["loss_ar"] + 1.0 * entry["loss_mim"] + 0.5 * contrast)
        assert min(entry["loss_mim"], entry["loss_step"], entry["loss_view"]) > 0
        assert entry["lr"] == 3e-3
        assert entry["ema_decay"] == pytest.approx(min(0.9, (1 + entry["step"]) / (10 + entry["step"])))
        assert entry["grad_norm"] > 0


def test_plain_training_logs_no_other_loss(tokens: Path, tmp_path: Path) -> None:
    train(replace(PLAIN_RUN, steps=5, log_every=2), tokens, tmp_path / "run")
    log = log_of(tmp_path / "run")
    assert [entry["step"] for entry in log] == [2, 4, 5]
    assert all(entry["loss"] == entry["loss_ar"] for entry in log)
    assert all(entry["loss_mim"] == entry["loss_step"] == entry["loss_view"] == 0 for entry in log)


def test_epochs_are_counted_in_images(tokens: Path, tmp_path: Path) -> None:
    train(replace(PLAIN_RUN, steps=None, epochs=1.5), tokens, tmp_path / "run")
    assert log_of(tmp_path / "run")[-1]["step"] == 5  # 1.5 * 20 images in batches of 6


def test_the_average_moves_as_the_schedule_says(tokens: Path, tmp_path: Path) -> None:
    config = replace(PLAIN_RUN, steps=1)
    train(config, tokens, tmp_path / "run")
    torch.manual_seed(torch_seed(config.seed, Purpose.INITIALISATION))
    begun = Transformer(config.model).state_dict()
    live, averaged = (load_file(tmp_path / "run" / "export" / f"{name}.safetensors") for name in ("model", "ema"))
    for key, value in averaged.items():
        torch.testing.assert_close(value, begun[key] * 2 / 11 + live[key] * 9 / 11)  # decay (1 + 1) / (10 + 1)


def test_a_run_can_be_loaded_as_a_model_and_says_what_it_is(straight: Path) -> None:
    model, info = open_model(straight)
    assert info.step == 12
    assert info.class_names == ["class-0", "class-1", "class-2"]
    assert info.class_dropout == GUIDED_RUN.class_dropout
    assert info.tokenizer == FINGERPRINT
    assert info.config == GUIDED_RUN.model
    assert_same_weights(model.state_dict(), load_file(straight / "export" / "model.safetensors"))
    for place in (straight / "export", straight / "export" / "model.safetensors"):
        assert_same_weights(load_model(place).state_dict(), model.state_dict())
        averaged = load_file(straight / "export" / "ema.safetensors")
        assert_same_weights(load_model(place, ema=True).state_dict(), averaged)


def test_the_export_has_llamagens_names_alone(straight: Path) -> None:
    layer = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    layer += ["attention_norm", "ffn_norm"]
    names = [f"layers.{index}.{part}.weight" for index in (0, 1) for part in layer]
    names += ["cls_embedding.embedding_table.weight", "tok_embeddings.weight", "norm.weight", "output.weight"]
    for file in ("model.safetensors", "ema.safetensors"):
        assert sorted(load_file(straight / "export" / file)) == sorted(names)


# Stopping and resuming


def signalled(tokens: Path, out: Path, name: str, instant: str, step: int) -> subprocess.CompletedProcess[str]:
    """GUIDED_RUN in another process that gets a signal."""
    command = [sys.executable, "-m", "tests.training.dying", tokens, out, name, instant, str(step)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("instant", "step", "left"),
    [
        ("checkpoint", 8, [".step_00000008.partial", "step_00000004"]),
        ("export", 12, ["step_00000008", "step_00000012"]),
    ],
)
def test_a_run_killed_while_it_is_saved_ends_as_if_it_had_never_stopped(
    tokens: Path, straight: Path, tmp_path: Path, instant: str, step: int, left: list[str]
) -> None:
    out = tmp_path / "run"
    done = signalled(tokens, out, "SIGKILL", instant, step)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == left
    train(GUIDED_RUN, tokens, out, resume=True, preset="toy")
    assert_same_result(out, straight)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"]


def test_a_run_killed_twenty_times_ends_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    random_store(tmp_path / "tokens", images=20, crops=4, shards=2)
    random_store(tmp_path / "validation", images=9, crops=1, seed=1)
    straight, *runs = survivors("training", tmp_path, kills=20, half_written=1)
    best = json.loads((straight / "best" / "config.json").read_text())["step"]
    assert 0 < best < 24
    for run in runs:
        assert_same_result(run, straight)
        assert contents(run / "best") == contents(straight / "best")
        assert [step for step, _ in list_checkpoints(run / "checkpoints")] == sorted({best, 8, 16, 22, 24})
        assert {path.name for path in run.rglob(".*")} == {".metadata"}  # and nothing half written


@pytest.mark.parametrize(("name", "instant"), [("SIGTERM", "backward"), ("SIGINT", "log")])
def test_a_run_asked_to_stop_saves_itself_and_goes_on_the_same(
    tokens: Path, straight: Path, tmp_path: Path, name: str, instant: str
) -> None:
    out = tmp_path / "run"
    done = signalled(tokens, out, name, instant, 7)
    assert done.returncode == 7, done.stderr
    assert "stopped at step 7 of 12; the run is saved" in done.stdout
    assert "--resume" in done.stdout
    assert done.stdout.split()[-1] == str(int(signal.Signals[name]))
    assert (out / "checkpoints" / "step_00000007").is_dir()
    assert open_model(out)[1].step == 7
    train(GUIDED_RUN, tokens, out, resume=True, preset="toy")
    assert_same_result(out, straight)


def test_a_run_that_broke_before_its_first_checkpoint_begins_anew(
    tokens: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, entry: dict[str, Any]) -> None:
        append_log(path, entry)
        if entry["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "append_log", broken)
        with pytest.raises(KeyboardInterrupt):
            train(GUIDED_RUN, tokens, tmp_path / "run", preset="toy")
    assert len(log_of(tmp_path / "run")) == 3
    train(GUIDED_RUN, tokens, tmp_path / "run", resume=True, preset="toy")
    assert_same_result(tmp_path / "run", straight)


def test_signals_are_handled_as_before_once_training_is_over() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        with stop_on_signal() as stop:
            assert all(signal.getsignal(number) is not signal.default_int_handler for number in numbers)
            signal.raise_signal(signal.SIGTERM)
            assert stop == [signal.SIGTERM]
            assert all(
                signal.getsignal(number) is signal.default_int_handler for number in numbers
            )  # a second one is at once
        assert all(signal.getsignal(number) is signal.default_int_handler for number in numbers)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_resuming_a_finished_run_changes_nothing_but_its_config(tokens: Path, run: Path) -> None:
    before = contents(run)
    train(GUIDED_RUN, tokens, run, resume=True, preset="toy")
    after = contents(run)
    assert {name for name in after if after[name] != before.get(name)} <= {"config.json"}
    assert after.keys() == before.keys()


def test_the_batch_may_be_accumulated_in_a_run(tokens: Path, tmp_path: Path) -> None:
    still = replace(GUIDED_RUN, model=replace(GUIDED_RUN.model, **NO_DROPOUT), steps=4)  # dropout draws by micro-batch
    train(still, tokens, tmp_path / "whole")
    train(replace(still, accumulate=3), tokens, tmp_path / "pieces")
    for whole, pieced in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "pieces"), strict=True):
        assert pieced["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert pieced["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_more_steps_may_be_added_under_a_constant_rate(tokens: Path, straight: Path, tmp_path: Path) -> None:
    train(replace(GUIDED_RUN, steps=7), tokens, tmp_path / "run", preset="toy")
    train(GUIDED_RUN, tokens, tmp_path / "run", resume=True, preset="toy")
    assert_same_result(tmp_path / "run", straight)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["steps"] == 12


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid"])
def test_steps_may_not_be_added_once_the_rate_has_fallen_for_the_old_end(
    tokens: Path, tmp_path: Path, schedule: str
) -> None:
    # No run from the beginning has these rates: the result would be a function of when it was stopped.
    config = replace(PLAIN_RUN, steps=4, optim=replace(PLAIN_RUN.optim, schedule=schedule))
    train(config, tokens, tmp_path / "run")
    with refused(tmp_path, "steps was 4, now 8"):
        train(replace(config, steps=8), tokens, tmp_path / "run", resume=True)


CHANGES: dict[str, tuple[TrainConfig, str]] = {
    "batch size": (replace(GUIDED_RUN, batch_size=4), "batch_size was 6, now 4"),
    "seed": (replace(GUIDED_RUN, seed=1), "seed was 0, now 1"),
    "views": (replace(GUIDED_RUN, views=3), "views was 2, now 3"),
    "accumulate": (replace(GUIDED_RUN, accumulate=2), "accumulate was 1, now 2"),
    "label dropout": (replace(GUIDED_RUN, class_dropout=0.2), "class_dropout was 0.1, now 0.2"),
    "rate": (replace(GUIDED_RUN, optim=replace(GUIDED_RUN.optim, lr=1e-3)), "optim.lr was 0.003, now 0.001"),
    "depth": (replace(GUIDED_RUN, model=replace(GUIDED_RUN.model, n_layers=3)), "model.n_layers was 2, now 3"),
    "loss": (
        replace(GUIDED_RUN, selfguided=replace(GUIDED_RUN.selfguided, beta=1.0)),
        "selfguided.beta was 0.5, now 1.0",
    ),
    "type": (replace(GUIDED_RUN, dtype="bfloat16"), "dtype was float32, now bfloat16"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_is_not_resumed_with_another(tokens: Path, run: Path, what: str) -> None:
    config, message = CHANGES[what]
    with refused(
        run, f"was begun with other settings: .*{message}.*Give the old ones to resume it, or choose another --out"
    ):
        train(config, tokens, run, resume=True, preset="toy")


def test_all_the_changed_settings_are_named(tokens: Path, run: Path) -> None:
    with refused(run, "batch_size was 6, now 4; seed was 0, now 1"):
        train(replace(GUIDED_RUN, batch_size=4, seed=1), tokens, run, resume=True, preset="toy")


def test_a_run_is_not_resumed_on_a_store_of_other_size(run: Path, tmp_path: Path) -> None:
    other = random_store(tmp_path / "tokens", images=24, crops=4)[0]
    with refused(tmp_path, "images was 20, now 24"):
        train(GUIDED_RUN, other, run, resume=True, preset="toy")


def test_a_run_is_not_resumed_on_a_store_of_other_codes(run: Path, tmp_path: Path) -> None:
    # Such as the same images cropped from another size: the same names and counts, other tokens.
    other = random_store(tmp_path / "tokens", images=20, crops=4, shards=2, seed=1)[0]
    with refused(tmp_path, "was begun with other settings"):
        train(GUIDED_RUN, other, run, resume=True, preset="toy")


def test_a_store_may_move(tokens: Path, straight: Path, tmp_path: Path) -> None:
    train(replace(GUIDED_RUN, steps=7), tokens, tmp_path / "run", preset="toy")
    moved = shutil.copytree(tokens, tmp_path / "elsewhere")
    train(GUIDED_RUN, moved, tmp_path / "run", resume=True, preset="toy")
    assert_same_result(tmp_path / "run", straight)


def test_a_run_is_not_written_over(tokens: Path, run: Path) -> None:
    with refused(
        run, "holds a run already, with a checkpoint of step 12: give --resume to continue it, or choose another --out"
    ):
        train(GUIDED_RUN, tokens, run)


def test_a_run_without_a_checkpoint_is_not_written_over_either(tokens: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with refused(run, "holds a run already, without a checkpoint yet"):
        train(GUIDED_RUN, tokens, run)


def test_a_folder_of_other_things_is_left_alone(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with refused(tmp_path, "exists already and is no run of ours: choose another --out"):
        train(PLAIN_RUN, tokens, tmp_path)
    with refused(tmp_path, "exists already and is no run of ours: choose another --out"):
        train(PLAIN_RUN, tokens, tmp_path / "thesis.tex")


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_there_must_be_a_run_to_resume(tokens: Path, tmp_path: Path, name: str) -> None:
    with refused(tmp_path, "holds no run to resume: leave out --resume to begin one, or check --out"):
        train(PLAIN_RUN, tokens, tmp_path / name, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_format_is_not_continued(tokens: Path, run: Path) -> None:
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(saved | {"format_version": 9}))
    with refused(run, "has format version 9; this st-ar continues 1"):
        train(GUIDED_RUN, tokens, run, resume=True, preset="toy")


def test_a_damaged_checkpoint_is_named_and_the_end_is_the_same(
    tokens: Path, run: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_byte(run / "checkpoints" / "step_00000012" / "tensors" / "__0_0.distcp", 5000)
    train(GUIDED_RUN, tokens, run, resume=True, preset="toy")
    assert "step_00000012 is damaged (tensors/__0_0.distcp does not have its checksum)" in capsys.readouterr().err
    assert_same_result(run, straight)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("step_00000008", "step_00000012", "step_00000012.damaged")
    ]


UNSUITABLE: dict[str, tuple[TrainConfig, str]] = {
    "codebook": (replace(PLAIN_RUN, model=replace(PLAIN_RUN.model, vocab_size=32)), "--model.vocab-size 16"),
    "grid": (replace(PLAIN_RUN, model=replace(PLAIN_RUN.model, grid=8)), "--model.grid 4"),
    "classes": (replace(PLAIN_RUN, model=replace(PLAIN_RUN.model, num_classes=10)), "--model.num-classes 3"),
    "views": (replace(PLAIN_RUN, views=5), "--views 5 asks for different crops"),
}


@pytest.mark.parametrize("what", UNSUITABLE)
def test_a_store_that_does_not_suit_the_model_is_refused_before_anything_is_written(
    tokens: Path, tmp_path: Path, what: str
) -> None:
    config, message = UNSUITABLE[what]
    with refused(tokens, message):
        train(config, tokens, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_store_is_refused_before_anything_is_written(tokens: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tokens, tmp_path / "tokens")
    flip_byte(damaged / "codes-00001-of-00002.npy")
    with refused(damaged, "codes-00001-of-00002.npy is damaged"):
        train(PLAIN_RUN, damaged, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Trouble on the way


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(tokens: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(replace(GUIDED_RUN, steps=4), tokens, out, preset="toy")
    before = contents(out / "checkpoints") | contents(out / "export")
    with (
        full_disk(1 << 16),
        pytest.raises(ValueError, match=r"(?s)checkpoint of step 8 .*step_00000004 is intact.*--resume"),
    ):
        train(GUIDED_RUN, tokens, out, resume=True, preset="toy")
    assert contents(out / "checkpoints") | contents(out / "export") == before
    train(GUIDED_RUN, tokens, out, resume=True, preset="toy")
    assert_same_result(out, straight)


EXPLODING = replace(PLAIN_RUN, optim=replace(PLAIN_RUN.optim, lr=1e38))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_checkpoint(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not finite at step 2 .*step_00000001; lower --optim.lr"):
        train(replace(EXPLODING, checkpoint_every=1), tokens, tmp_path / "run")
    assert open_model(tmp_path / "run")[1].step == 1
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [1]


def test_a_loss_that_is_not_finite_before_any_checkpoint_says_so(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not finite at step 2 .*there is no checkpoint yet"):
        train(EXPLODING, tokens, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_that_explode_later_leave_a_checkpoint_to_go_on_from(
    tokens: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", lambda optim, step, total: 1e38 if step == 6 else optim.lr)
        with pytest.raises(ValueError, match=r"not finite at step 7 .*the last good checkpoint is .*step_00000004"):
            train(GUIDED_RUN, tokens, tmp_path / "run", preset="toy")
    train(GUIDED_RUN, tokens, tmp_path / "run", resume=True, preset="toy")
    assert_same_result(tmp_path / "run", straight)


# The best by a validation store


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes without rule: what is learnt from the training images' makes them ever less likely."""
    return random_store(tmp_path_factory.mktemp("others") / "tokens", images=9, crops=3, seed=1)[0]


MEASURED = replace(GUIDED_RUN, steps=24, checkpoint_every=6, keep=1, optim=replace(GUIDED_RUN.optim, lr=1e-2))


@pytest.fixture(scope="module")
def measured(tokens: Path, others: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(MEASURED, tokens, tmp_path_factory.mktemp("measured") / "run", validation=others, preset="toy")


def losses_of(run: Path) -> dict[int, float]:
    return {int(entry["step"]): entry["validation_loss"] for entry in log_of(run) if "validation_loss" in entry}


def test_the_averaged_weights_are_measured_at_every_checkpoint(measured: Path, others: Path) -> None:
    losses = losses_of(measured)
    assert list(losses) == [6, 12, 18, 24]
    assert losses[24] == pytest.approx(validation_loss(load_model(measured, ema=True), TokenStore(others)), rel=1e-6)
    saved = json.loads((measured / "config.json").read_text())
    assert saved["validation"] == TokenStore(others).describe()


def test_measuring_changes_nothing_else(tokens: Path, measured: Path, tmp_path: Path) -> None:
    run = train(MEASURED, tokens, tmp_path / "run", preset="toy")
    assert_same_weights(load_model(run).state_dict(), load_model(measured).state_dict())
    assert not (run / "best").exists()
    assert [entry for entry in log_of(measured) if "validation_loss" not in entry] == log_of(run)


def test_the_best_so_far_is_a_model_of_its_own_and_its_checkpoint_is_kept(measured: Path, others: Path) -> None:
    losses = losses_of(measured)
    best = min(losses, key=losses.__getitem__)
    assert best < 24
    model, info = open_model(measured / "best", ema=True)
    assert info.step == best
    assert validation_loss(model, TokenStore(others)) == pytest.approx(losses[best], rel=1e-6)
    saved = json.loads((measured / "best" / "config.json").read_text())
    assert saved["validation_loss"] == losses[best]
    assert open_model(measured)[1].step == 24
    assert [step for step, _ in list_checkpoints(measured / "checkpoints")] == [best, 24]
    assert read_record(measured / "checkpoints" / f"step_{best:08d}")["validation_loss"] == losses[best]


def test_a_checkpoint_on_interruption_is_not_measured_and_the_best_is_the_same(
    tokens: Path, others: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupting(path: Path, entry: dict[str, Any]) -> None:
        append_log(path, entry)
        if entry["step"] == 8:
            signal.raise_signal(signal.SIGTERM)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "append_log", interrupting)
        with pytest.raises(Interrupted, match="stopped at step 8"):
            train(MEASURED, tokens, run, validation=others, preset="toy")
    assert list(losses_of(run)) == [6]
    train(MEASURED, tokens, run, validation=others, resume=True, preset="toy")
    assert_same_result(run, measured)
    assert contents(run / "best") == contents(measured / "best")


def test_the_store_that_is_measured_may_not_change(tokens: Path, others: Path, measured: Path, tmp_path: Path) -> None:
    run = shutil.copytree(measured, tmp_path / "run")
    with refused(run, r"begun with other settings: validation.crops was .* now None"):
        train(MEASURED, tokens, run, resume=True, preset="toy")
    with refused(run, r"begun with other settings: validation_images was 1024, now 4"):
        train(replace(MEASURED, validation_images=4), tokens, run, validation=others, resume=True, preset="toy")


def test_a_validation_store_that_does_not_suit_is_refused_before_anything_is_written(
    tokens: Path, tmp_path: Path
) -> None:
    other = random_store(tmp_path / "other", images=9, crops=1, vocab_size=32)[0]
    with refused(tmp_path, "has 32 tokens in the codebook, the model 16"):
        train(MEASURED, tokens, tmp_path / "run", validation=other)
    saved = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(saved | {"vocab_size": 16, "tokenizer": "f" * 64}))
    with refused(tmp_path, "was made by tokenizer ffffffffffff"):
        train(MEASURED, tokens, tmp_path / "run", validation=other)


# Steps that are skipped


def poisoned(patch: pytest.MonkeyPatch, **steps: float) -> None:
    """Add to a gradient at step s, for each s=value, what makes the norm not finite."""
    poison = {int(name.removeprefix("at_")): value for name, value in steps.items()}
    current = 0

    def seen(config: Any, model: Any, *, step: int, **rest: Any) -> Any:
        nonlocal current
        current = step
        return draw(config, model, step=step, **rest)

    def armed(student: SelfGuided, *rest: Any) -> Losses:
        losses = backward(student, *rest)
        if current in poison:
            gradient = student.model.tok_embeddings.weight.grad
            assert gradient is not None
            gradient[3, 5] = poison[current]
        return losses

    patch.setattr(loop, "draw", seen)
    patch.setattr(loop, "backward", armed)


SKIPPING = replace(GUIDED_RUN, skip_nonfinite=2, checkpoint_every=1, keep=20)


@pytest.fixture(scope="module")
def skipped(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has skipped steps 4 and 9."""
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, at_4=math.nan, at_9=math.inf)
        return train(SKIPPING, tokens, tmp_path_factory.mktemp("skipped") / "run", preset="toy")


def saved_state(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    model = Transformer(GUIDED_RUN.model)
    teacher = Teacher(model, GUIDED_RUN.selfguided)
    student = SelfGuided(model, GUIDED_RUN.selfguided)
    state = State({"student": student, "ema": teacher.model}, student, adamw(student, GUIDED_RUN.optim))
    Checkpoints(run / "checkpoints", keep=1).restore(step, state)
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def test_a_skipped_step_changes_nothing_but_the_number_of_steps(skipped: Path) -> None:
    for step in (4, 9):
        assert_same_weights(saved_state(skipped, step), saved_state(skipped, step - 1))
        after = saved_state(skipped, step + 1)
        assert not torch.equal(
            after["student.model.output.weight"], saved_state(skipped, step)["student.model.output.weight"]
        )
    assert {float(value) for name, value in saved_state(skipped, 12).items() if name.endswith(".step")} == {10.0}


def test_skipped_steps_are_reported(skipped: Path) -> None:
    log = [json.loads(line) for line in (skipped / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 13))
    assert {entry["step"]: entry for entry in log if "skipped" in entry} == {
        4: {"step": 4, "skipped": "gradient norm is nan"},
        9: {"step": 9, "skipped": "gradient norm is inf"},
    }


def test_steps_that_are_finite_are_those_of_a_run_that_may_skip_none(
    tokens: Path, straight: Path, tmp_path: Path
) -> None:
    train(replace(GUIDED_RUN, skip_nonfinite=3), tokens, tmp_path / "run", preset="toy")
    assert_same_result(tmp_path / "run", straight)


@pytest.mark.parametrize("stopped", [3, 4, 7])
def test_a_run_that_skips_is_resumed_to_the_same_end(
    tokens: Path, skipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    poisoned(monkeypatch, at_4=math.nan, at_9=math.inf)
    train(replace(SKIPPING, steps=stopped), tokens, tmp_path / "run", preset="toy")
    train(SKIPPING, tokens, tmp_path / "run", resume=True, preset="toy")
    assert_same_result(tmp_path / "run", skipped)


def test_more_than_may_be_skipped_stop_the_run_also_when_it_was_resumed_in_between(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, at_4=math.nan, at_5=math.nan, at_9=math.nan)
    train(replace(SKIPPING, steps=7), tokens, tmp_path / "run", preset="toy")
    for _ in range(2):
        with pytest.raises(UserError, match=r"at step 9 \(gradient norm is nan\).*skip more such steps than .* 2$"):
            train(SKIPPING, tokens, tmp_path / "run", resume=True, preset="toy")
        assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1][0] == 8
    train(replace(SKIPPING, skip_nonfinite=3), tokens, tmp_path / "run", resume=True, preset="toy")
    assert sum("skipped" in entry for entry in log_of(tmp_path / "run")) == 3


def test_a_loss_is_read_no_more_often_than_before_if_none_may_be_skipped(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(loop, "not_finite", lambda terms: asked.append(1) or "")
    train(replace(PLAIN_RUN, steps=3), tokens, tmp_path / "run")
    assert asked == []


# Memory


def test_a_network_too_large_for_memory_is_an_error_that_names_the_settings(tokens: Path, tmp_path: Path) -> None:
    guided = replace(GUIDED_RUN.selfguided)
    object.__setattr__(guided, "projector_hidden", 1 << 44)  # beyond what may be asked for, so that no machine has it
    huge = replace(GUIDED_RUN, selfguided=guided)
    with pytest.raises(
        UserError,
        match=r"^out of memory \(2251799813685248 bytes more could not be had\): give --activation-checkpointing full, which "
        r"may also be given with --resume; or give --accumulate 2, for micro-batches of 3 x 2 sequences; or give a smaller "
        r"--batch-size than 6 or a smaller --model$",
    ):
        train(huge, tokens, tmp_path / "run")


@pytest.mark.parametrize(
    "fail",
    [
        lambda: torch.empty(1 << 55),  # asks for it
        lambda: np.empty(1 << 55),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0")),
    ],
)
def test_a_step_too_large_for_memory_is_too(
    tokens: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Any
) -> None:
    def greedy(*args: Any) -> Losses:
        if (tmp_path / "run" / "export").is_dir():
            list(fail())
        return backward(*args)

    smallest = replace(GUIDED_RUN, accumulate=6, activation_checkpointing="full", checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "backward", greedy)
        with pytest.raises(
            UserError, match=r"^out of memory.*: give a smaller --batch-size than 6 or a smaller --model$"
        ):
            train(smallest, tokens, tmp_path / "run")
    assert list_checkpoints(tmp_path / "run" / "checkpoints")


def test_another_error_is_left_as_it_is(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Losses:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(loop, "backward", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(PLAIN_RUN, tokens, tmp_path / "run")
