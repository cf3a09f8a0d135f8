"""Checkpoints: bit-equal, whole or absent, and never code."""

import copy
import errno
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from st_ar.errors import UserError
from st_ar.training.checkpoint import Checkpoints, list_checkpoints
from tests.disk import contents, full_disk, refused


class Run:
    """A network, its average and its optimizer, trained a little."""

    def __init__(self, folder: Path, *, seed: int = 0, keep: int = 2, width: int = 6) -> None:
        torch.manual_seed(seed)
        self.student = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 3))
        self.ema = copy.deepcopy(self.student).requires_grad_(False)
        groups = [
            {"params": list(self.student[0].parameters())},
            {"params": [*self.student[1:].parameters()], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.05, fused=True)
        modules = {"student": self.student, "ema": self.ema}
        self.checkpoints = Checkpoints(folder, modules, self.student, self.optimizer, keep)

    def train(self, steps: range) -> "Run":
        for step in steps:
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            self.student(x).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.student.parameters()), 0.1)
        return self

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the rest of the run depends on."""
        tensors = {f"student.{key}": value for key, value in self.student.state_dict().items()}
        tensors |= {f"ema.{key}": value for key, value in self.ema.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{index}.{slot}": value for slot, value in slots.items()}
        return {key: value.clone() for key, value in tensors.items()}


def assert_equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 3 and 5."""
    run = Run(tmp_path / "checkpoints")
    run.train(range(3)).checkpoints.save(3)
    run.train(range(3, 5)).checkpoints.save(5)
    return tmp_path / "checkpoints"


def test_weights_average_and_moments_come_back_bit_for_bit(folder: Path) -> None:
    expected = Run(folder).train(range(5)).state()
    assert any(key.endswith("exp_avg_sq") for key in expected)
    fresh = Run(folder, seed=1)
    assert fresh.checkpoints.restore() == 5
    assert_equal_bits(fresh.state(), expected)


def test_training_goes_on_as_if_it_had_never_stopped(folder: Path) -> None:
    resumed = Run(folder, seed=1)
    resumed.checkpoints.restore()
    assert_equal_bits(resumed.train(range(5, 9)).state(), Run(folder).train(range(9)).state())


def test_settings_of_the_optimizer_are_not_taken_from_the_checkpoint(folder: Path) -> None:
    run = Run(folder)
    run.optimizer.param_groups[0]["lr"] = 0.7
    run.checkpoints.restore()
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.7, 0.05]
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.01, 0.0]


def test_restoring_where_there_is_nothing_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "checkpoints")
    before = run.state()
    assert run.checkpoints.restore() == 0
    assert_equal_bits(run.state(), before)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_few_are_kept(tmp_path: Path, keep: int) -> None:
    run = Run(tmp_path, keep=keep).train(range(1))
    for step in (9, 10, 100, 1000, 123456789):
        run.checkpoints.save(step)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10, 100, 1000, 123456789][-keep:]


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    run = Run(folder).train(range(8))
    run.checkpoints.save(5)
    fresh = Run(folder, seed=1)
    fresh.checkpoints.restore()
    assert_equal_bits(fresh.state(), run.state())


def test_a_partial_folder_that_another_rank_has_just_cleared_is_no_trouble(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = folder / ".step_00000007.partial"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", lambda place, pattern: iter([gone] if place == folder else []))
        assert Run(folder, seed=1).checkpoints.restore() == 5


def test_a_partial_folder_is_never_listed_and_is_cleared_by_the_next_save(folder: Path) -> None:
    partial = folder / ".step_00000007.partial"
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"half")
    assert [step for step, _ in list_checkpoints(folder)] == [3, 5]
    run = Run(folder, seed=1)
    assert run.checkpoints.restore() == 5
    run.train(range(5, 7)).checkpoints.save(7)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000005", "step_00000007"]
    assert sorted(contents(folder / "step_00000007")) == [".metadata", "__0_0.distcp"]


def test_other_things_in_the_folder_are_no_checkpoints(folder: Path) -> None:
    (folder / "step_best").mkdir()
    (folder / "step_9.bak").mkdir()
    assert [step for step, _ in list_checkpoints(folder)] == [3, 5]
    assert list_checkpoints(folder / "nowhere") == []


def newest(folder: Path, name: str) -> Path:
    return folder / "step_00000005" / name


