"""Checkpoints: bit-equal, whole or absent, and never code."""

import copy
import errno
import hashlib
import json
import logging
import os
import pathlib
import pickle
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from st_ar import load_model
from st_ar.data.store import TokenStore
from st_ar.errors import Interrupted, UserError
from st_ar.evaluation.likelihood import validation_loss
from st_ar.hardware import parameters, run_bytes
from st_ar.model.weights import open_model
from st_ar.training import checkpoint
from st_ar.training import checkpoint_files as manifest
from st_ar.training.checkpoint import Checkpoints, State
from st_ar.training.checkpoint_files import (
    describe_files,
    find_damage,
    list_checkpoints,
    read_record,
    write_manifest,
    write_tensors,
)
from st_ar.training.loop import train
from st_ar.training.run import append_log
from tests.data.random_store import random_store
from tests.disk import contents, flip_byte, full_disk, refused, small_disk
from tests.training.toy_runs import GUIDED_RUN, PLAIN_RUN, assert_same_result, assert_same_weights, log_of, saved_state


class Run:
    """A network, its average and its optimizer, trained a little."""

    def __init__(self, folder: Path, *, seed: int = 0, keep: int = 2, keep_every: int = 0, width: int = 6) -> None:
        torch.manual_seed(seed)
        self.student = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 3))
        self.ema = copy.deepcopy(self.student).requires_grad_(False)
        groups = [
            {"params": list(self.student[0].parameters())},
            {"params": [*self.student[1:].parameters()], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.05, fused=True)
        modules = {"student": self.student, "ema": self.ema}
        self.now = State(modules, self.student, self.optimizer)
        self.checkpoints = Checkpoints(folder, keep=keep, keep_every=keep_every)

    def train(self, steps: range) -> "Run":
        for step in steps:
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            self.student(x).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.student.parameters()), 0.1)
        return self

    def save(self, step: int) -> Path:
        """Save and wait until it is written."""
        with self.checkpoints:
            self.checkpoints.save(step, self.now)
        return self.checkpoints.folder / f"step_{step:08d}"

    def restore(self) -> int:
        step = self.checkpoints.newest()
        self.checkpoints.restore(step, self.now)
        return step

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
    run.train(range(3)).save(3)
    run.train(range(3, 5)).save(5)
    return tmp_path / "checkpoints"


def test_weights_average_and_moments_come_back_bit_for_bit(folder: Path) -> None:
    expected = Run(folder).train(range(5)).state()
    assert any(key.endswith("exp_avg_sq") for key in expected)
    fresh = Run(folder, seed=1)
    assert fresh.restore() == 5
    assert_equal_bits(fresh.state(), expected)


def test_a_restored_state_trains_exactly_as_before(folder: Path) -> None:
    resumed = Run(folder, seed=1)
    resumed.restore()
    assert_equal_bits(resumed.train(range(5, 9)).state(), Run(folder).train(range(9)).state())


def test_settings_of_the_optimizer_are_not_taken_from_the_checkpoint(folder: Path) -> None:
    run = Run(folder)
    run.optimizer.param_groups[0]["lr"] = 0.7
    run.restore()
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.7, 0.05]
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.01, 0.0]


def test_restoring_where_there_is_nothing_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "checkpoints")
    before = run.state()
    assert run.restore() == 0
    assert_equal_bits(run.state(), before)
    assert contents(tmp_path) == {}


# Which are kept


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_few_are_kept(tmp_path: Path, keep: int) -> None:
    run = Run(tmp_path, keep=keep).train(range(1))
    for step in (9, 10, 100, 1000, 123456789):
        run.save(step)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10, 100, 1000, 123456789][-keep:]


def test_multiples_of_keep_every_are_kept_for_good(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=1, keep_every=6).train(range(1))
    for step in range(2, 21, 2):
        run.save(step)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [6, 12, 18, 20]


def test_a_checkpoint_being_removed_never_looks_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, **_: object) -> None:
        if path.exists():
            next(path.rglob("*.distcp")).unlink()
            raise KeyboardInterrupt

    run = Run(folder).train(range(7))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.save(7)
    assert [step for step, _ in list_checkpoints(folder)] == [5, 7]
    assert (folder / ".step_00000003.partial").is_dir()
    assert Run(folder).restore() == 7
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000005", "step_00000007"]


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    run = Run(folder).train(range(8))
    run.save(5)
    fresh = Run(folder, seed=1)
    fresh.restore()
    assert_equal_bits(fresh.state(), run.state())


