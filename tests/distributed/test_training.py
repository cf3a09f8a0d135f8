"""Several ranks train like one: gradients, weights, EMA weights and logs, with every parallelism."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from st_ar.data.store import TokenStore
from st_ar.data.text import write_text
from st_ar.evaluation.likelihood import validation_loss
from st_ar.model.weights import load_model
from st_ar.training import optim
from st_ar.training.checkpoint_files import _Reader, list_checkpoints
from st_ar.training.loop import train
from st_ar.training.run import read_log
from tests.conftest import Once
from tests.data.random_store import random_store
from tests.distributed.cases import (
    CAPTIONS,
    CASES,
    COMPILED,
    GUIDED,
    INITIAL,
    RELAY,
    CalmAdamW,
    first_gradients,
    run_folder,
    single,
)
from tests.ranks import checked_torchrun

EXACT = [(world, name) for world, cases in CASES.items() for name in cases if cases[name].dtype == "float32"]


@pytest.fixture(scope="module", autouse=True)
def _calm() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim.torch.optim, "AdamW", CalmAdamW)
        yield


@pytest.fixture(scope="module")
def out(_calm: None, once: Once) -> Path:
    """The runs of one start of two ranks, one start of four, and one rank's part of the relay."""
    return once("distributed-training", _run_all)


def _run_all(folder: Path) -> None:
    folder.mkdir()
    tokens = random_store(folder / "tokens", images=20, crops=4, shards=2)[0]
    random_store(folder / "others", images=9, crops=1, seed=1)
    rng = np.random.default_rng(1)
    captions = [rng.normal(size=(1 + image % 5, 6)).astype(np.float32) for image in range(20)]
    write_text(folder / "text.safetensors", captions, encoder="toy")
    for world in RELAY:
        if world == 1:
            train(RELAY[1], tokens, folder / "relay", resume=True, preset="toy")
        else:
            texts = checked_torchrun(
                world, "-m", "tests.distributed.worker", tokens, folder, logs=folder / f"logs-{world}"
            )
            (folder / f"printed-{world}.json").write_text(json.dumps([json.loads(text) for text in texts]))


def printed(out: Path, world: int) -> list[dict[str, Any]]:
    """The JSON object that each rank printed."""
    return json.loads((out / f"printed-{world}.json").read_text())


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_run(found: Path, expected: Path) -> None:
    for file in ("model.safetensors", "ema.safetensors"):
        assert_close(load_file(found / "export" / file), load_file(expected / "export" / file))
    logs = [read_log(run / "log.jsonl") for run in (found, expected)]
    for entry, wanted in zip(*logs, strict=True):
        for machine in ("tokens_per_second", "memory_gb"):
            del entry[machine], wanted[machine]
        assert entry == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("world", "name"), EXACT)
def test_gradients_and_losses_are_those_of_one_rank(out: Path, world: int, name: str) -> None:
    config = CASES[world][name]
    expected, losses = first_gradients(single(config, world), 1, 0)
    assert min(float(gradient.abs().max()) for gradient in expected.values()) > 1e-4
    assert_close(load_file(out / f"{world}-{name}.safetensors"), expected)
    found = json.loads((out / f"{world}-{name}.json").read_text())
    assert found == pytest.approx([loss.item() for loss in losses], rel=1e-5)


def test_ranks_speak_no_more_than_they_must(out: Path) -> None:
    two, four = (printed(out, world)[0]["collectives"] for world in (2, 4))
    # One bucket of gradients and the losses' mean, whatever the micro-batches; negatives only where they are wanted.
    assert two["ddp"] == two["ddp-accumulate"] == {"allreduce_": 2, "allgather_": 1}
    assert two["ddp-plain"] == two["ddp-local"] == {"allreduce_": 2}
    # Gradients of two blocks, the head and the rest go round once; weights before each pass, but the head's and the
    # rest's stay for the backward one, and the teacher's head stays at home: 2 + 1 of the teacher, 2 + 2 and 2.
    assert two["fsdp"] == {"_reduce_scatter_base_": 4, "_allgather_base_": 9, "allreduce_": 1, "allgather_": 1}
    assert two["fsdp-plain"] == {"_reduce_scatter_base_": 4, "_allgather_base_": 6, "allreduce_": 1}
    after_norm = 4  # the teacher's last norm is called on its own, for each of four micro-batches
    accumulated = {"_reduce_scatter_base_": 4, "_allgather_base_": 4 * 9 + after_norm, "allreduce_": 1, "allgather_": 1}
    assert two["fsdp-accumulate"] == accumulated
    assert four["hybrid"] == two["fsdp"] | {"allreduce_": 1 + 4}


@pytest.mark.parametrize(("world", "name"), EXACT)
def test_a_run_is_that_of_one_rank(out: Path, tmp_path: Path, world: int, name: str) -> None:
    run = train(single(CASES[world][name], world), out / "tokens", tmp_path / "run", preset="toy")
    assert_same_run(run_folder(out, world, name), run)
    environment = json.loads((run_folder(out, world, name) / "config.json").read_text())["environment"]
    assert environment["ranks"] == world


