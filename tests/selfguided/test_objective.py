import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from st_ar.config import PLAIN, ModelConfig, SelfGuidedConfig
from st_ar.model.transformer import Transformer
from st_ar.selfguided.guidance import (
    EMATeacher,
    GuidanceSample,
    Projector,
    ema_decay,
    make_teacher,
    random_key_mask,
    random_positions,
    sample_guidance,
    show_own_position,
)
from st_ar.selfguided.losses import next_token_loss
from st_ar.selfguided.objective import Losses, SelfGuided
from st_ar.training.loop import Learner, forward_backward
from tests.reference import equations
from tests.toys import TINY, random_model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(batch=st.integers(1, 8), length=st.integers(1, 40), ratio=st.floats(0, 0.999), seed=st.integers(0, 2**32))
def test_each_sequence_has_the_exact_count_masked_and_never_its_class(
    batch: int, length: int, ratio: float, seed: int
) -> None:
    mask = random_key_mask(batch, length, ratio, seeded(seed))
    assert mask.dtype == torch.bool
    assert mask.shape == (batch, length)
    assert mask.sum(1).tolist() == [round(ratio * (length - 1))] * batch
    assert not mask[:, 0].any()


@given(batch=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_a_share_of_the_sequences_is_masked_and_the_others_are_not(batch: int, share: float, seed: int) -> None:
    mask = random_key_mask(batch, 9, 0.5, seeded(seed), share=share)
    assert sorted(mask.sum(1).tolist()) == [0] * (batch - round(share * batch)) + [4] * round(share * batch)
    everyone = random_key_mask(batch, 9, 0.5, seeded(seed))
    masked = mask.any(1)
    assert torch.equal(mask[masked], everyone[masked])


@given(
    batch=st.integers(1, 12),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
    cut=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
def test_a_part_of_the_batch_is_masked_as_it_is_in_the_whole(
    batch: int, share: float, seed: int, cut: tuple[int, int]
) -> None:
    mine = slice(min(cut), max(cut))
    whole = random_key_mask(batch, 9, 0.5, seeded(seed), share=share)
    assert torch.equal(random_key_mask(batch, 9, 0.5, seeded(seed), share=share, rows=mine), whole[mine])


def test_each_sequence_is_as_likely_to_be_masked() -> None:
    generator, draws = seeded(0), 4000
    counts = sum(random_key_mask(6, 9, 0.5, generator, share=0.5).any(1).double() for _ in range(draws))
    assert isinstance(counts, Tensor)
    assert (counts / draws - 0.5).abs().max() < 4.5 * math.sqrt(0.25 / draws)


def test_a_quarter_of_255_image_keys_is_64() -> None:
    assert random_key_mask(3, 256, 0.25, seeded(0)).sum(1).tolist() == [64, 64, 64]


def test_sequences_are_masked_differently() -> None:
    mask = random_key_mask(64, 65, 0.25, seeded(0))
    assert len({tuple(row) for row in mask.tolist()}) == 64


def test_every_image_key_is_masked_equally_often_and_independently_of_the_others() -> None:
    draws, keys, ratio = 6000, 10, 0.3
    mask = random_key_mask(draws, keys + 1, ratio, seeded(1))[:, 1:].double()
    error = math.sqrt(ratio * (1 - ratio) / draws)
    assert (mask.mean(0) - ratio).abs().max() < 4.5 * error
    together = mask.T @ mask / draws
    expected = 3 * 2 / (10 * 9)  # both of two given keys among the three masked of ten
    apart = together[~torch.eye(keys, dtype=torch.bool)]
    assert (apart - expected).abs().max() < 4.5 * math.sqrt(expected * (1 - expected) / draws)


@given(seed=st.integers(0, 2**32))
def test_random_choices_depend_only_on_the_generator(seed: int) -> None:
    torch.manual_seed(0)
    first = random_key_mask(4, 65, 0.25, seeded(seed)), random_positions(65, 8, seeded(seed))
    torch.manual_seed(1)
    again = random_key_mask(4, 65, 0.25, seeded(seed)), random_positions(65, 8, seeded(seed))
    other = random_key_mask(4, 65, 0.25, seeded(seed + 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other)


def naive_own_visible(mask: Tensor) -> Tensor:
    batch, length = mask.shape
    out = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        for query in range(length):
            for key in range(length):
                out[b, query, key] = bool(mask[b, key]) and key != query
    return out


@given(batch=st.integers(1, 4), length=st.integers(1, 12), ratio=st.floats(0, 0.999), seed=st.integers(0, 2**32))
def test_own_position_can_be_shown_and_nothing_else(batch: int, length: int, ratio: float, seed: int) -> None:
    mask = random_key_mask(batch, length, ratio, seeded(seed))
    before = mask.clone()
    assert torch.equal(show_own_position(mask), naive_own_visible(mask))
    assert torch.equal(mask, before)


@given(length=st.integers(1, 300), data=st.data(), seed=st.integers(0, 2**32))
def test_positions_are_distinct_ascending_and_in_range(length: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, length))
    positions = random_positions(length, count, seeded(seed))
    assert positions.dtype == torch.int64
    found = positions.tolist()
    assert len(found) == count
    assert found == sorted(set(found))
    assert found[0] >= 0
    assert found[-1] < length


@given(length=st.integers(1, 40), data=st.data(), seed=st.integers(0, 2**32))
def test_positions_may_begin_later(length: int, data: st.DataObject, seed: int) -> None:
    first = data.draw(st.integers(0, length - 1))
    count = data.draw(st.integers(1, length - first))
    positions = random_positions(length, count, seeded(seed), first=first).tolist()
    assert positions == sorted(set(positions))
    assert len(positions) == count
    assert first <= positions[0] <= positions[-1] < length


def test_all_positions_can_be_taken() -> None:
    assert random_positions(7, 7, seeded(3)).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_every_position_is_drawn_equally_often() -> None:
    draws, length, count = 4000, 9, 4
    generator = seeded(0)
    drawn = torch.cat([random_positions(length, count, generator) for _ in range(draws)])
    share = drawn.bincount(minlength=length).double() / draws
    expected = count / length
    assert (share - expected).abs().max() < 4.5 * math.sqrt(expected * (1 - expected) / draws)


CONFIG = SelfGuidedConfig(projector_hidden=8, positions=3)
WITH_DROPOUT = ModelConfig(dim=8, n_layers=2, n_heads=1, vocab_size=5, grid=2, num_classes=2)


def move(model: Transformer, amount: float) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters(), start=1):
            parameter.add_(amount * number)


def one_step(student: SelfGuided, teacher: EMATeacher) -> Losses:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(TINY.vocab_size, (3, 2, TINY.sequence_length), generator=generator)
    labels = torch.tensor([0, 3, 1])
    draws = sample_guidance(student.config, (3, 2, TINY.sequence_length), seed=0, step=1)
    targets = student.teach(teacher, tokens, labels, draws.positions)
    losses = student(tokens, labels, draws, targets)
    losses.total.backward()
    return losses


@pytest.mark.parametrize(("decay", "warmup"), [(0.9999, True), (0.3, True), (0.9, False)])
def test_teacher_is_the_moving_average_of_the_formula(decay: float, warmup: bool) -> None:
    student = random_model(seed=0)
    teacher = make_teacher(student, replace(CONFIG, ema_decay=decay, ema_warmup=warmup))
    expected = {name: value.double() for name, value in student.state_dict().items()}
    for step in range(1, 6):
        move(student, 0.1 * step)
        factor = min(decay, (1 + step) / (10 + step)) if warmup else decay
        assert teacher.update(student, step) == factor
        for name, value in student.state_dict().items():
            expected[name] = factor * expected[name] + (1 - factor) * value.double()
    for name, value in teacher.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(value, student.state_dict()[name])


@given(decay=st.floats(0, 0.99999), step=st.integers(1, 1_000_000))
def test_warm_up_limits_the_decay(decay: float, step: int) -> None:
    assert ema_decay(decay, step) == min(decay, (1 + step) / (10 + step))
    assert ema_decay(decay, step, warmup=False) == decay


def test_warm_up_begins_at_2_in_11_and_ends_at_the_decay() -> None:
    assert ema_decay(0.9999, 1) == 2 / 11
    assert ema_decay(0.9999, 80_000) < 0.9999
    assert ema_decay(0.9999, 90_000) == 0.9999


def test_a_long_slow_average_is_not_lost_to_rounding() -> None:
    student = random_model()
    teacher = make_teacher(student, SelfGuidedConfig(ema_warmup=False))
    start = {name: value.clone() for name, value in student.state_dict().items()}
    move(student, 1e-2)
    for step in range(1, 201):
        teacher.update(student, step)
    for name, value in teacher.model.state_dict().items():
        moved = (student.state_dict()[name] - start[name]).double() * (1 - 0.9999**200)
        torch.testing.assert_close((value - start[name]).double(), moved, rtol=0.02, atol=2e-5)


def test_teacher_is_a_copy_that_only_an_update_moves() -> None:
    student = random_model()
    teacher = make_teacher(student, CONFIG)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    assert {name: value.tolist() for name, value in before.items()} == {
        name: value.tolist() for name, value in student.state_dict().items()
    }
    move(student, 1.0)
    one_step(SelfGuided(student, CONFIG), teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    teacher.update(student, 1)
    assert not any(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())


def test_an_update_does_not_change_the_student() -> None:
    student = random_model()
    teacher = make_teacher(student, CONFIG)
    move(student, 1.0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    teacher.update(student, 1)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_teacher_of_a_student_in_training_stays_in_evaluation_mode() -> None:
    student = Transformer(WITH_DROPOUT).train()
    teacher = make_teacher(student, CONFIG)
    for _ in range(2):
        assert student.training
        assert not any(module.training for module in teacher.model.modules())
        assert teacher.train() is teacher
    tokens, labels = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1])
    first = teacher.model.features(tokens, labels, layers=[2])[2]
    assert torch.equal(teacher.model.features(tokens, labels, layers=[2])[2], first)
    assert not torch.equal(student.features(tokens, labels, layers=[2])[2], first)


def test_no_gradient_reaches_the_teacher() -> None:
    model = random_model()
    teacher = make_teacher(model, CONFIG)
    student = SelfGuided(model, CONFIG)
    losses = one_step(student, teacher)
    assert min(losses.mim, losses.step, losses.view) > 0
    for name, parameter in teacher.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_teacher_is_no_part_of_the_student() -> None:
    model = random_model()
    teacher = make_teacher(model, CONFIG)
    ours = {parameter.data_ptr() for parameter in SelfGuided(model, CONFIG).parameters()}
    assert not ours & {parameter.data_ptr() for parameter in teacher.parameters()}


BASE = SelfGuidedConfig(projector_hidden=12, positions=3)
IMAGES = 4


def build(config: SelfGuidedConfig = BASE) -> tuple[SelfGuided, EMATeacher]:
    """A student and a teacher that differs from it, as after some updates."""
    teacher = make_teacher(random_model(seed=1), config)
    torch.manual_seed(2)
    return SelfGuided(random_model(seed=0), config), teacher


def batch(views: int = 2, images: int = IMAGES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(TINY.vocab_size, (images, views, TINY.sequence_length), generator=generator)
    return tokens, torch.arange(images) % (TINY.num_classes + 1)  # the null class among them


def compute(
    config: SelfGuidedConfig = BASE, views: int = 2, autocast: bool = False
) -> tuple[SelfGuided, EMATeacher, GuidanceSample, Losses]:
    student, teacher = build(config)
    tokens, labels = batch(views)
    draws = sample_guidance(config, (IMAGES, views, TINY.sequence_length), seed=5, step=7)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        targets = student.teach(teacher, tokens, labels, draws.positions)
        losses = student(tokens, labels, draws, targets)
    return student, teacher, draws, losses


def naive(student: SelfGuided, teacher: EMATeacher, draws: GuidanceSample, views: int) -> dict[str, float]:
    """Eq. 8 from the two models' hidden states, each sequence read on its own."""
    config, tokens_labels = student.config, batch(views)
    tokens, labels = tokens_labels
    layer = config.contrast_layer or TINY.n_layers // 2
    logits, last, targets_last = [], [], []
    z, h = [], []
    with torch.no_grad():
        for b in range(IMAGES):
            for m in range(views):
                mask = None if draws.key_mask is None else draws.key_mask[b, m][None]
                inputs = tokens[b, m][None, :-1], labels[b][None]
                ours = student.model(*inputs, key_mask=mask, hidden=[layer, TINY.n_layers])
                theirs = teacher.model(*inputs, hidden=[layer, TINY.n_layers])
                logits.append(ours.logits[0])
                pair = ours.hidden[TINY.n_layers][0], theirs.hidden[TINY.n_layers][0]
                if config.mim_features == "after_norm":
                    pair = student.model.norm(pair[0]), teacher.model.norm(pair[1])
                last.append(pair[0])
                targets_last.append(pair[1])
                for position in draws.positions.tolist():
                    if student.projector is not None:
                        z.append(student.projector(ours.hidden[layer][0, position]))
                    h.append(theirs.hidden[layer][0, position])
    assert draws.positions is not None
    shape = (IMAGES, views, len(draws.positions), TINY.dim)
    terms = {
        "ar": equations.next_token_loss(torch.stack(logits), tokens.flatten(0, 1)),
        "mim": 0.0,
        "step": 0.0,
        "view": 0.0,
    }
    if config.alpha:
        terms["mim"] = equations.mim_loss(torch.stack(last), torch.stack(targets_last))
    if config.beta:
        how = torch.stack(z).view(shape), torch.stack(h).view(shape), config.temperature, config.reduction
        terms["step"] = equations.step_loss(*how) if config.step_loss else 0.0
        terms["view"] = equations.view_loss(*how) if config.view_loss else 0.0
    return {"total": equations.total(**terms, alpha=config.alpha, beta=config.beta)} | terms


# Every setting of the objective, with a value that is not BASE's. The others act elsewhere: negatives, every and until in the
# training loop (below and test_loop.py), ema_decay and ema_warmup in the teacher (test_teacher.py).
CHANGES: dict[str, Any] = {
    "mask_ratio": 0.6,
    "mask_own_position": False,
    "masked_share": 0.5,
    "first_position": 5,
    "alpha": 0.3,
    "beta": 2.0,
    "step_loss": False,
    "view_loss": False,
    "positions": 4,
    "contrast_layer": 3,
    "temperature": 0.7,
    "reduction": "sum",
    "projector_depth": 2,
    "projector_hidden": 7,
    "mim_features": "after_norm",
}
OTHERS: list[dict[str, Any]] = [
    {},
    {"alpha": 0.0},
    {"beta": 0.0},
    {"mask_ratio": 0.0},
    {"alpha": 0.0, "beta": 0.0},
    {"alpha": 0.0, "beta": 0.0, "mask_ratio": 0.0},
    {"contrast_layer": 1, "projector_depth": 1},
    {"contrast_layer": 4, "mim_features": "after_norm", "reduction": "sum"},
]


def test_every_setting_is_tried() -> None:
    names = {field.name for field in dataclasses.fields(SelfGuidedConfig)}
    assert set(CHANGES) == names - {"negatives", "every", "until", "ema_decay", "ema_warmup"}


@pytest.mark.parametrize("changes", [*({name: value} for name, value in CHANGES.items()), *OTHERS], ids=str)
def test_losses_against_the_naive_recomputation(changes: dict[str, Any]) -> None:
    config = replace(BASE, **changes)
    student, teacher, draws, losses = compute(config)
    expected = naive(student, teacher, draws, views=2)
    for name, value in losses._asdict().items():
        assert value.item() == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("views", [1, 3])
def test_losses_of_another_number_of_views_against_the_naive_recomputation(views: int) -> None:
    config = replace(BASE, view_loss=views > 1)
    student, teacher, draws, losses = compute(config, views=views)
    expected = naive(student, teacher, draws, views=views)
    for name, value in losses._asdict().items():
        assert value.item() == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_acts(name: str) -> None:
    base = compute()[-1]
    changed = compute(replace(BASE, **{name: CHANGES[name]}))[-1]
    assert abs(changed.total.item() - base.total.item()) > 1e-4


# What a setting acts on, and what it leaves alone


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"alpha": 0.3}, []),
        ({"beta": 2.0}, []),
        ({"mim_features": "after_norm"}, ["mim"]),
        ({"contrast_layer": 3}, ["step", "view"]),
        ({"temperature": 0.7}, ["step", "view"]),
        ({"reduction": "sum"}, ["step", "view"]),
        ({"step_loss": False}, ["step"]),
        ({"view_loss": False}, ["view"]),
        ({"positions": 4}, ["step", "view"]),
        ({"mask_ratio": 0.6}, ["ar", "mim", "step", "view"]),
        ({"mask_own_position": False}, ["ar", "mim", "step", "view"]),
        ({"masked_share": 0.5}, ["ar", "mim", "step", "view"]),
        ({"first_position": 5}, ["step", "view"]),
    ],
    ids=str,
)
def test_a_setting_moves_only_its_own_terms(changes: dict[str, Any], moved: list[str]) -> None:
    base, changed = compute()[-1], compute(replace(BASE, **changes))[-1]
    found = [name for name in ("ar", "mim", "step", "view") if getattr(base, name) != getattr(changed, name)]
    assert found == moved