def test_a_partial_folder_may_vanish_while_it_is_cleared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = folder / ".step_00000007.partial"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", lambda place, pattern: iter([gone] if place == folder else []))
        assert Run(folder, seed=1).restore() == 5


def test_a_partial_folder_is_never_listed_and_is_cleared_by_the_next_save(folder: Path) -> None:
    partial = folder / ".step_00000007.partial"
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"half")
    assert [step for step, _ in list_checkpoints(folder)] == [3, 5]
    run = Run(folder, seed=1)
    assert run.restore() == 5
    run.train(range(5, 7)).save(7)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000005", "step_00000007"]
    assert sorted(contents(folder / "step_00000007")) == FILES


def test_other_things_in_the_folder_are_no_checkpoints(folder: Path) -> None:
    (folder / "step_best").mkdir()
    (folder / "step_9.bak").mkdir()
    assert [step for step, _ in list_checkpoints(folder)] == [3, 5]
    assert list_checkpoints(folder / "nowhere") == []
    assert Run(folder).restore() == 5


# Writing in the background


class HeldDisk:
    """Lets the writing of tensors begin, and go on only when it is released."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun, self.released, self.broken = threading.Event(), threading.Event(), False
        patch.setattr(checkpoint, "write_tensors", self._write)

    def _write(self, folder: Path, tensors: dict[str, Tensor], group: None) -> None:
        self.begun.set()
        assert self.released.wait(60)
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write_tensors(folder, tensors)


def test_training_continues_while_a_copy_of_the_state_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, run = HeldDisk(monkeypatch), Run(folder).train(range(7))
    expected = run.state()
    with run.checkpoints:
        run.checkpoints.save(7, run.now)
        assert disk.begun.wait(60)
        run.train(range(7, 9))  # alters every tensor
        run.checkpoints.check()
        assert [step for step, _ in list_checkpoints(folder)] == [3, 5]
        disk.released.set()
    assert [step for step, _ in list_checkpoints(folder)] == [5, 7]
    assert not any(torch.equal(value, expected[key]) for key, value in run.state().items())
    fresh = Run(folder, seed=1)
    assert fresh.restore() == 7
    assert_equal_bits(fresh.state(), expected)


def test_the_copies_of_two_saves_are_two(folder: Path) -> None:
    run = Run(folder, keep=3).train(range(6))
    six = run.state()
    with run.checkpoints:
        run.checkpoints.save(6, run.now)
        run.train(range(6, 7)).checkpoints.save(7, run.now)
        seven = run.state()
    for step, expected in ((7, seven), (6, six)):
        fresh = Run(folder, seed=1)
        fresh.checkpoints.restore(step, fresh.now)
        assert_equal_bits(fresh.state(), expected)


def test_what_comes_after_a_checkpoint_gets_its_tensors_when_it_is_whole(folder: Path) -> None:
    run = Run(folder).train(range(7))
    expected = {name: tensor.clone() for name, tensor in run.now.tensors().items()}
    seen: list[tuple[list[int], dict[str, Tensor]]] = []

    def then(tensors: Mapping[str, Tensor]) -> None:
        seen.append(([step for step, _ in list_checkpoints(folder)], {k: v.clone() for k, v in tensors.items()}))

    with run.checkpoints:
        run.checkpoints.save(7, run.now, then=then)
        run.train(range(7, 9))
    ((steps, tensors),) = seen
    assert steps == [5, 7]
    assert_equal_bits(tensors, expected)


def failing(step: int) -> str:
    return f"cannot write the checkpoint of step {step} .*step_00000005 is intact; free some space and continue"


def test_an_error_in_the_background_comes_up_at_the_next_check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, run = HeldDisk(monkeypatch), Run(folder).train(range(7))
    with full_disk(4096), run.checkpoints:
        run.checkpoints.save(7, run.now)
        run.checkpoints.check()  # nothing has gone wrong yet
        disk.released.set()
        with pytest.raises(UserError, match=failing(7)):
            for _ in iter(run.checkpoints.check, "never"):  # the steps of a run
                pass


def test_an_error_in_the_background_comes_up_at_the_next_save(folder: Path) -> None:
    run = Run(folder).train(range(7))
    with full_disk(4096), run.checkpoints:
        run.checkpoints.save(7, run.now)
        with pytest.raises(UserError, match=failing(7)):
            run.checkpoints.save(8, run.now)


def test_an_error_in_the_background_comes_up_at_the_end(folder: Path) -> None:
    run = Run(folder).train(range(7))
    with pytest.raises(UserError, match=failing(7)), full_disk(4096), run.checkpoints:
        run.checkpoints.save(7, run.now)


def test_an_error_of_the_run_wins_over_the_writes_and_the_write_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, run = HeldDisk(monkeypatch), Run(folder).train(range(7))
    threading.Timer(0.2, disk.released.set).start()

    def broken_run() -> None:
        with run.checkpoints:
            run.checkpoints.save(7, run.now)
            raise UserError("the loss is gone")

    with pytest.raises(UserError, match="the loss is gone"):
        broken_run()
    assert [step for step, _ in list_checkpoints(folder)] == [5, 7]


def test_an_interrupt_waits_for_no_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, run = HeldDisk(monkeypatch), Run(folder).train(range(7))

    def interrupted_run() -> None:
        with run.checkpoints:
            run.checkpoints.save(7, run.now)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert [step for step, _ in list_checkpoints(folder)] == [3, 5]
    disk.broken = True
    disk.released.set()
    with pytest.raises(UserError, match=failing(7)):
        run.checkpoints.wait()


def test_warnings_are_as_before_once_all_is_written(folder: Path) -> None:
    before = list(warnings.filters)
    Run(folder).train(range(7)).save(7)
    assert warnings.filters == before


# Damage


FILES = ["manifest.json", "tensors/.metadata", "tensors/__0_0.distcp"]


def newest(folder: Path, name: str) -> Path:
    return folder / "step_00000005" / name


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def lengthened(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def flipped(file: Path) -> None:
    flip_byte(file, file.stat().st_size // 3)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut short": truncated,
    "emptied": emptied,
    "lengthened": lengthened,
    "altered": flipped,
    "missing": Path.unlink,
}


def expected_words(name: str, damage: str, file: Path) -> str:
    if damage == "missing":
        return f"{name} is missing"
    if name == "manifest.json":
        return r"manifest\.json (is not a manifest|does not match its checksum)"
    return (
        f"{name} does not match its checksum"
        if damage == "altered"
        else rf"{name} has \d+ of {file.stat().st_size} bytes"
    )


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    file = newest(folder, name)
    words = expected_words(name, damage, file)
    if (name, damage) == ("manifest.json", "lengthened"):
        return  # by a blank, which says nothing else
    DAMAGES[damage](file)
    before = contents(folder / "step_00000005")
    run = Run(folder, seed=1)
    assert run.restore() == 3
    assert_equal_bits(run.state(), Run(folder).train(range(3)).state())
    said = capsys.readouterr().err
    assert re.search(
        rf"step_00000005 is damaged \({words}\): renamed to step_00000005.damaged; resuming from step_00000003", said
    )
    assert said.count("\n") == 1
    assert contents(folder / "step_00000005.damaged") == before  # nothing is lost
    assert [step for step, _ in list_checkpoints(folder)] == [3]


def test_training_again_what_was_damaged_ends_the_same(folder: Path) -> None:
    truncated(newest(folder, FILES[2]))
    run = Run(folder, seed=1)
    run.train(range(run.restore(), 5)).save(5)
    flipped(newest(folder, FILES[1]))
    again = Run(folder, seed=1)
    assert again.restore() == 3
    assert_equal_bits(again.train(range(3, 9)).state(), Run(folder).train(range(9)).state())
    assert sorted(path.name for path in folder.iterdir()) == [
        *("step_00000003", "step_00000005.damaged", "step_00000005.damaged-1")
    ]


@given(data=st.data())
def test_any_garbling_is_found_or_harmless(garbled: Path, data: st.DataObject) -> None:
    whole = contents(garbled)
    name = data.draw(st.sampled_from([name for name in sorted(whole) if name.startswith("step_00000002/")]))
    place = data.draw(st.integers(0, len(whole[name])))
    value, length = data.draw(st.binary(max_size=4)), data.draw(st.integers(0, 6))
    altered = whole[name][:place] + value + whole[name][place + length :]
    (garbled / name).write_bytes(altered)
    found = find_damage(garbled / "step_00000002")
    (garbled / name).write_bytes(whole[name])
    if altered == whole[name]:
        assert found is None
    elif name.endswith("manifest.json"):  # blanks between its words may change
        assert found is None or found.startswith(("manifest.json is not", "manifest.json does not"))
    else:
        assert found is not None
        assert found.startswith(name.removeprefix("step_00000002/"))


@pytest.fixture(scope="module")
def garbled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that a test damages and mends."""
    folder = tmp_path_factory.mktemp("garbled")
    Run(folder).train(range(2)).save(2)
    return folder


