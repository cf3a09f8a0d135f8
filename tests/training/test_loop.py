"""The training loop: exact gradients, plain training as it ever was, and what a run leaves."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from st_ar import load_model
from st_ar.config import ModelConfig, SelfGuidedConfig, TrainConfig
from st_ar.data.store import TokenBatches, TokenStore
from st_ar.distributed import Ranks
from st_ar.model.transformer import Transformer
from st_ar.model.weights import open_model
from st_ar.randomness import RandomStream, torch_seed
from st_ar.selfguided.guidance import EMATeacher, make_teacher, sample_guidance
from st_ar.selfguided.objective import Losses, SelfGuided
from st_ar.training import loop
from st_ar.training.loop import Learner, drop_labels, forward_backward, train
from tests.data.random_store import FINGERPRINT
from tests.toys import NO_DROPOUT, random_model
from tests.training.toy_runs import GUIDED_RUN, PLAIN_RUN, assert_same_weights, log_of

# Gradients


def trainee(config: SelfGuidedConfig, model: ModelConfig) -> tuple[SelfGuided, EMATeacher]:
    """A student with weights far from zero and a teacher that differs from it, in training mode."""
    torch.manual_seed(3)
    teacher = make_teacher(random_model(model, seed=1), config)
    return SelfGuided(random_model(model, seed=0), config).train(), teacher


def gradients(config: SelfGuidedConfig, pieces: int) -> tuple[dict[str, Tensor], Losses]:
    """The gradients of one batch of 8 images, computed in so many pieces."""
    model = replace(PLAIN_RUN.model, **NO_DROPOUT)
    student, teacher = trainee(config, model)
    generator = torch.Generator().manual_seed(5)
    batch = torch.randint(16, (8, 2, 16), generator=generator)
    labels = torch.randint(4, (8,), generator=generator)  # the null class among them
    draws = sample_guidance(config, (8, 2, model.sequence_length), seed=0, step=1)
    losses = forward_backward(Learner(student, teacher, pieces, torch.float32), batch, labels, draws)
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
    draws = sample_guidance(GUIDED, (4, 2, model.sequence_length), seed=0, step=1)
    batch = torch.randint(16, (4, 2, 16), generator=torch.Generator().manual_seed(5))
    forward_backward(Learner(student, teacher, 2, torch.float32), batch, torch.zeros(4, dtype=torch.int64), draws)
    assert all(parameter.grad is None for parameter in teacher.parameters())


# Plain autoregressive training


def plain_training(config: TrainConfig, tokens: Path) -> dict[str, Tensor]:
    """LlamaGen's training, written from LLAMAGEN.md, on the same batches, labels and seeds."""
    views = TokenBatches(TokenStore(tokens), batch_size=config.batch_size, views=config.views, seed=config.seed)
    torch.manual_seed(torch_seed(config.seed, RandomStream.INITIALISATION))
    model = Transformer(config.model).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=(0.9, 0.95), fused=True)
    assert config.steps is not None
    for step in range(1, config.steps + 1):
        codes, labels = views.batch(step - 1)
        labels = drop_labels(labels, config.model.num_classes, config, step=step)
        x, y = codes.flatten(0, 1), labels.repeat_interleave(config.views)
        torch.manual_seed(torch_seed(config.seed, RandomStream.DROPOUT, step))
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

        def watched(learner: Learner, batch: Tensor, labels: Tensor, *rest: Any) -> Losses:
            seen.append((batch.clone(), labels.clone()))
            return forward_backward(learner, batch, labels, *rest)

        patch.setattr(loop, "forward_backward", watched)
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
@pytest.mark.slow
def test_compiled_blocks_train_alike(tokens: Path, tmp_path: Path) -> None:
    still = replace(GUIDED_RUN, model=replace(GUIDED_RUN.model, **NO_DROPOUT), steps=3)  # dropout draws differ
    plain, compiled = (
        log_of(train(replace(still, compile=compiles), tokens, tmp_path / str(compiles))) for compiles in (False, True)
    )
    for expected, found in zip(plain, compiled, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


# Label dropout


def dropping(share: float, seed: int = 0) -> TrainConfig:
    return replace(PLAIN_RUN, class_dropout=share, seed=seed)


def test_labels_are_dropped_in_the_given_share() -> None:
    labels = torch.arange(50_000) % 7
    dropped = drop_labels(labels, 7, dropping(0.1), step=1)
    assert (dropped == 7).float().mean().item() == pytest.approx(0.1, abs=0.005)  # four standard deviations
    assert torch.equal(dropped[dropped != 7], labels[dropped != 7])
    assert torch.equal(labels, torch.arange(50_000) % 7)


def test_dropped_labels_depend_only_on_seed_and_step() -> None:
    labels = torch.zeros(200, dtype=torch.int64)

    def at(seed: int, step: int) -> list[int]:
        return drop_labels(labels, 1, dropping(0.5, seed), step=step).tolist()

    expected = at(3, 7)
    torch.rand(5)  # the global generator has no part in it
    assert at(3, 7) == expected
    assert at(3, 8) != expected
    assert at(4, 7) != expected


def test_each_rank_drops_its_part_of_what_one_rank_drops() -> None:
    labels = torch.arange(12)
    ranks = [Ranks(rank=rank, world=3) for rank in range(3)]
    parts = [drop_labels(labels[r.share(12)], 99, dropping(0.5, 3), step=7, ranks=r) for r in ranks]
    assert torch.equal(torch.cat(parts), drop_labels(labels, 99, dropping(0.5, 3), step=7))


def test_a_share_of_zero_drops_no_label() -> None:
    labels = torch.arange(100) % 3
    assert torch.equal(drop_labels(labels, 3, dropping(0.0), step=1), labels)


# What a run leaves


def test_a_run_is_what_the_design_says(straight: Path) -> None:
    left = [".lock", "checkpoints", "config.json", "export", "log.jsonl", "tensorboard"]
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
    torch.manual_seed(torch_seed(config.seed, RandomStream.INITIALISATION))
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


def test_the_export_has_only_llamagens_names(straight: Path) -> None:
    layer = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    layer += ["attention_norm", "ffn_norm"]
    names = [f"layers.{index}.{part}.weight" for index in (0, 1) for part in layer]
    names += ["cls_embedding.embedding_table.weight", "tok_embeddings.weight", "norm.weight", "output.weight"]
    for file in ("model.safetensors", "ema.safetensors"):
        assert sorted(load_file(straight / "export" / file)) == sorted(names)