@pytest.mark.parametrize("left", [0, 10, 0.5, -1])
def test_truncated_tensors_are_refused_with_the_remedy(folder: Path, left: float) -> None:
    file = newest(folder, "__0_0.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[: round(left * len(whole)) if left == 0.5 else int(left)])
    with refused(folder, r"step_00000005 is damaged .*; remove it to resume from the one before"):
        Run(folder).checkpoints.restore()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_missing_file_is_refused_with_the_remedy(folder: Path, name: str) -> None:
    newest(folder, name).unlink()
    with refused(folder, r"step_00000005 is damaged .*; remove it to resume from the one before"):
        Run(folder).checkpoints.restore()


def test_after_removing_the_damaged_one_the_one_before_is_taken(folder: Path) -> None:
    for file in newest(folder, "").iterdir():
        file.unlink()
    newest(folder, "").rmdir()
    run = Run(folder, seed=1)
    assert run.checkpoints.restore() == 3
    assert_equal_bits(run.state(), Run(folder).train(range(3)).state())


def test_a_checkpoint_of_another_network_is_refused(folder: Path) -> None:
    with refused(folder, "step_00000005 is damaged or not of this run"):
        Run(folder, width=8).checkpoints.restore()


def test_the_error_is_one_line_and_nothing_else_is_printed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest(folder, ".metadata").unlink()
    with pytest.raises(UserError) as raised:
        Run(folder).checkpoints.restore()
    assert "\n" not in str(raised.value)
    # torch's own warnings reach the terminal, tracebacks and all, unless someone stops them.
    assert [
        entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING and "Null" not in entry.name
    ] == []


@given(place=st.integers(0, 1 << 16), value=st.binary(max_size=4), length=st.integers(0, 1 << 16))
def test_a_garbled_index_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: bytes, length: int
) -> None:
    folder = tmp_path_factory.mktemp("garbled")
    run = Run(folder).train(range(2))
    index = run.checkpoints.save(2) / ".metadata"
    whole = index.read_bytes()
    place, length = place % len(whole), length % 6
    index.write_bytes(whole[:place] + value + whole[place + length :])
    fresh = Run(folder, seed=1)
    try:
        assert fresh.checkpoints.restore() == 2
    except UserError as error:
        assert "step_00000002 is damaged" in str(error)  # noqa: PT017 (either is right)


def pickled_call(module: str, name: str, argument: str) -> bytes:
    """A pickle (protocol 4) that calls module.name(argument) when it is loaded."""
    words = [b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name, argument)]
    return b"\x80\x04" + words[0] + words[1] + b"\x93" + words[2] + b"\x85R."


def pickled_call_of_old(module: str, name: str, argument: str) -> bytes:
    """The same in protocol 0."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "os.system"),
        ("pathlib", "os.system"),
    ],
)
@pytest.mark.parametrize("pickled", [pickled_call, pickled_call_of_old])
def test_an_index_that_would_run_code_is_refused_and_does_not(
    folder: Path, tmp_path: Path, module: str, name: str, pickled: Callable[[str, str, str], bytes]
) -> None:
    trace = tmp_path / "trace"
    command = f"open({str(trace)!r}, 'w')" if name.endswith("eval") else f"touch {trace}"
    newest(folder, ".metadata").write_bytes(pickled(module, name, command))
    with refused(folder, "step_00000005 is damaged or not of this run"):
        Run(folder).checkpoints.restore()
    assert not trace.exists()


def test_an_index_cannot_reach_into_modules_either(folder: Path) -> None:
    # torch's module imports os, so a name in it can stand for os itself, and pickle's BUILD sets attributes.
    words = [
        b"\x8c" + bytes([len(word)]) + word.encode()
        for word in ("torch.distributed.checkpoint.filesystem", "os", "trace")
    ]
    newest(folder, ".metadata").write_bytes(b"\x80\x04" + words[0] + words[1] + b"\x93}" + words[2] + b"K\x01sb.")
    with refused(folder, "step_00000005 is damaged or not of this run"):
        Run(folder).checkpoints.restore()
    assert not hasattr(os, "trace")


def test_the_payload_above_does_run_code_when_it_is_unpickled_carelessly(tmp_path: Path) -> None:
    for pickled in (pickled_call, pickled_call_of_old):
        trace = tmp_path / pickled.__name__
        pickle.loads(pickled("builtins", "eval", f"open({str(trace)!r}, 'w').close()"))
        assert trace.exists()


def test_a_disk_that_fills_up_leaves_the_previous_one_intact_and_says_so(folder: Path) -> None:
    run = Run(folder).train(range(7))
    with (
        full_disk(4096),
        refused(folder, "(?s)cannot write the checkpoint of step 7 .*step_00000005 is intact; free some space"),
    ):
        run.checkpoints.save(7)
    fresh = Run(folder, seed=1)
    assert fresh.checkpoints.restore() == 5
    assert run.checkpoints.save(7).name == "step_00000007"


def test_the_message_of_a_full_disk_is_one_line_with_its_cause(folder: Path) -> None:
    with full_disk(4096), pytest.raises(UserError) as raised:
        Run(folder).train(range(7)).checkpoints.save(7)
    assert "\n" not in str(raised.value)
    assert "Traceback" not in str(raised.value)
    assert os.strerror(errno.EFBIG) in str(raised.value)


def test_the_first_checkpoint_on_a_full_disk_says_that_there_is_none(tmp_path: Path) -> None:
    with full_disk(4096), refused(tmp_path, "(?s)cannot write the checkpoint of step 1 .*there is no earlier one"):
        Run(tmp_path).train(range(1)).checkpoints.save(1)


def test_a_rename_that_fails_leaves_the_previous_one_intact(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", no_space)
    with refused(folder, r"step 7 .*No space left on device.*step_00000005 is intact"):
        Run(folder).train(range(7)).checkpoints.save(7)
