"""How ranks share training, as far as one process shows it; tests/distributed has several."""

from collections import Counter
from dataclasses import replace
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import nn

from st_ar.config import TrainConfig
from st_ar.distributed import process_group
from st_ar.errors import UserError
from st_ar.model.transformer import Transformer
from st_ar.selfguided.guidance import make_teacher, sample_guidance
from st_ar.selfguided.objective import SelfGuided
from st_ar.training.loop import Learner, forward_backward
from st_ar.training.parallel import choose_parallel, parallelize
from tests.calls import Calls
from tests.toys import random_model, random_sequences
from tests.training.toy_runs import GUIDED_RUN

CPU = torch.device("cpu")
LOCAL = replace(GUIDED_RUN, selfguided=replace(GUIDED_RUN.selfguided, negatives="local"))

# Settings

UNSUITABLE: dict[str, tuple[int, TrainConfig, str]] = {
    "none": (
        2,
        replace(GUIDED_RUN, parallel="none"),
        "torchrun has started 2: give --parallel ddp or fsdp, or start without",
    ),
    "ddp alone": (1, replace(GUIDED_RUN, parallel="ddp"), "--parallel ddp .* there is one: start them with torchrun"),
    "fsdp alone": (
        1,
        replace(GUIDED_RUN, parallel="fsdp"),
        "--parallel fsdp .* there is one: start them with torchrun",
    ),
    "batch": (4, GUIDED_RUN, "--batch-size 6 is not a multiple of the 4 ranks times --accumulate 1"),
    "pieces": (
        2,
        replace(GUIDED_RUN, accumulate=6),
        "--batch-size 6 is not a multiple of the 2 ranks times --accumulate 6",
    ),
    "shards": (6, replace(GUIDED_RUN, parallel="fsdp", shard_size=4), "--shard-size 4 does not divide the 6 ranks"),
    "negatives": (3, replace(LOCAL, accumulate=2), "--selfguided.negatives local .* larger --batch-size than 6"),
}


def test_a_rank_that_nobody_can_meet_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "RANK and WORLD_SIZE say, .* MASTER_ADDR .*: start them by torchrun, or unset RANK and WORLD_SIZE"
    with pytest.raises(UserError, match=message), process_group("cpu", 60):
        pass


def test_every_run_of_a_process_is_compiled_however_many_there_were_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile keeps a number of compilations of one code, and then leaves the rest to the interpreter."""
    graphs: list[Any] = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=count))
    found: list[int] = []
    for width in range(1, 10):  # torch keeps 8
        graphs.clear()
        config = replace(
            GUIDED_RUN, compile=True, model=replace(GUIDED_RUN.model, dim=8 * width, n_heads=2, n_layers=1)
        )
        model = Transformer(config.model)
        student = SelfGuided(model, config.selfguided)
        parallelize(student, make_teacher(model, config.selfguided), config, "none", CPU, torch.float32)
        tokens, labels = random_sequences(config.model, 2)
        with torch.no_grad():
            model(tokens[:, :-1], labels)
        found.append(len(graphs))
    assert found == [1] * 9


@pytest.mark.parametrize("what", UNSUITABLE)
def test_settings_that_do_not_suit_the_ranks_are_refused_with_the_remedy(what: str) -> None:
    world, config, message = UNSUITABLE[what]
    with pytest.raises(UserError, match=message):
        choose_parallel(config, world)


@pytest.mark.parametrize(
    ("world", "given", "chosen"), [(1, "auto", "none"), (1, "none", "none"), (2, "auto", "ddp"), (2, "fsdp", "fsdp")]
)
def test_without_a_choice_there_is_a_copy_on_each_rank(world: int, given: Any, chosen: str) -> None:
    assert choose_parallel(replace(GUIDED_RUN, parallel=given), world) == chosen


# Activation checkpointing


def gradients(checkpointing: Any) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Of a batch with dropout; and which operators it took, forward and backward."""
    config = replace(GUIDED_RUN, activation_checkpointing=checkpointing)
    torch.manual_seed(3)
    teacher = make_teacher(random_model(config.model, seed=1), config.selfguided)
    student = SelfGuided(random_model(config.model, seed=0), config.selfguided).train()
    called = parallelize(student, teacher, config, "none", CPU, torch.float32)
    tokens = torch.randint(16, (6, 2, 16), generator=torch.Generator().manual_seed(5))
    draws = sample_guidance(config.selfguided, (6, 2, config.model.sequence_length), seed=0, step=1)
    with Calls() as calls:
        forward_backward(Learner(called, teacher, 1, torch.float32), tokens, torch.arange(6) % 3, draws)
    assert set(student.state_dict()) == set(SelfGuided(random_model(config.model), config.selfguided).state_dict())
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}, calls.counts


def test_recomputation_changes_no_gradient() -> None:
    expected, plain = gradients("none")
    selective, some = gradients("selective")
    full, all_again = gradients("full")
    for found in (selective, full):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    blocks, attention = 2, "_scaled_dot_product_flash_attention_for_cpu"
    again = {name: (some[name] - plain[name], all_again[name] - plain[name]) for name in ("mm", attention, "silu")}
    assert again == {"mm": (0, 5 * blocks), attention: (0, blocks), "silu": (blocks, blocks)}