def test_without_alpha_the_teachers_last_layers_are_not_run() -> None:
    student, teacher = build(replace(BASE, alpha=0.0))
    ran: list[int] = []
    for number, block in enumerate(teacher.model.blocks(), start=1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    tokens, labels = batch()
    targets = student.teach(teacher, tokens, labels, torch.tensor([0, 4, 8]))
    assert targets.last is None
    assert ran == [1, 2]


def test_without_beta_there_is_no_projector_and_no_mid_target() -> None:
    student, teacher = build(replace(BASE, beta=0.0))
    tokens, labels = batch()
    assert student.projector is None
    assert student.teach(teacher, tokens, labels, torch.tensor([0])).middle is None


def test_plain_training_never_runs_the_teacher_and_is_the_next_token_loss() -> None:
    student, teacher = build(PLAIN)
    ran: list[nn.Module] = []
    teacher.model.register_forward_hook(lambda module, *_: ran.append(module))
    teacher.model.layers[0].register_forward_hook(lambda module, *_: ran.append(module))
    tokens, labels = batch()
    draws = sample_guidance(PLAIN, (IMAGES, 2, TINY.sequence_length), seed=0, step=1)
    targets = student.teach(teacher, tokens, labels, draws.positions)
    losses = student(tokens, labels, draws, targets)
    assert draws.key_mask is None
    assert ran == []
    assert list(targets) == [None, None]
    logits = student.model(tokens.flatten(0, 1)[:, :-1], labels.repeat_interleave(2)).logits
    assert losses.total.item() == pytest.approx(next_token_loss(logits, tokens.flatten(0, 1)).item(), rel=1e-6)
    assert [losses.mim, losses.step, losses.view] == [0, 0, 0]


# The two passes


def test_teacher_sees_everything_and_the_student_does_not() -> None:
    student, teacher = build()
    tokens, labels = batch()
    positions = torch.tensor([2, 5, 8])
    targets = student.teach(teacher, tokens, labels, positions)
    draws = sample_guidance(BASE, (IMAGES, 2, TINY.sequence_length), seed=0, step=1)
    assert draws.key_mask is not None
    with torch.no_grad():
        inputs = tokens.flatten(0, 1)[:, :-1], labels.repeat_interleave(2)
        seen = teacher.model(*inputs, hidden=[2, 4]).hidden
        hidden = teacher.model(*inputs, hidden=[2, 4], key_mask=draws.key_mask.flatten(0, 1)).hidden
    assert targets.last is not None
    assert targets.middle is not None
    assert torch.equal(targets.last.flatten(0, 1), seen[4])
    assert torch.equal(targets.middle.flatten(0, 1), seen[2][:, positions])
    assert not torch.allclose(targets.last.flatten(0, 1), hidden[4])
    assert not targets.last.requires_grad
    assert not targets.middle.requires_grad


def test_one_pass_of_each_network_serves_all_terms() -> None:
    student, teacher = build()
    ran: list[str] = []
    for name, network in (("student", student.model), ("teacher", teacher.model)):
        for block in network.blocks():
            block.register_forward_hook(lambda *_, name=name: ran.append(name))
        network.output.register_forward_hook(lambda *_, name=name: ran.append(f"{name}'s head"))
    tokens, labels = batch()
    draws = sample_guidance(BASE, (IMAGES, 2, TINY.sequence_length), seed=0, step=1)
    targets = student.teach(teacher, tokens, labels, draws.positions)
    student(tokens, labels, draws, targets)
    assert ran == ["teacher"] * 4 + ["student"] * 4 + ["student's head"]


def test_an_image_of_its_own_teacher_unmasked_has_no_mim_loss() -> None:
    config = replace(BASE, mask_ratio=0.0, beta=0.0)
    model = random_model()
    student, teacher = SelfGuided(model, config), make_teacher(model, config)
    tokens, labels = batch()
    draws = sample_guidance(config, (IMAGES, 2, TINY.sequence_length), seed=0, step=1)
    losses = student(tokens, labels, draws, student.teach(teacher, tokens, labels, draws.positions))
    assert losses.mim.item() == pytest.approx(0, abs=1e-6)
    assert losses.total.item() == pytest.approx(losses.ar.item(), abs=1e-6)


def test_bfloat16_autocast_gives_nearly_the_same_losses() -> None:
    exact, rounded = compute()[-1], compute(autocast=True)[-1]
    assert not torch.equal(exact.total, rounded.total)
    for name in Losses._fields:
        assert getattr(rounded, name).item() == pytest.approx(getattr(exact, name).item(), rel=0.05), name


# Negatives and micro-batches


def gradients(config: SelfGuidedConfig, pieces: int) -> tuple[Losses, dict[str, Tensor]]:
    student, teacher = build(config)
    tokens, labels = batch()
    draws = sample_guidance(config, (IMAGES, 2, TINY.sequence_length), seed=5, step=7)
    losses = forward_backward(Learner(student, teacher, pieces, torch.float32), tokens, labels, draws)
    return losses, {
        name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("pieces", [2, 4])
def test_global_negatives_make_micro_batches_add_up_to_the_batch(pieces: int) -> None:
    whole, expected = gradients(BASE, 1)
    losses, found = gradients(BASE, pieces)
    torch.testing.assert_close(torch.stack(losses), torch.stack(whole), rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_local_negatives_are_those_of_the_micro_batch() -> None:
    config = replace(BASE, negatives="local")
    student, teacher = build(config)
    tokens, labels = batch()
    draws = sample_guidance(config, (IMAGES, 2, TINY.sequence_length), seed=5, step=7)
    with torch.no_grad():
        targets = student.teach(teacher, tokens, labels, draws.positions)
        hidden = student.model(
            tokens.flatten(0, 1)[:, :-1], labels.repeat_interleave(2), key_mask=draws.key_mask.flatten(0, 1), hidden=[2]
        ).hidden[2]
        z = student.projector(hidden.unflatten(0, (IMAGES, 2))[:, :, draws.positions])
    losses = gradients(config, 2)[0]
    for name, reference in (("step", equations.step_loss), ("view", equations.view_loss)):
        halves = [reference(z[i : i + 2], targets.middle[i : i + 2], 0.2, "mean") for i in (0, 2)]
        assert getattr(losses, name).item() == pytest.approx(sum(halves) / 2, abs=1e-5)
        assert getattr(gradients(BASE, 2)[0], name).item() > getattr(losses, name).item()  # more negatives cost more
    torch.testing.assert_close(torch.stack(gradients(config, 1)[0]), torch.stack(gradients(BASE, 1)[0]))


# Projector


@pytest.mark.parametrize(("depth", "shapes"), [(1, [(6, 6)]), (2, [(9, 6), (6, 9)]), (3, [(9, 6), (9, 9), (6, 9)])])
def test_projector_depth_and_hidden_width(depth: int, shapes: list[tuple[int, int]]) -> None:
    projector = Projector(6, 9, depth)
    linears = [module for module in projector if isinstance(module, nn.Linear)]
    assert [tuple(linear.weight.shape) for linear in linears] == shapes
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    expected = x
    for number, linear in enumerate(linears, start=1):
        expected = expected @ linear.weight.T + (0 if linear.bias is None else linear.bias)
        if number < depth:
            expected = F.layer_norm(expected, expected.shape[-1:]).relu()
    torch.testing.assert_close(projector(x), expected)


def test_projector_of_the_default_config_is_the_papers() -> None:
    student = SelfGuided(random_model(), SelfGuidedConfig())
    assert student.projector is not None
    shapes = [tuple(module.weight.shape) for module in student.projector if isinstance(module, nn.Linear)]
    assert shapes == [(2048, 16), (2048, 2048), (16, 2048)]


def test_a_projection_does_not_depend_on_the_rest_of_the_batch() -> None:
    projector = Projector(6, 9, 3)
    x = torch.randn(5, 2, 3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(projector(x)[:1], projector(x[:1]))


# Draws


@given(seed=st.integers(0, 2**31), step=st.integers(0, 10**6))
def test_draws_are_a_pure_function_of_seed_and_step(seed: int, step: int) -> None:
    def drawn(seed: int, step: int) -> GuidanceSample:
        return sample_guidance(
            SelfGuidedConfig(positions=4), (3, 2, replace(TINY, grid=8).sequence_length), seed=seed, step=step
        )

    torch.manual_seed(0)
    first = drawn(seed, step)
    torch.manual_seed(1)
    again = drawn(seed, step)
    assert first.key_mask is not None
    assert again.key_mask is not None
    assert torch.equal(first.key_mask, again.key_mask)
    assert torch.equal(first.positions, again.positions)
    for other in (drawn(seed, step + 1), drawn(seed + 1, step)):
        assert other.key_mask is not None
        assert not torch.equal(first.key_mask, other.key_mask)


def test_positions_differ_across_steps_and_seeds() -> None:
    def drawn(seed: int, step: int) -> tuple[int, ...]:
        return tuple(
            sample_guidance(
                BASE, (1, 1, replace(TINY, grid=16).sequence_length), seed=seed, step=step
            ).positions.tolist()
        )

    assert len({drawn(0, step) for step in range(20)}) == 20
    assert len({drawn(seed, 0) for seed in range(20)}) == 20


def test_drawing_does_not_move_torchs_global_generator() -> None:
    state = torch.get_rng_state()
    sample_guidance(BASE, (3, 2, TINY.sequence_length), seed=0, step=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_view_of_each_image_has_its_own_mask_of_the_exact_size() -> None:
    draws = sample_guidance(BASE, (5, 3, replace(TINY, grid=8).sequence_length), seed=0, step=0)
    assert draws.key_mask is not None
    assert draws.key_mask.shape == (5, 3, 64)
    assert (draws.key_mask.sum(-1) == round(0.25 * 63)).all()
    assert len({tuple(row) for row in draws.key_mask.flatten(0, 1).tolist()}) == 15


def test_own_position_is_shown_on_request_and_the_same_keys_are_masked() -> None:
    literal = sample_guidance(BASE, (2, 2, TINY.sequence_length), seed=0, step=0)
    shown = sample_guidance(replace(BASE, mask_own_position=False), (2, 2, TINY.sequence_length), seed=0, step=0)
    assert literal.key_mask is not None
    assert shown.key_mask is not None
    length = TINY.sequence_length
    assert shown.key_mask.shape == (2, 2, length, length)
    for query in range(length):
        expected = literal.key_mask.clone()
        expected[..., query] = False
        assert torch.equal(shown.key_mask[:, :, query], expected)


@pytest.mark.parametrize("own", [True, False])
def test_a_part_of_the_images_has_its_part_of_the_masks(own: bool) -> None:
    config, shape = replace(BASE, mask_own_position=own), (6, 2, TINY.sequence_length)
    whole = sample_guidance(config, shape, seed=3, step=4)
    part = sample_guidance(config, shape, seed=3, step=4, images=slice(2, 4))
    assert whole.key_mask is not None
    assert part.key_mask is not None
    assert torch.equal(part.key_mask, whole.key_mask[2:4])
    assert torch.equal(part.positions, whole.positions)


def test_mask_and_positions_are_drawn_independently() -> None:
    first = sample_guidance(BASE, (2, 2, TINY.sequence_length), seed=0, step=0)
    more = sample_guidance(replace(BASE, positions=5), (2, 2, TINY.sequence_length), seed=0, step=0)
    heavier = sample_guidance(replace(BASE, mask_ratio=0.5), (2, 2, TINY.sequence_length), seed=0, step=0)
    assert first.key_mask is not None
    assert more.key_mask is not None
    assert torch.equal(first.key_mask, more.key_mask)
    assert torch.equal(first.positions, heavier.positions)
    assert (len(first.positions), len(more.positions)) == (3, 5)
