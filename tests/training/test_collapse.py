"""Collapse: the indicators against their definitions, and what they are taken of."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from st_ar.config import PLAIN, SelfGuidedConfig
from st_ar.selfguided.objective import SelfGuided, Teacher, draw
from st_ar.training.loop import backward
from st_ar.training.watch import Features, effective_rank, spread
from tests.toys import NO_DROPOUT, random_model
from tests.training.toy_runs import GUIDED_RUN

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
    assert spread(torch.ones(6, 2, 8) * torch.arange(1, 7)[:, None, None]) == pytest.approx(0, abs=1e-6)
    everywhere = torch.randn(20000, 1, 16, generator=torch.Generator().manual_seed(0))
    assert spread(everywhere) == pytest.approx(16**-0.5, rel=0.01)
    two = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])
    assert spread(two) == pytest.approx(0.5)


def test_images_that_differ_by_position_alone_have_collapsed() -> None:
    positions = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)).expand(6, 4, 8)
    assert spread(positions) == pytest.approx(0, abs=1e-6)
    assert effective_rank(positions) == pytest.approx(1, abs=1e-4)


def step_of(config: SelfGuidedConfig, pieces: int, wanted: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What a step shows, and its gradients."""
    torch.manual_seed(3)
    teacher = Teacher(random_model(MODEL, seed=1), config)
    student = SelfGuided(random_model(MODEL, seed=0), config).train()
    features = Features(student)
    tokens = torch.randint(16, (8, 2, 16), generator=torch.Generator().manual_seed(5))
    draws = draw(config, MODEL, images=8, views=2, seed=0, step=1)
    features.begin(wanted)
    backward(student, teacher, tokens, torch.zeros(8, dtype=torch.int64), draws, pieces, torch.float32)
    shown = features.measure()
    features.close()
    return shown, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def test_a_step_shows_the_contrasted_features() -> None:
    config = replace(GUIDED_RUN.selfguided, mask_ratio=0.0)
    shown, _ = step_of(config, 1, True)
    assert sorted(shown) == [f"{what}_{of}" for what in ("rank", "std") for of in ("projected", "student", "teacher")]
    torch.manual_seed(3)
    tokens = torch.randint(16, (8, 2, 16), generator=torch.Generator().manual_seed(5))
    positions = draw(config, MODEL, images=8, views=2, seed=0, step=1).positions
    teacher = random_model(MODEL, seed=1)
    with torch.no_grad():
        mid = teacher.features(tokens[:, 0, :-1], torch.zeros(8, dtype=torch.int64), layers=[1])[1][:, positions]
    assert shown["std_teacher"] == pytest.approx(spread(mid), rel=1e-5)
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
