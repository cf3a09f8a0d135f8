"""Training of a VQ-GAN: what a step does, against naive versions of it, and runs that stop anywhere and end the same."""

import copy
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from st_ar import load_tokenizer
from st_ar.config import AdversaryConfig, VQConfig, VQTrainConfig
from st_ar.data.loading import CropLoader
from st_ar.data.source import Example
from st_ar.errors import Interrupted, UserError
from st_ar.evaluation.efficientnet import PerceptualLoss, load_efficientnet
from st_ar.evaluation.reconstruction import evaluation_images, reconstruct
from st_ar.tokenizer import to_pixels
from st_ar.tokenizer.vq import VQTokenizer
from st_ar.training import vqgan as module
from st_ar.training.checkpoint import Checkpoints
from st_ar.training.checkpoint_files import list_checkpoints
from st_ar.training.vqgan import VQGAN, Discriminator, VQLearner, backward, hinge_loss, revive, train_tokenizer
from tests.data.pictures import encoded
from tests.disk import contents, full_disk, refused
from tests.killing import survivors
from tests.ranks import checked_torchrun
from tests.training import vqgan_ranked as ranked
from tests.training.dying import die, train_gan
from tests.training.toy_gan import TOY_GAN, colours

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def training_of(config: VQTrainConfig = TOY_GAN) -> VQLearner:
    training = VQLearner(config, CPU)
    training.share()
    return training


def batch(step: int, config: VQTrainConfig = TOY_GAN) -> Tensor:
    """The images of a step, counted from 1."""
    settings = {"size": config.size, "crop_range": config.crop_range, "mirror": config.mirror}
    with CropLoader(colours(), **settings, batch_size=config.batch_size, seed=config.seed) as pixels:
        return to_pixels(pixels.batch(step - 1)).contiguous()


def steps(training: VQLearner, numbers: range, rate: float = 3e-3) -> list[dict[str, Tensor]]:
    return [training.step(batch(step), step, rate) for step in numbers]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


# Gradients


def losses_of(training: VQLearner, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    made = training.network(images)
    losses = {"l1": F.l1_loss(made.images, images), "l2": F.mse_loss(made.images, images)}
    losses["adversarial"] = -training.adversary(made.images).mean()
    return losses | {"codebook": made.codebook_loss, "commitment": made.commitment_loss}, made.images


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("heard", [True, False])
def test_backward_is_plain_backward_of_the_weighted_sum(adaptive: bool, heard: bool) -> None:
    config = replace(TOY_GAN, l1_weight=0.7, l2_weight=1.3, codebook_weight=0.9, commitment=0.4)
    config = replace(config, adversary=replace(config.adversary, weight=0.6, adaptive=adaptive))
    training = training_of(config)
    training.adversary.requires_grad_(False)
    last = training.network.last_layer

    losses, _ = losses_of(training, batch(1))
    likeness = 0.7 * losses["l1"] + 1.3 * losses["l2"]
    weight = 0.6 if heard else 0.0
    if adaptive and heard:
        ours, theirs = (
            torch.autograd.grad(losses_, last, retain_graph=True)[0] for losses_ in (likeness, losses["adversarial"])
        )
        weight *= (ours.square().sum().sqrt() / (theirs.square().sum().sqrt() + 1e-4)).item()
    total = likeness + weight * losses["adversarial"] + 0.9 * losses["codebook"] + 0.4 * losses["commitment"]
    total.backward()
    expected = gradients(training.network)

    training.network.zero_grad()
    losses, made = losses_of(training, batch(1))
    if not heard:
        del losses["adversarial"]
    found_weight = backward(losses, made, last, config)
    found = gradients(training.network)
    assert float(found_weight) == pytest.approx(weight, rel=1e-4)
    assert (weight > 1) == (adaptive and heard)
    assert found.keys() == expected.keys() == dict(training.network.named_parameters()).keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(("against", "expected"), [(2.0, 0.5 * 5 / 2.0001), (0.0, 0.5 * 1e4), (1e-5, 0.5 * 1e4)])
def test_the_adaptive_weight_is_the_ratio_of_gradients_and_has_a_limit(against: float, expected: float) -> None:
    last = torch.tensor(1.0, requires_grad=True)
    made = last * torch.tensor([1.0])
    zero = (last * 0).sum()
    scale = 5.0 if against else 50.0
    losses = {"l1": scale * made.sum(), "adversarial": against * made.sum(), "codebook": zero, "commitment": zero}
    weight = backward(losses, made, last, replace(TOY_GAN, l1_weight=1.0))
    assert float(weight) == pytest.approx(expected)
    assert last.grad is not None
    assert last.grad.item() == pytest.approx(scale + expected * against)


# A step


def test_the_first_batchs_features_become_the_codebook() -> None:
    training = training_of()
    with torch.no_grad():
        features = training.network.reader(batch(1)).permute(0, 2, 3, 1).reshape(-1, 4)
    steps(training, range(1, 2))
    codebook = training.network.codebook.detach()
    assert (codebook[:, None] == features[None]).all(dim=2).any(dim=1).all()
    assert len(codebook.unique(dim=0)) > 4
    assert torch.equal(training.ema.codebook, codebook)
    assert (training.network.idle == -1).all()  # revived, and not chosen yet


def test_without_revival_the_codebook_begins_and_stays_as_it_is_trained() -> None:
    training = training_of(replace(TOY_GAN, revive_after=0))
    before = training.network.codebook.detach().clone()
    steps(training, range(1, 5))
    assert (training.network.codebook - before).abs().max() < 4 * 3e-3 * 1.1  # four steps of Adam and no jump


def test_codes_are_revived_when_they_have_been_idle_so_long_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TOY_GAN, model=replace(TOY_GAN.model, codebook_size=48))
    training = training_of(config)
    used: list[Tensor] = []
    revived: list[Tensor] = []
    training.network.register_forward_hook(lambda _module, _args, made: used.append(made.codes.unique()))
    revive = module.revive

    def watched(codebook: nn.Parameter, averaged: nn.Parameter, dead: Tensor, *rest: Any) -> int:
        before = codebook.detach().clone()
        revived.append(dead.clone())
        count = revive(codebook, averaged, dead, *rest)
        assert count == dead.sum()
        assert torch.equal(codebook[~dead], before[~dead])
        return count

    monkeypatch.setattr(module, "revive", watched)
    idle, chosen = torch.zeros(48), torch.full((48,), torch.inf)  # steps since used or revived; since chosen
    expected: list[Tensor] = []
    for step in range(1, 13):
        found = training.step(batch(step), step, 3e-3)
        idle += 1
        idle[used[-1]] = 0
        chosen += 1
        chosen[used[-1]] = 0
        assert found["codes_in_use"].item() == pytest.approx((chosen < 3).float().mean().item())
        if step in (1, 3, 6, 9, 12):
            dead = idle >= (0 if step == 1 else 3)
            expected.append(dead)
            idle[dead] = 0
            chosen[dead] = torch.inf
        assert torch.equal(training.network.idle, torch.where(chosen.isinf(), -1 - idle, idle))
    assert [dead.tolist() for dead in revived] == [dead.tolist() for dead in expected]
    assert [int(dead.sum()) for dead in expected[:2]] == [48, 0]  # idle for 2 steps only
    assert 0 < max(int(dead.sum()) for dead in expected[2:]) < 48