def test_in_bfloat16_shards_are_measured_to_its_precision(out: Path) -> None:
    run = run_folder(out, 2, "fsdp-bfloat16")
    (measured,) = (entry["validation_loss"] for entry in read_log(run / "log.jsonl") if "validation_loss" in entry)
    assert measured == pytest.approx(validation_loss(load_model(run, ema=True), TokenStore(out / "others")), rel=1e-3)


def test_a_text_model_is_that_of_one_rank(out: Path, tmp_path: Path) -> None:
    config, text = single(CAPTIONS, 2), out / "text.safetensors"
    assert_same_run(out / "captions", train(config, out / "tokens", tmp_path / "run", text=text, preset="toy"))


def test_initial_weights_reach_every_rank(out: Path, tmp_path: Path) -> None:
    given = run_folder(out, 2, "ddp")
    on_one_rank = train(single(INITIAL, 2), out / "tokens", tmp_path / "run", init=given, preset="toy")
    assert_same_run(out / "initial", on_one_rank)
    begun, random = (read_log(run / "log.jsonl")[0]["loss"] for run in (out / "initial", given))
    assert begun < random - 0.01


def test_in_bfloat16_sharded_gradients_are_those_of_one_rank_to_its_precision(out: Path) -> None:
    config = single(CASES[2]["fsdp-bfloat16"], 2)
    exact, _ = first_gradients(replace(config, dtype="float32"), 1, 0)
    rounded, _ = first_gradients(config, 1, 0)
    for name, gradient in load_file(out / "2-fsdp-bfloat16.safetensors").items():
        own = (rounded[name] - exact[name]).norm() / exact[name].norm()  # what bfloat16 costs on one rank
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() / exact[name].norm() < 1.5 * own + 0.01, name
    log, once = (
        read_log(run / "log.jsonl") for run in (run_folder(out, 2, "fsdp-bfloat16"), run_folder(out, 2, "fsdp"))
    )
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses == pytest.approx([entry["loss"] for entry in once], rel=0.01)


@pytest.mark.parametrize("world", CASES)
def test_only_rank_0_writes_what_is_not_sharded(out: Path, world: int) -> None:
    first, *others = (found["writes"] for found in printed(out, world))
    steps = [config.steps or 0 for config in CASES[world].values()]
    assert first["append_log"] >= sum(steps)
    assert first["write_json"] >= len(steps)
    assert first["save_tensors"] >= 2 * len(steps)
    assert others == [{}] * (world - 1)


def test_each_rank_draws_its_own_dropout(out: Path) -> None:
    seeds = [found["seed"] for world in CASES for found in printed(out, world)]
    assert len(set(seeds)) == 4  # ranks 0 and 1 have the same in both
    train(replace(GUIDED, steps=4), out / "tokens", out / "seeded", preset="toy")
    assert torch.initial_seed() == seeds[0]


def test_a_signal_to_one_rank_stops_all_and_the_run_can_be_resumed(out: Path) -> None:
    for found in printed(out, 2):
        assert found["stopped"].startswith("stopped at step 2 of 4; the run is saved")
    assert_same_run(out / "stopped", run_folder(out, 2, "fsdp"))


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(out: Path) -> None:
    for found in printed(out, 2):
        assert "the loss or its gradient is not finite at step 1 (loss is inf, gradient norm is nan)" in found["broken"]
    assert not (out / "broken" / "checkpoints").exists()


# Checkpoints


def names(run: Path) -> dict[str, list[int]]:
    """The tensors of the newest checkpoint, with their shapes."""
    stored = _Reader(list_checkpoints(run / "checkpoints")[-1][1] / "tensors").read_metadata().state_dict_metadata
    return {name: list(tensor.size) for name, tensor in stored.items()}


def test_a_checkpoint_has_the_same_tensors_with_every_parallelism(out: Path, tmp_path: Path) -> None:
    run = train(replace(GUIDED, steps=1), out / "tokens", tmp_path / "run", preset="toy")
    for world, name in ((2, "ddp"), (2, "ddp-accumulate"), (2, "fsdp"), (4, "hybrid")):
        assert names(run_folder(out, world, name)) == names(run)
    files = sorted(
        path.name for path in (run_folder(out, 4, "hybrid") / "checkpoints" / "step_00000004" / "tensors").iterdir()
    )
    assert files == [".metadata", *(f"__{rank}_0.distcp" for rank in range(4))]


def test_a_run_continues_with_other_ranks_and_parallelism(out: Path, tmp_path: Path) -> None:
    relay = train(replace(GUIDED, steps=8), out / "tokens", out / "relay", resume=True, preset="toy")
    assert_same_run(relay, train(replace(GUIDED, steps=8), out / "tokens", tmp_path / "run", preset="toy"))


@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradients_with_every_parallelism(tmp_path: Path) -> None:
    checked_torchrun(2, "-m", "tests.distributed.worker", "compiled", tmp_path, logs=tmp_path / "logs")
    expected, _ = first_gradients(GUIDED, 1, 0)
    for name in COMPILED:
        assert_close(load_file(tmp_path / f"2-{name}.safetensors"), expected)
