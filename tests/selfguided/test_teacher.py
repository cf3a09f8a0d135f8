from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from st_ar.config import ModelConfig, SelfGuidedConfig
from st_ar.model.transformer import Transformer
from st_ar.selfguided.objective import Losses, SelfGuided, Teacher, draw, ema_decay
from tests.toys import TINY, random_model

CONFIG = SelfGuidedConfig(projector_hidden=8, positions=3)
WITH_DROPOUT = ModelConfig(dim=8, n_layers=2, n_heads=1, vocab_size=5, grid=2, num_classes=2)


def move(model: Transformer, amount: float) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters(), start=1):
            parameter.add_(amount * number)


def one_step(student: SelfGuided, teacher: Teacher) -> Losses:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(TINY.vocab_size, (3, 2, TINY.sequence_length), generator=generator)
    labels = torch.tensor([0, 3, 1])
    draws = draw(student.config, TINY, images=3, views=2, seed=0, step=1)
    targets = student.teach(teacher, tokens, labels, draws.positions)
    losses = student(tokens, labels, draws, targets, targets.mid, 0)
    losses.total.backward()
    return losses


@pytest.mark.parametrize(("decay", "warmup"), [(0.9999, True), (0.3, True), (0.9, False)])
def test_teacher_is_the_moving_average_of_the_formula(decay: float, warmup: bool) -> None:
    student = random_model(seed=0)
    teacher = Teacher(student, replace(CONFIG, ema_decay=decay, ema_warmup=warmup))
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
    config = replace(CONFIG, ema_decay=decay)
    assert ema_decay(config, step) == min(decay, (1 + step) / (10 + step))
    assert ema_decay(replace(config, ema_warmup=False), step) == decay


def test_warm_up_begins_at_2_in_11_and_ends_at_the_decay() -> None:
    assert ema_decay(SelfGuidedConfig(), 1) == 2 / 11
    assert ema_decay(SelfGuidedConfig(), 80_000) < 0.9999
    assert ema_decay(SelfGuidedConfig(), 90_000) == 0.9999


def test_a_long_slow_average_is_not_lost_to_rounding() -> None:
    student = random_model()
    teacher = Teacher(student, SelfGuidedConfig(ema_warmup=False))
    start = {name: value.clone() for name, value in student.state_dict().items()}
    move(student, 1e-2)
    for step in range(1, 201):
        teacher.update(student, step)
    for name, value in teacher.model.state_dict().items():
        moved = (student.state_dict()[name] - start[name]).double() * (1 - 0.9999**200)
        torch.testing.assert_close((value - start[name]).double(), moved, rtol=0.02, atol=2e-5)


def test_teacher_is_a_copy_that_only_an_update_moves() -> None:
    student = random_model()
    teacher = Teacher(student, CONFIG)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    assert {name: value.tolist() for name, value in before.items()} == {
        name: value.tolist() for name, value in student.state_dict().items()
    }
    move(student, 1.0)
    one_step(SelfGuided(student, CONFIG), teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    teacher.update(student, 1)
    assert not any(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())


def test_an_update_leaves_the_student_alone() -> None:
    student = random_model()
    teacher = Teacher(student, CONFIG)
    move(student, 1.0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    teacher.update(student, 1)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_teacher_of_a_student_in_training_stays_in_evaluation_mode() -> None:
    student = Transformer(WITH_DROPOUT).train()
    teacher = Teacher(student, CONFIG)
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
    teacher = Teacher(model, CONFIG)
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
    teacher = Teacher(model, CONFIG)
    ours = {parameter.data_ptr() for parameter in SelfGuided(model, CONFIG).parameters()}
    assert not ours & {parameter.data_ptr() for parameter in teacher.parameters()}