def test_when_all_are_damaged_all_are_named_and_kept(folder: Path) -> None:
    newest(folder, "manifest.json").unlink()
    truncated(folder / "step_00000003" / "tensors" / "__0_0.distcp")
    with refused(
        folder,
        r"no checkpoint in .* is whole \(step_00000005: manifest.json is missing; "
        r"step_00000003: tensors/__0_0.distcp has \d+ of \d+ bytes\): put a copy of one there, or begin anew",
    ):
        Run(folder).restore()


def test_a_checkpoint_without_its_manifest_is_never_listed(folder: Path) -> None:
    newest(folder, "manifest.json").unlink()  # as when a copy of the run was stopped half-way
    assert [step for step, _ in list_checkpoints(folder)] == [3]


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\x00", b"[]", b"[" * 100_000], ids=["cut", "no text", "a list", "deep"]
)
def test_an_older_manifest_that_is_damaged_stands_in_nobodys_way(folder: Path, content: bytes) -> None:
    (folder / "step_00000003" / "manifest.json").write_bytes(content)
    checkpoints = Checkpoints(folder, keep=2, keep_least="validation_loss")
    assert checkpoints.newest() == 5
    run = Run(folder)
    checkpoints.restore(5, run.now)
    with checkpoints:
        checkpoints.save(7, run.now, {"validation_loss": 1.0})
    assert [step for step, _ in list_checkpoints(folder)] == [5, 7]