def test_perplexity_counts_the_batchs_codes() -> None:
    training = training_of()
    codes: list[Tensor] = []
    training.network.register_forward_hook(lambda _module, _args, made: codes.append(made.codes))
    for found in steps(training, range(1, 4)):
        shares = np.unique(codes.pop(0).numpy(), return_counts=True)[1] / (4 * 36)
        assert found["perplexity"].item() == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def test_the_ema_decay_rises_to_its_final_value() -> None:
    training = training_of(replace(TOY_GAN, revive_after=0, ema_decay=0.3))
    assert not any(parameter.requires_grad for parameter in training.ema.parameters())
    for step in range(1, 6):
        before = weights(training.ema)
        steps(training, range(step, step + 1))
        decay = min(0.3, (1 + step) / (10 + step))  # 0.18, 0.25, 0.3, 0.3, 0.3
        for name, live in training.network.named_parameters():
            expected = decay * before[name] + (1 - decay) * live
            torch.testing.assert_close(weights(training.ema)[name], expected, rtol=1e-5, atol=1e-6)


def test_the_discriminator_is_silent_and_untouched_until_its_start() -> None:
    training, deaf = training_of(), training_of(replace(TOY_GAN, adversary=replace(TOY_GAN.adversary, start=100)))
    before = weights(training.adversary)
    early, without = steps(training, range(1, 7)), steps(deaf, range(1, 7))
    assert not training.adversary_optimizer.state
    for name, value in weights(training.adversary).items():
        assert torch.equal(value, before[name])
    for found, same in zip(early, without, strict=True):
        assert found.keys() == same.keys()
        assert {"loss_adversarial", "loss_discriminator"} & found.keys() == set()
        assert found["adversarial_weight"] == 0
        assert all(torch.equal(found[key], same[key]) for key in found)
    (heard,), (unheard,) = steps(training, range(7, 8)), steps(deaf, range(7, 8))
    assert {*heard} - {*unheard} == {"loss_adversarial", "loss_discriminator"}
    assert heard["adversarial_weight"] > 0
    assert torch.equal(heard["loss_l1"], unheard["loss_l1"])
    assert not torch.equal(heard["grad_norm"], unheard["grad_norm"])
    assert not torch.equal(training.network.last_layer, deaf.network.last_layer)
    for name, value in weights(training.adversary).items():
        if value.dim() == 4:
            assert not torch.equal(value, before[name])


def test_the_discriminator_learns_from_real_and_made_images_by_the_hinge_loss() -> None:
    training = training_of()
    steps(training, range(1, 7))
    adversary, network = copy.deepcopy(training.adversary), copy.deepcopy(training.network)
    (found,) = steps(training, range(7, 8))
    real = batch(7)
    with torch.no_grad():
        made = network(real).images
    assert found["loss_adversarial"].item() == pytest.approx(-adversary(made).mean().item(), abs=1e-6)
    loss = hinge_loss(adversary(real), adversary(made))
    assert found["loss_discriminator"].item() == pytest.approx(loss.item(), abs=1e-6)
    loss.backward()
    nn.utils.clip_grad_norm_(adversary.parameters(), 1.0)
    groups = [
        {"params": [p for p in adversary.parameters() if p.dim() >= 2], "weight_decay": 0.05},
        {"params": [p for p in adversary.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95)).step()
    for name, value in weights(adversary).items():
        torch.testing.assert_close(weights(training.adversary)[name], value, rtol=0, atol=1e-4, msg=name)


def test_the_discriminator_learns_to_separate_real_images() -> None:
    config = replace(TOY_GAN, adversary=replace(TOY_GAN.adversary, start=0, weight=0.0))
    training = training_of(config)
    found = [entry["loss_discriminator"].item() for entry in steps(training, range(1, 31), rate=1e-2)]
    assert found[0] == pytest.approx(1, abs=0.1)  # undecided
    assert np.mean(found[-5:]) < 0.6


def test_the_gradient_norm_is_that_before_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TOY_GAN, optim=replace(TOY_GAN.optim, grad_clip=1e-3))
    clipped, free = training_of(config), training_of()
    norms: list[float] = []

    def watched(training: VQLearner) -> dict[str, Tensor]:
        step = training.optimizer.step
        monkeypatch.setattr(
            training.optimizer,
            "step",
            lambda: (
                norms.append(math.hypot(*(g.norm().item() for g in gradients(training.network).values()))),
                step(),
            ),
        )
        return training.step(batch(1), 1, 1e-3)

    found, plain = watched(clipped)["grad_norm"].item(), watched(free)["grad_norm"].item()
    assert found == pytest.approx(plain, rel=1e-5)
    assert found > 1e-2
    assert norms == pytest.approx([1e-3, min(1.0, plain)], rel=1e-3)