def test_leftovers_of_a_killed_run_are_removed_when_it_resumes(folder: Path) -> None:
    assert [step for step, _ in list_checkpoints(folder)] == [3, 5]
    assert Checkpoints(folder, keep=1).newest() == 5
    assert [step for step, _ in list_checkpoints(folder)] == [5]


def test_a_file_that_cannot_be_read_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(manifest, "sha256", denied)
    with refused(folder, r"cannot read .*step_00000005/tensors/.metadata \(Permission denied\): fix that, or remove"):
        Run(folder).restore()


def test_a_checkpoint_of_another_network_is_refused(folder: Path) -> None:
    with refused(folder, "step_00000005 is damaged or not of this run"):
        Run(folder, width=8).restore()


# Versions


def sealed(path: Path) -> Path:
    """Give an altered checkpoint a manifest that fits it, as whoever altered it could."""
    (path / "manifest.json").unlink()
    write_manifest(path, describe_files(path), {"step": 5})
    return path


def test_the_manifest_says_what_is_there(folder: Path) -> None:
    path = newest(folder, "")
    assert sorted(contents(path)) == FILES
    saved = json.loads((path / "manifest.json").read_text())
    assert (saved["format_version"], saved["step"]) == (2, 5)
    assert saved["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents(path).items()
        if name != "manifest.json"
    }


def test_recorded_entries_are_read_again(folder: Path) -> None:
    run = Run(folder).train(range(7))
    with run.checkpoints:
        run.checkpoints.save(7, run.now, {"validation_loss": 0.1})
    assert read_record(folder / "step_00000007")["validation_loss"] == 0.1
    (folder / "step_00000007" / "manifest.json").unlink()
    assert read_record(folder / "step_00000007") == {}


def test_a_newer_version_is_refused(folder: Path) -> None:
    path = newest(folder, "manifest.json")
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 3'))
    with refused(folder, "step_00000005 has format version 3; this st-ar reads 2: continue the run with the st-ar"):
        Run(folder).restore()


def test_the_error_is_one_line_and_nothing_else_is_printed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest(folder, "tensors/.metadata").write_bytes(b"")
    sealed(newest(folder, ""))
    with pytest.raises(UserError) as raised:
        Run(folder).restore()
    assert "\n" not in str(raised.value)
    # torch's own warnings reach the terminal, tracebacks and all, unless someone stops them.
    assert [
        entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING and "Null" not in entry.name
    ] == []


# No code


@given(place=st.integers(0, 1 << 16), value=st.binary(max_size=4), length=st.integers(0, 5))
def test_a_garbled_index_is_refused_or_harmless_whatever_the_manifest_says(
    tmp_path_factory: pytest.TempPathFactory, garbled: Path, place: int, value: bytes, length: int
) -> None:
    folder = shutil.copytree(garbled, tmp_path_factory.mktemp("copy") / "checkpoints")
    index = folder / "step_00000002" / "tensors" / ".metadata"
    whole = index.read_bytes()
    place = place % len(whole)
    index.write_bytes(whole[:place] + value + whole[place + length :])
    sealed(folder / "step_00000002")
    fresh = Run(folder, seed=1)
    try:
        assert fresh.restore() == 2
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
    replace_index(folder, pickled(module, name, command))
    with refused(folder, "step_00000005 is damaged or not of this run"):
        Run(folder).restore()
    assert not trace.exists()


def replace_index(folder: Path, index: bytes) -> None:
    """Write another index into the newest checkpoint, with a manifest that fits."""
    newest(folder, "tensors/.metadata").write_bytes(index)
    sealed(newest(folder, ""))


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_an_index_written_by_another_python_is_read(folder: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = pickle.loads(newest(folder, "tensors/.metadata").read_bytes())
    with monkeypatch.context() as patch:  # Python 3.13 calls it pathlib._local
        patch.setitem(sys.modules, module, pathlib)
        patch.setattr(pathlib.PosixPath, "__module__", module)
        written = pickle.dumps(index)
    assert module.encode() + b"\x94" in written
    replace_index(folder, written)
    expected = Run(folder).train(range(5)).state()
    fresh = Run(folder, seed=1)
    assert fresh.restore() == 5
    assert_equal_bits(fresh.state(), expected)


def test_an_index_cannot_reach_into_modules_either(folder: Path) -> None:
    # torch's module imports os, so a name in it can stand for os itself, and pickle's BUILD sets attributes.
    words = [
        b"\x8c" + bytes([len(word)]) + word.encode()
        for word in ("torch.distributed.checkpoint.filesystem", "os", "trace")
    ]
    replace_index(folder, b"\x80\x04" + words[0] + words[1] + b"\x93}" + words[2] + b"K\x01sb.")
    with refused(folder, "step_00000005 is damaged or not of this run"):
        Run(folder).restore()
    assert not hasattr(os, "trace")


def test_the_payload_above_does_run_code_when_it_is_unpickled_carelessly(tmp_path: Path) -> None:
    for pickled in (pickled_call, pickled_call_of_old):
        trace = tmp_path / pickled.__name__
        pickle.loads(pickled("builtins", "eval", f"open({str(trace)!r}, 'w').close()"))
        assert trace.exists()


# A full disk


def test_a_disk_that_fills_up_leaves_the_previous_one_intact_and_says_so(folder: Path) -> None:
    run = Run(folder).train(range(7))
    with (
        full_disk(4096),
        refused(folder, "(?s)cannot write the checkpoint of step 7 .*step_00000005 is intact; free some space"),
    ):
        run.save(7)
    fresh = Run(folder, seed=1)
    assert fresh.restore() == 5
    assert run.save(7).name == "step_00000007"


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("mount") is None,
    reason="a file system is truly full where a small tmpfs can be mounted",
)
def test_a_disk_without_space_left_leaves_the_previous_one_intact_and_says_so(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 1 << 20):
        run = Run(disk / "checkpoints", keep=5).train(range(1))
        run.save(1)
        (disk / "others").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - (8 << 10)))
        before = contents(disk)
        run.train(range(1, 2))
        with pytest.raises(UserError, match=r"step 2 \(.*No space left on device.*\); .*step_00000001 is intact"):
            run.save(2)
        assert contents(disk) == before
        (disk / "others").unlink()
        fresh = Run(disk / "checkpoints", seed=1)
        assert fresh.restore() == 1
        fresh.train(range(1, 2)).save(2)
        assert [step for step, _ in list_checkpoints(disk / "checkpoints")] == [1, 2]