def test_the_perceptual_loss_takes_part_with_its_weight() -> None:
    config = replace(TOY_GAN, size=16, perceptual_weight=2.0, optim=replace(TOY_GAN.optim, grad_clip=0.0))
    training, plain = training_of(config), training_of(replace(config, perceptual_weight=0.0))
    assert plain.perceptual is None
    images = batch(1, config)
    network, loss = copy.deepcopy(training.network), PerceptualLoss(load_efficientnet())
    made = network(images)
    perceptual = loss(made.images, images)
    (F.l1_loss(made.images, images) + F.mse_loss(made.images, images) + 2 * perceptual).backward()
    found, without = (trainee.step(images, 1, 1e-3) for trainee in (training, plain))
    assert "loss_perceptual" not in without
    assert found["loss_perceptual"].item() == pytest.approx(perceptual.item(), rel=1e-4)
    expected = training_of(config)
    for (name, parameter), reference in zip(
        network.painter.named_parameters(), expected.network.painter.parameters(), strict=True
    ):
        assert parameter.grad is not None, name
        reference.grad = parameter.grad
    for group in expected.optimizer.param_groups:
        group["lr"] = 1e-3
    expected.optimizer.step()
    torch.testing.assert_close(training.network.last_layer, expected.network.last_layer, rtol=0, atol=1e-5)
    assert (
        training.network.last_layer - plain.network.last_layer
    ).abs().max() > 1e-3  # the steps of Adam have other signs


def test_bfloat16_is_only_for_the_convolutions() -> None:
    full, half = training_of(), training_of(replace(TOY_GAN, dtype="bfloat16"))
    (expected,), (found,) = (steps(training, range(1, 2)) for training in (full, half))
    for name in ("loss_l1", "loss_l2", "loss_commitment"):
        assert found[name].dtype == torch.float32
        assert found[name].item() == pytest.approx(expected[name].item(), rel=0.03)
        assert found[name] != expected[name]
    assert {parameter.dtype for parameter in [*half.network.parameters(), *half.ema.parameters()]} == {torch.float32}
    torch.testing.assert_close(half.network.codebook.norm(dim=1), torch.ones(16))  # features of length one


# What a run leaves


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TOY_GAN, never stopped. Tests that change a run take a copy: `run`."""
    return train_tokenizer(TOY_GAN, colours(), tmp_path_factory.mktemp("straight") / "run", preset="toy")


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    return shutil.copytree(straight, tmp_path / "run")


def log_of(run: Path) -> list[dict[str, Any]]:
    """The log without its only column that depends on the machine."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "images_per_second"} for entry in entries]


def trained(run: Path) -> list[dict[str, Any]]:
    return [entry for entry in log_of(run) if "loss_l1" in entry]


def evaluated(run: Path) -> list[dict[str, Any]]:
    return [entry for entry in log_of(run) if "psnr" in entry]


def assert_same_result(run: Path, expected: Path) -> None:
    """Equal bytes in the tokenizer and in the pictures, and equal logs."""
    found, wanted = contents(run), contents(expected)
    assert [name for name in wanted if not name.startswith("checkpoints") and name not in found] == []
    for name in ("vq.safetensors", "tokenizer.json", *(name for name in wanted if name.startswith("reconstructions"))):
        assert found[name] == wanted[name], name
    assert log_of(run) == log_of(expected)


def test_a_run_is_what_the_design_says(straight: Path) -> None:
    assert sorted(path.name for path in straight.iterdir()) == [
        *(".lock", "checkpoints", "config.json", "log.jsonl", "reconstructions", "tokenizer.json", "vq.safetensors")
    ]
    assert [step for step, _ in list_checkpoints(straight / "checkpoints")] == [8, 12]
    saved = json.loads((straight / "config.json").read_text())
    assert (saved["preset"], saved["dtype"]) == ("toy", "float32")
    assert saved["images"] == {"source": "colours", "images": 10, "content": ""}
    assert saved["config"]["adversary"]["start"] == 6
    assert saved["environment"]["torch"] == torch.__version__


def test_every_step_is_logged_with_its_losses(straight: Path) -> None:
    log = trained(straight)
    assert [entry["step"] for entry in log] == list(range(1, 13))
    always = {"step", "loss_l1", "loss_l2", "loss_codebook", "loss_commitment", "adversarial_weight", "grad_norm"}
    always |= {"perplexity", "codes_in_use", "lr"}
    for entry in log:
        heard = {"loss_adversarial", "loss_discriminator"} if entry["step"] > 6 else set()
        assert set(entry) == always | heard
        assert entry["loss_codebook"] == entry["loss_commitment"]
        assert entry["lr"] == 3e-3
        assert 1 <= entry["perplexity"] <= 16
        assert 0 < entry["codes_in_use"] <= 1


def test_lines_of_the_log_come_as_often_as_asked_for_and_at_the_end(tmp_path: Path) -> None:
    config = replace(TOY_GAN, steps=7, log_every=3, evaluate_every=100, checkpoint_every=100)
    train_tokenizer(config, colours(), tmp_path / "run")
    assert [entry["step"] for entry in trained(tmp_path / "run")] == [3, 6, 7]
    assert [entry["step"] for entry in evaluated(tmp_path / "run")] == [7]
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [7]


def test_evaluations_are_the_exported_tokenizers_and_have_pictures(straight: Path) -> None:
    log = evaluated(straight)
    assert [entry["step"] for entry in log] == [5, 10, 12]
    made, expected = reconstruct(load_tokenizer(straight), images := evaluation_images(colours(), 12, 6))
    assert log[-1] == {"step": 12, "evaluated_on": "colours", "images": 6, **expected._asdict()}
    for entry in log:
        with Image.open(straight / "reconstructions" / f"step_{entry['step']:08d}.png") as picture:
            assert picture.size == (6 * 12, 2 * 12)
            shown = np.asarray(picture)
        np.testing.assert_array_equal(shown[:12], np.concatenate(list(images), axis=1))
    np.testing.assert_array_equal(shown[12:], np.concatenate(list(made), axis=1))


def test_the_run_is_a_tokenizer_with_the_ema_weights(straight: Path) -> None:
    training = VQLearner(TOY_GAN, CPU)
    training.share()
    checkpoints = Checkpoints(straight / "checkpoints", keep=2)
    assert checkpoints.newest() == 12
    checkpoints.restore(12, training.state(12))
    expected, live = training.ema.tensors(), training.network.tensors()
    saved = load_file(straight / "vq.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert not any(torch.equal(saved[name], live[name]) for name in saved if saved[name].dim() == 4)
    tokenizer = load_tokenizer(straight)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.grid(12)) == ("vq", 16, 6)
    assert json.loads((straight / "tokenizer.json").read_text())["step"] == 12


def test_tokenizers_of_keep_every_steps_are_exported(straight: Path, tmp_path: Path) -> None:
    config = replace(TOY_GAN, checkpoint_every=3, keep=1, keep_every=6)
    train_tokenizer(config, colours(), tmp_path / "run", preset="toy")
    kept = tmp_path / "run" / "kept"
    assert sorted(path.name for path in kept.iterdir()) == ["step_00000006", "step_00000012"]
    last = contents(kept / "step_00000012")
    assert last == {name: content for name, content in contents(straight).items() if name in last}
    assert json.loads((kept / "step_00000006" / "tokenizer.json").read_text())["step"] == 6
    assert load_tokenizer(kept / "step_00000006").fingerprint != load_tokenizer(kept / "step_00000012").fingerprint
    (kept / "step_00000012" / "tokenizer.json").unlink()
    train_tokenizer(config, colours(), tmp_path / "run", resume=True, preset="toy")
    assert contents(kept / "step_00000012") == last


def test_a_step_by_hand_is_the_runs(tmp_path: Path) -> None:
    train_tokenizer(replace(TOY_GAN, steps=7), colours(), tmp_path / "run")
    training = training_of()
    steps(training, range(1, 8))
    expected = training.ema.tensors()
    for name, value in load_file(tmp_path / "run" / "vq.safetensors").items():
        assert torch.equal(value, expected[name]), name


def test_training_makes_reconstructions_better(tmp_path: Path) -> None:
    config = replace(TOY_GAN, steps=60, evaluate_every=10, checkpoint_every=100, revive_after=20, ema_decay=0.8)
    config = replace(config, crop_range=1.0, mirror=False, optim=replace(config.optim, lr=1e-2))
    config = replace(config, adversary=replace(config.adversary, start=50, weight=0.1))
    config = replace(config, model=replace(config.model, channels=16))
    out = train_tokenizer(config, colours(3), tmp_path / "run", test_images=colours(3, name="tested"))
    log, tests = trained(out), evaluated(out)
    assert np.mean([e["loss_l1"] for e in log[-5:]]) < 0.4 * np.mean([e["loss_l1"] for e in log[:5]])
    assert tests[-1]["psnr"] > tests[0]["psnr"] + 8
    assert tests[-1]["ssim"] > tests[0]["ssim"] + 0.2
    assert {entry["evaluated_on"] for entry in tests} == {"tested"}