def test_the_message_of_a_full_disk_is_one_line_with_its_cause(folder: Path) -> None:
    with full_disk(4096), pytest.raises(UserError) as raised:
        Run(folder).train(range(7)).save(7)
    assert "\n" not in str(raised.value)
    assert "Traceback" not in str(raised.value)
    assert os.strerror(errno.EFBIG) in str(raised.value)


def test_the_first_checkpoint_on_a_full_disk_says_that_there_is_none(tmp_path: Path) -> None:
    with full_disk(4096), refused(tmp_path, "(?s)cannot write the checkpoint of step 1 .*there is no earlier one"):
        Run(tmp_path).train(range(1)).save(1)


def test_a_rename_that_fails_leaves_the_previous_one_intact(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", no_space)
    with refused(folder, r"step 7 .*No space left on device.*step_00000005 is intact"):
        Run(folder).train(range(7)).save(7)


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


def test_the_ema_weights_are_measured_at_every_checkpoint(measured: Path, others: Path) -> None:
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


def test_the_best_weights_are_exported_and_their_checkpoint_is_kept(measured: Path, others: Path) -> None:
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
        patch.setattr("st_ar.training.run.append_log", interrupting)
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
    named = random_store(tmp_path / "named", images=9, crops=1)[0]
    saved = json.loads((named / "meta.json").read_text())
    (named / "meta.json").write_text(json.dumps(saved | {"class_names": ["class-0", "class-2", "class-1"]}))
    with refused(tmp_path, r"have different class names \(class 1 is 'class-1' and 'class-2'\)"):
        train(MEASURED, tokens, tmp_path / "run", validation=named)
    damaged = random_store(tmp_path / "damaged", images=9, crops=1)[0]
    flip_byte(next(damaged.glob("codes-*")), 200)
    with refused(tmp_path, r"damaged \(its content does not match"):
        train(MEASURED, tokens, tmp_path / "run", validation=damaged)
    saved = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(saved | {"vocab_size": 16, "tokenizer": "f" * 64}))
    with refused(tmp_path, "was made by tokenizer ffffffffffff"):
        train(MEASURED, tokens, tmp_path / "run", validation=other)


# Those of every so many steps


def test_weights_of_keep_every_steps_are_exported_as_models(tokens: Path, tmp_path: Path) -> None:
    config = replace(GUIDED_RUN, steps=14, checkpoint_every=2, keep=1, keep_every=4)
    run = train(config, tokens, tmp_path / "run", preset="toy")
    assert sorted(path.name for path in (run / "kept").iterdir()) == ["step_00000004", "step_00000008", "step_00000012"]
    for step in (4, 8, 12):
        state = saved_state(run, step)
        for ema, prefix in ((False, "student.model."), (True, "ema.")):
            model, info = open_model(run / "kept" / f"step_{step:08d}", ema=ema)
            assert (info.step, info.ema) == (step, ema)
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, state[prefix + name]), name
    assert open_model(run)[1].step == 14


def test_kept_weights_are_written_by_the_next_start_if_a_kill_prevented_it(tokens: Path, tmp_path: Path) -> None:
    config = replace(GUIDED_RUN, keep_every=12)
    run = train(config, tokens, tmp_path / "run", preset="toy")
    kept = contents(run / "kept")
    assert kept
    (run / "kept" / "step_00000012" / "config.json").unlink()
    train(config, tokens, run, resume=True, preset="toy")
    assert contents(run / "kept") == kept


def test_nothing_is_kept_unasked(straight: Path) -> None:
    assert not (straight / "kept").exists()


def test_the_disk_space_of_a_run_is_predicted(tokens: Path, tmp_path: Path) -> None:
    model = replace(GUIDED_RUN.model, dim=128, n_layers=4, n_heads=2)  # large beside what the files say of themselves
    config = replace(PLAIN_RUN, model=model, steps=4, checkpoint_every=1, keep=1, keep_every=2)
    run = train(config, tokens, tmp_path / "run", preset="toy")
    found = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    whole = run_bytes(config)
    assert whole == parameters(model) * 4 * (4 * 4 + 2 * 3)
    one = (
        parameters(model) * 4 * 4
    )  # step 4's checkpoint counts as the newest and as one that is kept; one more is being written
    assert whole - 2 * one < found < whole
    assert run_bytes(replace(config, steps=None, epochs=2.0), images=60) == whole + 8 * (one + parameters(model) * 8)