def test_broken_images_are_listed_beside_the_run(tmp_path: Path) -> None:
    whole = list(colours().examples(0))
    files = [Example(encoded(e.read())[: 60 if i in (2, 7) else None], 0, f"{i}.png") for i, e in enumerate(whole)]
    source = replace(colours(), examples=lambda start: iter(files[start:]))
    train_tokenizer(replace(TOY_GAN, steps=2), source, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [2, 7]
    assert [line["reason"].split(":")[0] for line in lines] == ["2.png", "7.png"]


# Stopping and resuming


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TOY_GAN in processes that are killed. Each case is resumed by one test."""
    return die(train_gan, tmp_path_factory.mktemp("dead"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("instant", "step", "left"),
    [
        ("checkpoint", 8, [".step_00000008.partial", "step_00000004"]),  # after it
        ("export", 12, ["step_00000008", "step_00000012"]),
    ],
)
def test_a_run_killed_while_it_is_saved_ends_as_if_it_had_never_stopped(
    straight: Path, dead: Path, instant: str, step: int, left: list[str]
) -> None:
    case = dead / f"SIGKILL-{instant}-{step}"
    out = case / "run"
    assert int((case / "status").read_text()) == -signal.SIGKILL, (case / "said").read_text()
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == left
    train_tokenizer(TOY_GAN, colours(), out, resume=True, preset="toy")
    assert_same_result(out, straight)
    assert [step for step, _ in list_checkpoints(out / "checkpoints")] == [8, 12]


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    straight, *runs = survivors("tokenizer_training", tmp_path, kills=5)
    for run in runs:
        assert_same_result(run, straight)
        assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [10, 12]


def stopped(out: Path, step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> Interrupted:
    """TOY_GAN, sent a signal during a step."""
    with monkeypatch.context() as patch:
        take = VQLearner.step

        def signalled(training: VQLearner, images: Tensor, current: int, rate: float) -> dict[str, Tensor]:
            if current == step:
                os.kill(os.getpid(), number)
            return take(training, images, current, rate)

        patch.setattr(VQLearner, "step", signalled)
        with pytest.raises(Interrupted) as raised:
            train_tokenizer(TOY_GAN, colours(), out, preset="toy")
    return raised.value


@pytest.mark.parametrize(("step", "number"), [(3, signal.SIGINT), (6, signal.SIGTERM), (9, signal.SIGINT)])
def test_a_run_stopped_by_a_signal_saves_itself_and_resumes_exactly(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    interrupted = stopped(out, step, number, monkeypatch)
    assert interrupted.signum == number
    assert f"stopped at step {step} of 12; the run is saved: the same command with --resume" in str(interrupted)
    assert list_checkpoints(out / "checkpoints")[-1][0] == step
    assert json.loads((out / "tokenizer.json").read_text())["step"] == step
    assert load_tokenizer(out).vocab_size == 16
    train_tokenizer(TOY_GAN, colours(), out, resume=True, preset="toy")
    assert_same_result(out, straight)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_in_the_last_step_finds_the_run_finished(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        stopped(tmp_path / "run", 12, signal.SIGTERM, monkeypatch)
    assert_same_result(tmp_path / "run", straight)


def test_a_tokenizer_half_written_is_written_again(run: Path, straight: Path) -> None:
    (run / "tokenizer.json").unlink()
    (run / "vq.safetensors").write_bytes(b"half")
    train_tokenizer(TOY_GAN, colours(), run, resume=True, preset="toy")
    assert_same_result(run, straight)


def test_resuming_a_finished_run_changes_nothing_but_its_config(run: Path) -> None:
    before = contents(run)
    train_tokenizer(TOY_GAN, colours(), run, resume=True, preset="toy")
    after = contents(run)
    assert {name for name in after if after[name] != before.get(name)} <= {"config.json"}
    assert after.keys() == before.keys()


def test_steps_and_settings_that_alter_no_past_step_may_change(straight: Path, tmp_path: Path) -> None:
    first = replace(TOY_GAN, steps=7, evaluate_every=5, checkpoint_every=3, keep=5)
    train_tokenizer(first, colours(), tmp_path / "run", preset="toy")
    train_tokenizer(TOY_GAN, colours(), tmp_path / "run", resume=True, preset="toy")
    found, expected = (load_file(place / "vq.safetensors") for place in (tmp_path / "run", straight))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert trained(tmp_path / "run") == trained(straight)


def test_steps_may_not_be_added_once_the_rate_has_fallen_for_the_old_end(tmp_path: Path) -> None:
    config = replace(TOY_GAN, steps=4, optim=replace(TOY_GAN.optim, schedule="cosine"))
    train_tokenizer(config, colours(), tmp_path / "run")
    with refused(tmp_path, "steps was 4, now 8"):
        train_tokenizer(replace(config, steps=8), colours(), tmp_path / "run", resume=True)


CHANGES: dict[str, tuple[VQTrainConfig, str]] = {
    "seed": (replace(TOY_GAN, seed=1), "seed was 0, now 1"),
    "batch size": (replace(TOY_GAN, batch_size=5), "batch_size was 4, now 5"),
    "crops": (replace(TOY_GAN, crop_range=1.5), "crop_range was 1.25, now 1.5"),
    "commitment": (replace(TOY_GAN, commitment=1.0), "commitment was 0.25, now 1.0"),
    "codes": (replace(TOY_GAN, model=replace(TOY_GAN.model, codebook_size=8)), "model.codebook_size was 16, now 8"),
    "start": (replace(TOY_GAN, adversary=replace(TOY_GAN.adversary, start=9)), "adversary.start was 6, now 9"),
    "rate": (replace(TOY_GAN, optim=replace(TOY_GAN.optim, lr=1e-3)), "optim.lr was 0.003, now 0.001"),
    "type": (replace(TOY_GAN, dtype="bfloat16"), "dtype was float32, now bfloat16"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_is_not_resumed_with_other_settings(run: Path, what: str) -> None:
    config, message = CHANGES[what]
    with refused(run, f"was begun with other settings: .*{message}.*Give the old ones to resume it"):
        train_tokenizer(config, colours(), run, resume=True, preset="toy")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (colours(11), "images was 10, now 11"),
        (colours(name="others"), "source was colours, now others"),
        (colours(content="new"), "content was , now new"),
    ],
)
def test_a_run_is_not_resumed_on_other_images(run: Path, source: Any, message: str) -> None:
    with refused(run, f"was begun with other settings: .*{message}"):
        train_tokenizer(TOY_GAN, source, run, resume=True, preset="toy")


def test_fewer_steps_than_are_done_are_refused(run: Path) -> None:
    with refused(run, "has done 12 steps already, more than the 8 asked for"):
        train_tokenizer(replace(TOY_GAN, steps=8), colours(), run, resume=True, preset="toy")


def test_existing_files_are_not_overwritten(run: Path, tmp_path: Path) -> None:
    with refused(run, "holds a run already, with a checkpoint of step 12: give --resume to continue it"):
        train_tokenizer(TOY_GAN, colours(), run)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    with refused(tmp_path, "exists already and is not empty: a run is never overwritten"):
        train_tokenizer(TOY_GAN, colours(), tmp_path / "thesis")


def test_images_that_cannot_be_read_leave_no_run_behind(tmp_path: Path) -> None:
    broken = replace(colours(), examples=lambda start: (Example(b"", 0) for _ in range(start, 8)))
    with refused(tmp_path, "has no readable image"):
        train_tokenizer(TOY_GAN, colours(), tmp_path / "run", test_images=broken)


def test_a_tokenizer_without_a_checkpoint_is_not_trained_again(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with refused(run, "has weights of step 12 but no checkpoint to resume from"):
        train_tokenizer(TOY_GAN, colours(), run, resume=True, preset="toy")


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_there_must_be_a_run_to_resume(tmp_path: Path, name: str) -> None:
    with refused(tmp_path, "holds no run to resume"):
        train_tokenizer(TOY_GAN, colours(), tmp_path / name, resume=True)
    assert list(tmp_path.iterdir()) == []


# Trouble on the way


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_tokenizer(replace(TOY_GAN, steps=4, evaluate_every=5), colours(), out, preset="toy")
    before = {name: data for name, data in contents(out).items() if name.startswith(("checkpoints", "vq", "token"))}
    with (
        full_disk(1 << 15),
        pytest.raises(UserError, match=r"(?s)checkpoint of step 8 .*step_00000004 is intact.*--resume"),
    ):
        train_tokenizer(TOY_GAN, colours(), out, resume=True, preset="toy")
    after = contents(out)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name.startswith("checkpoints") and name not in before]
    train_tokenizer(TOY_GAN, colours(), out, resume=True, preset="toy")
    assert load_tokenizer(out).fingerprint == load_tokenizer(straight).fingerprint


EXPLODING = replace(TOY_GAN, optim=replace(TOY_GAN.optim, lr=1e30))


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"not finite at step 2 \(loss_.* is .*there is no checkpoint yet. Start a new run, with a lower --opt",
    ):
        train_tokenizer(EXPLODING, colours(), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [1]


def test_weights_that_explode_later_leave_a_checkpoint(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "learning_rate", lambda optim, step, total: 1e30 if step == 6 else optim.lr)
        with pytest.raises(UserError, match=r"not finite at step 7 .*the last good checkpoint is .*step_00000004"):
            train_tokenizer(TOY_GAN, colours(), tmp_path / "run", preset="toy")
    assert json.loads((tmp_path / "run" / "tokenizer.json").read_text())["step"] == 4
    train_tokenizer(TOY_GAN, colours(), tmp_path / "run", resume=True, preset="toy")
    assert_same_result(tmp_path / "run", straight)


def test_a_run_starts_from_another_tokenizer(straight: Path, tmp_path: Path) -> None:
    anew = replace(TOY_GAN, steps=1)
    train_tokenizer(anew, colours(), tmp_path / "random", preset="toy")
    train_tokenizer(anew, colours(), tmp_path / "init", init=straight, preset="toy")
    random, started = log_of(tmp_path / "random")[0], log_of(tmp_path / "init")[0]
    assert started["loss_l1"] < random["loss_l1"]
    assert started["codes_in_use"] > 0.5  # its codebook is kept, and chosen from
    more = replace(anew, steps=2)
    with pytest.raises(UserError, match=r"was begun with other settings: init.fingerprint was .*, now None"):
        train_tokenizer(more, colours(), tmp_path / "init", resume=True, preset="toy")
    train_tokenizer(more, colours(), tmp_path / "init", init=straight, resume=True, preset="toy")
    wider = replace(anew, model=replace(anew.model, codebook_size=anew.model.codebook_size + 1))
    with pytest.raises(UserError, match=r"--init has the architecture .*: give a tokenizer of the preset's"):
        train_tokenizer(wider, colours(), tmp_path / "wider", init=straight, preset="toy")
    assert not (tmp_path / "wider").exists()


# Several ranks


@pytest.mark.slow
def test_two_ranks_train_as_one_and_only_the_first_writes(tmp_path: Path) -> None:
    ranked.train(tmp_path / "alone")
    checked_torchrun(2, "-m", "tests.training.vqgan_ranked", tmp_path / "joined", logs=tmp_path / "logs")
    assert sorted(path.name for path in (tmp_path / "joined").iterdir()) == ["rank-0"]
    joined, alone = (load_file(tmp_path / name / "vq.safetensors") for name in ("joined/rank-0", "alone"))
    for name, value in alone.items():
        torch.testing.assert_close(joined[name], value, rtol=0, atol=1e-5, msg=name)
    log = trained(tmp_path / "alone")
    for found, expected in zip(trained(tmp_path / "joined" / "rank-0"), log, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    in_use = {entry["step"]: entry["codes_in_use"] for entry in log}
    assert min(in_use.values()) < 1  # some of the many codes are never chosen, although they are revived
    assert ["loss_discriminator" in entry for entry in log] == [False] * 3 + [True] * 5


TINY = VQConfig(channels=8, multipliers=(1, 2), z_channels=8, codebook_size=16, codebook_dim=4, residual_blocks=1)


def network(seed: int = 0) -> VQGAN:
    """With codes of many lengths, none of which is 1: only their directions count."""
    torch.manual_seed(seed)
    made = VQGAN(TINY)
    with torch.no_grad():
        made.codebook *= torch.linspace(0.3, 3, 16)[:, None]
    return made


def pictures(count: int = 3, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# The network


def nearest_by_hand(z: Tensor, codebook: Tensor) -> Tensor:
    """Codes of features [B, d, h, w]: of each place the unit code at the smallest Euclidean distance, one by one."""
    unit = [code / code.norm() for code in codebook.detach()]
    codes = torch.zeros(len(z), *z.shape[2:], dtype=torch.int64)
    for image in range(len(z)):
        for row in range(z.shape[2]):
            for column in range(z.shape[3]):
                here = z[image, :, row, column]
                codes[image, row, column] = int(torch.stack([(here - code).norm() for code in unit]).argmin())
    return codes


def test_forward_is_what_a_plain_loop_gives() -> None:
    gan, images = network(), pictures()
    made = gan(images)
    with torch.no_grad():
        z = gan.reader(images)
        codes = nearest_by_hand(z, gan.codebook)
        q = torch.zeros_like(z)
        for image, row, column in torch.cartesian_prod(*map(torch.arange, codes.shape)):
            code = gan.codebook[codes[image, row, column]]
            q[image, :, row, column] = code / code.norm()
        painted = gan.painter(q)
    assert torch.equal(made.codes, codes)
    assert len(codes.unique()) > 3
    torch.testing.assert_close(made.images, painted, rtol=0, atol=1e-5)
    assert made.codebook_loss.item() == pytest.approx((q - z).square().mean().item(), rel=1e-5)
    assert made.commitment_loss.item() == pytest.approx((q - z).square().mean().item(), rel=1e-5)
    assert torch.equal(
        made.features, torch.stack([z[b, :, i, j] for b, i, j in torch.cartesian_prod(*map(torch.arange, codes.shape))])
    )
    assert not made.features.requires_grad
    torch.testing.assert_close(made.features.norm(dim=1), torch.ones(48))


def loss_gradients(gan: VQGAN, loss: Callable[[VQGAN], Tensor]) -> dict[str, Tensor]:
    """Of each parameter that the loss reaches."""
    gan.zero_grad()
    loss(gan).backward()
    return {name: p.grad.clone() for name, p in gan.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_reader_gets_the_gradient_at_the_codes() -> None:
    gan, images = network(), pictures()
    found = loss_gradients(gan, lambda g: F.mse_loss(g(images).images, images))
    with torch.no_grad():
        codes = gan(images).codes
    q = F.normalize(gan.codebook.detach())[codes].permute(0, 3, 1, 2).requires_grad_()
    gan.zero_grad()
    F.mse_loss(gan.painter(q), images).backward()
    assert q.grad is not None
    painter = {f"painter.{name}": p.grad.clone() for name, p in gan.painter.named_parameters() if p.grad is not None}
    gan.zero_grad()
    gan.reader(images).backward(q.grad)
    reader = {f"reader.{name}": p.grad.clone() for name, p in gan.reader.named_parameters() if p.grad is not None}
    assert "codebook" not in found  # the likeness does not move the codes
    assert any(name.startswith("reader.encoder") for name in found)
    for name, expected in (painter | reader).items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(expected)), expected, rtol=1e-4, atol=1e-6)


def test_the_codebook_loss_moves_only_the_codes_in_use() -> None:
    gan, images = network(), pictures()
    found = loss_gradients(gan, lambda g: g(images).codebook_loss)
    assert set(found) == {"codebook"}
    with torch.no_grad():
        made, z = gan(images), gan.reader(images)
    used = torch.zeros(16, dtype=torch.bool)
    used[made.codes.flatten()] = True
    assert torch.equal(found["codebook"].abs().sum(dim=1) > 0, used)
    codebook = gan.codebook.detach().clone().requires_grad_()
    q = (codebook / codebook.norm(dim=1, keepdim=True))[made.codes].permute(0, 3, 1, 2)
    ((q - z) ** 2).mean().backward()
    torch.testing.assert_close(found["codebook"], codebook.grad)


def test_the_commitment_loss_moves_only_the_encoder() -> None:
    gan, images = network(), pictures()
    found = loss_gradients(gan, lambda g: g(images).commitment_loss)
    assert found
    assert all(name.startswith("reader.") for name in found)
    with torch.no_grad():
        made = gan(images)
    q = F.normalize(gan.codebook.detach())[made.codes].permute(0, 3, 1, 2)
    expected = loss_gradients(gan, lambda g: ((q - g.reader(images)) ** 2).mean())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_the_losses_pull_features_and_codes_together() -> None:
    gan, images = network(), pictures()
    optimizer = torch.optim.Adam(gan.parameters(), lr=1e-3)
    before = gan(images).codebook_loss.item()
    for _ in range(30):
        made = gan(images)
        optimizer.zero_grad()
        (made.codebook_loss + 0.25 * made.commitment_loss).backward()
        optimizer.step()
    assert gan(images).codebook_loss.item() < 0.5 * before


def test_the_weights_are_a_tokenizers_with_the_same_codes_and_reconstructions() -> None:
    gan, images = network(), pictures()
    tokenizer = VQTokenizer(TINY, gan.tensors())
    with torch.no_grad():
        made = gan(images)
    assert torch.equal(tokenizer.encode(images), made.codes)
    torch.testing.assert_close(tokenizer.decode(made.codes), made.images, rtol=0, atol=1e-5)
    assert {name.split(".")[0] for name in gan.tensors()} == {
        *("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
    }
    assert not any(tensor.requires_grad for tensor in gan.tensors().values())


def test_codes_begin_at_length_one() -> None:
    torch.manual_seed(0)
    torch.testing.assert_close(VQGAN(TINY).codebook.norm(dim=1), torch.ones(16))


def test_an_image_is_reconstructed_alike_alone_and_in_a_batch() -> None:
    gan, images = network(), pictures()
    with torch.no_grad():
        torch.testing.assert_close(gan(images[1:2]).images, gan(images).images[1:2], rtol=0, atol=1e-5)


# The discriminator


@given(real=st.lists(st.floats(-3, 3), min_size=1, max_size=6), fake=st.lists(st.floats(-3, 3), min_size=1, max_size=6))
def test_hinge_loss_against_its_formula(real: list[float], fake: list[float]) -> None:
    expected = sum(max(0.0, 1 - r) for r in real) / len(real) + sum(max(0.0, 1 + f) for f in fake) / len(fake)
    assert hinge_loss(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(expected / 2, abs=1e-6)


def test_hinge_loss_of_sure_and_of_mistaken_verdicts() -> None:
    ones = torch.ones(2, 1, 3, 3)
    assert hinge_loss(ones * 1.5, -ones).item() == 0
    assert hinge_loss(ones * 0, ones * 0).item() == 1
    assert hinge_loss(-ones, ones * 2).item() == 2.5  # (2 + 3) / 2


def discriminator(layers: int) -> Discriminator:
    """Its last layer's zeros would hide what a verdict depends on."""
    torch.manual_seed(0)
    made = Discriminator(AdversaryConfig(channels=4, layers=layers))
    for parameter in made.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.1)
    return made


@pytest.mark.parametrize(("layers", "size", "verdicts"), [(1, 16, 6), (2, 32, 6), (3, 64, 6), (3, 256, 30), (2, 12, 1)])
def test_there_is_a_verdict_for_every_patch(layers: int, size: int, verdicts: int) -> None:
    with torch.device("meta"):
        judge = Discriminator(AdversaryConfig(layers=layers))
        assert judge(torch.empty(2, 3, size, size)).shape == (2, 1, verdicts, verdicts)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_verdict_sees_as_many_pixels_as_promised(layers: int) -> None:
    # Group norms see the whole image: without them a verdict's gradient is where its convolutions look.
    judge = discriminator(layers)
    plain = nn.Sequential(*(layer for layer in judge.layers if not isinstance(layer, nn.GroupNorm)))
    seen = 9 * 2**layers - 2
    size = 2**layers * (2 * (seen // 2**layers) // 2 + 6)
    images = torch.randn(1, 3, size, size, requires_grad=True)
    verdicts = plain(images)
    middle = verdicts.shape[2] // 2
    verdicts[0, 0, middle, middle].backward()
    assert images.grad is not None
    touched = images.grad[0].abs().sum(dim=0) > 0
    rows, columns = touched.any(dim=1).nonzero(), touched.any(dim=0).nonzero()
    assert (int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1) == (seen, seen)


def test_a_verdict_does_not_depend_on_the_batch() -> None:
    judge, images = discriminator(2), pictures(4, 32)
    with torch.no_grad():
        together, alone = judge(images), torch.cat([judge(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3  # it does depend on the image


def test_the_convolutions_start_small() -> None:
    torch.manual_seed(0)
    judge = Discriminator(AdversaryConfig(channels=16, layers=2))
    for layer in judge.layers:
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 1000:
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)


# Codes brought back to life

DEAD = [1, 4, 5, 11]


def revived(seed: int = 0) -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer, Tensor, tuple[Tensor, ...]]:
    """A codebook after two optimizer steps, of which some codes were revived; and what was there before."""
    torch.manual_seed(0)
    codebook, averaged = (nn.Parameter(torch.randn(16, 4)) for _ in range(2))
    optimizer = torch.optim.AdamW([codebook], fused=True)
    for _ in range(2):
        codebook.grad = torch.randn(16, 4)
        optimizer.step()
    state = optimizer.state[codebook]
    before = tuple(t.detach().clone() for t in (codebook, averaged, state["exp_avg"], state["exp_avg_sq"]))
    features = F.normalize(torch.randn(20, 4), dim=-1)
    dead = torch.zeros(16, dtype=torch.bool)
    dead[DEAD] = True
    generator = torch.Generator().manual_seed(seed)
    assert revive(codebook, averaged, dead, features, optimizer, generator) == len(DEAD)
    return codebook, averaged, optimizer, features, before


def test_dead_codes_become_features_in_both_codebooks_and_the_others_stay() -> None:
    codebook, averaged, _, features, before = revived()
    for row in range(16):
        if row in DEAD:
            assert (features == codebook[row]).all(dim=1).any()
            assert torch.equal(averaged[row], codebook[row])
        else:
            assert torch.equal(codebook[row], before[0][row])
            assert torch.equal(averaged[row], before[1][row])


def test_only_the_moments_of_revived_codes_are_reset() -> None:
    codebook, _, optimizer, _, before = revived()
    state = optimizer.state[codebook]
    for name, old in (("exp_avg", before[2]), ("exp_avg_sq", before[3])):
        kept = [row for row in range(16) if row not in DEAD]
        assert not state[name][DEAD].any()
        assert torch.equal(state[name][kept], old[kept])
        assert old[DEAD].abs().min() > 0
    assert state["step"].item() == 2


def test_draws_depend_only_on_the_generator() -> None:
    first, again, other = revived(0)[0], revived(0)[0], revived(1)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_before_the_first_optimizer_step_there_are_no_moments_to_forget() -> None:
    codebook, averaged = (nn.Parameter(torch.zeros(4, 2)) for _ in range(2))
    features = torch.tensor([[0.6, 0.8]])
    optimizer = torch.optim.AdamW([codebook])
    dead = torch.tensor([True, False, True, True])
    assert revive(codebook, averaged, dead, features, optimizer, torch.Generator()) == 3
    assert torch.equal(codebook.detach(), dead[:, None] * features)


def test_where_none_is_dead_nothing_happens() -> None:
    codebook = nn.Parameter(torch.randn(4, 2))
    before = copy.deepcopy(codebook)
    none = torch.zeros(4, dtype=torch.bool)
    optimizer = torch.optim.AdamW([codebook])
    assert revive(codebook, codebook, none, torch.ones(3, 2), optimizer, torch.Generator()) == 0
    assert torch.equal(codebook, before)
