"""Trackers: one that raises is switched off; the real ones get every step once."""

import json
import os
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from st_ar.errors import UserError
from st_ar.training import track
from st_ar.training.run import append_log, read_log, rewind_log
from st_ar.training.track import (
    SafeTracker,
    Service,
    TensorBoard,
    _checksum,
    open_trackers,
    read_steps,
    require_trackers,
)
from tests.ranks import ROOT

PICTURE = np.zeros((4, 4, 3), np.uint8)


class Keeper:
    """Keeps what it is given."""

    def __init__(self, stored: int = 0) -> None:
        self.kept: list[tuple[int, str]] = []
        self.closed, self.stored = False, stored

    def log(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
        self.kept += [(step, name) for name in values]

    def close(self) -> None:
        self.closed = True


def test_entries_arrive_and_steps_that_the_tracker_has_are_left_out() -> None:
    keeper = Keeper(stored=3)
    tracker = SafeTracker("keeper", lambda: keeper)
    for step in range(2, 6):
        tracker.log(step, {"loss": 1.0})
        tracker.log(step, {"samples": PICTURE})
    tracker.close()
    assert keeper.kept == [(4, "loss"), (4, "samples"), (5, "loss"), (5, "samples")]
    assert keeper.closed


def test_a_tracker_that_raises_is_switched_off_and_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(Keeper):
        def log(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
            if step == 4:
                raise ConnectionError("no route to the\nhost")
            super().log(step, values)

    failing = Failing()
    tracker = SafeTracker("failing", lambda: failing)
    for step in range(1, 9):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert failing.kept == [(1, "loss"), (2, "loss"), (3, "loss")]
    said = capsys.readouterr().err
    assert said == "st-ar: failing is switched off: no route to the; training continues, and log.jsonl has everything\n"


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    require_trackers(["tensorboard", "none"])
    for name, extra in (("wandb", "tracking"), ("trackio", "trackio")):
        with pytest.raises(UserError, match=rf"--track {name} needs .*pip install 'st-ar\[{extra}\]'"):
            require_trackers(["tensorboard", name])


def test_a_run_keeps_its_name_in_the_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(track, "open_wandb", lambda *_: Keeper())
    open_trackers(["wandb"], out, {}, start=0, logged=0)
    first = json.loads((out / "tracking.json").read_text())
    assert first["name"] == "run"
    moved = out.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(track, "open_trackio", lambda *_: Keeper())
    open_trackers(["trackio"], moved, {}, start=4, logged=6)
    assert json.loads((moved / "tracking.json").read_text()) == first


def test_a_tracker_gets_the_logged_steps_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keepers = {"wandb": Keeper(stored=2), "trackio": Keeper(stored=7)}
    for name, keeper in keepers.items():
        monkeypatch.setattr(track, f"open_{name}", lambda *_, keeper=keeper: keeper)
    for step, values in (
        (2, {"loss": 2.0}),
        (3, {"skipped": "loss is nan"}),
        (4, {"loss": 1.0}),
        (4, {"validation": 0.5}),
    ):
        append_log(tmp_path / "log.jsonl", {"step": step, **values})
    (tmp_path / "samples").mkdir()
    Image.fromarray(PICTURE).save(tmp_path / "samples" / "step_00000003.png")
    for tracker in open_trackers(["wandb", "trackio"], tmp_path, {}, start=4, logged=9):
        for step in (5, 8):
            tracker.log(step, {"loss": 1.0})
    assert keepers["wandb"].kept == [(3, "samples"), (4, "loss"), (4, "validation"), (5, "loss"), (8, "loss")]
    assert keepers["trackio"].kept == [(8, "loss")]


def test_a_step_is_sent_whole(tmp_path: Path) -> None:
    sent: list[tuple[int, list[str]]] = []
    run = SimpleNamespace(log=lambda values, step: sent.append((step, sorted(values))), finish=lambda: None)
    service = Service(SimpleNamespace(init=lambda **_: run, Image=lambda value: value))
    for step, name in ((3, "samples"), (3, "loss"), (6, "loss"), (6, "validation")):
        service.log(step, {name: 1.0})
    assert sent == [(3, ["loss", "samples"])]
    service.close()
    assert sent == [(3, ["loss", "samples"]), (6, ["loss", "validation"])]


# The real ones, where they are installed; each in a process of its own, as a user's run is

SCRIPT = """
import sys, time
from pathlib import Path
import numpy as np
from st_ar.training import track
from st_ar.training.track import open_trackers
name, out, first, last, logged, track.PATIENCE = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
(tracker,) = open_trackers([name], out, {"lr": 1e-3}, start=first - 1, logged=logged)
opened = time.monotonic()
for step in range(first, last + 1):
    tracker.log(step, {"loss": 1 / step})
tracker.log(last, {"samples": np.zeros((8, 8, 3), np.uint8)})
assert time.monotonic() - opened < 5, "training had to wait"
on = tracker.tracker is not None
tracker.close()
print("tracker:", "on" if on else "off")
"""


def tracked(
    name: str, out: Path, steps: tuple[int, int], logged: int = 0, patience: int = 60, **environment: str
) -> str:
    """A process that tracks and waits so many seconds in the end; what it says."""
    command = [sys.executable, "-c", SCRIPT, name, str(out), *map(str, (*steps, logged, patience))]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (status,) = re.findall(r"^tracker: (on|off)$", done.stdout, re.MULTILINE)
    return status + done.stderr


# A run needs neither, and `make test-oldest` has neither. The rules that hold for any tracker are tested above, with trackers of our own.
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="needs the extra tracking")
needs_trackio = pytest.mark.skipif(find_spec("trackio") is None, reason="needs the extra trackio")


@needs_wandb
def test_wandb_offline_keeps_a_run_under_one_id(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert tracked("wandb", out, (1, 6), WANDB_MODE="offline") == "on"
    assert tracked("wandb", out, (5, 9), logged=6, WANDB_MODE="offline") == "on"
    identity = json.loads((out / "tracking.json").read_text())["id"]
    kept = sorted(out.glob("wandb/offline-run-*"))
    assert len(kept) == 2
    assert all(folder.name.endswith(identity) for folder in kept)
    assert [[*read_steps(folder / f"run-{identity}.wandb")] for folder in kept] == [[1, 2, 3, 4, 5, 6], [7, 8, 9]]


KILLED = """
import os, signal, sys
from pathlib import Path
from st_ar.training.run import append_log
from st_ar.training.track import open_trackers
name, out, store = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
(tracker,) = open_trackers([name], out, {}, start=0, logged=0)
step = 0
while step < 200 or sum(file.stat().st_size for file in store.rglob("*") if file.suffix in (".wandb", ".db")) < 200_000:
    step += 1
    tracker.log(step, {"loss": 1 / step, **dict.fromkeys("abcdefghij", 0.5)})
    append_log(out / "log.jsonl", {"step": step, "loss": 1 / step})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "name",
    [pytest.param("wandb", marks=[needs_wandb, pytest.mark.slow]), pytest.param("trackio", marks=needs_trackio)],
)
def test_no_step_is_missing_or_twice_after_a_kill(tmp_path: Path, name: str) -> None:
    out, place = tmp_path / "run", tmp_path / "trackio"
    out.mkdir()
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(place)}
    store = out if name == "wandb" else place

    def stored() -> list[int]:
        if name == "wandb":
            return [step for file in sorted(out.glob("wandb/offline-run-*/*.wandb")) for step in read_steps(file)]
        with sqlite3.connect(next(place.glob("*.db"))) as opened:
            return [row[0] for row in opened.execute("SELECT step FROM metrics ORDER BY step, id")]

    command = [sys.executable, "-c", KILLED, name, str(out), str(store)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    logged = read_log(out / "log.jsonl")[-1]["step"]
    had = stored()
    assert 0 < len(had) < logged
    assert had == [*range(1, len(had) + 1)]
    checkpoint = logged - 1  # it lies after what the tracker has
    rewind_log(out / "log.jsonl", checkpoint)
    assert tracked(name, out, (checkpoint + 1, logged + 3), logged=logged, **environment).startswith("on")
    assert stored() == [*range(1, logged + 4)]


@pytest.mark.slow
@needs_wandb
def test_wandb_without_an_address_ends_in_time(tmp_path: Path) -> None:
    with socket.socket() as closed:  # nobody listens there
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        said = tracked("wandb", tmp_path / "run", (1, 300), patience=2, WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40)
    assert "log.jsonl has everything" in said


@needs_wandb
@pytest.mark.slow
def test_wandb_without_a_key_asks_nobody(tmp_path: Path) -> None:
    said = tracked("wandb", tmp_path / "run", (1, 3), HOME=str(tmp_path), WANDB_MODE="online", WANDB_API_KEY="")
    assert said.startswith("off")
    assert "set WANDB_API_KEY or call `wandb login`, or set WANDB_MODE=offline" in said


@pytest.mark.slow
@needs_trackio
def test_trackio_keeps_a_run_under_one_name(tmp_path: Path) -> None:
    out, place = tmp_path / "run", tmp_path / "trackio"
    for steps, logged in (((1, 6), 0), ((5, 9), 6)):
        assert tracked("trackio", out, steps, logged=logged, TRACKIO_DIR=str(place)).startswith("on")
    (database,) = place.glob("*.db")
    with sqlite3.connect(database) as opened:
        rows = opened.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step, id").fetchall()
    identity = json.loads((out / "tracking.json").read_text())
    assert {row[0] for row in rows} == {f"run-{identity['id']}"}
    losses = [(step, json.loads(metrics)["loss"]) for _, step, metrics in rows if "loss" in json.loads(metrics)]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 10)]


RUN_SCRIPT = """
import signal, sys
from pathlib import Path
from st_ar.training.loop import train
from tests.training.dying import arm
from tests.training.test_watch import RUN, everything
line, out, resume = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "resume"
if not resume:
    arm(signal.SIGKILL, "log", 8)
train(RUN, line / "tokens", out, watching=everything(line, track=("wandb", "trackio")), resume=resume)
"""


@pytest.mark.slow
@needs_wandb
@needs_trackio
def test_a_killed_run_leaves_whole_curves(tmp_path: Path) -> None:
    from tests.training.test_watch import make_line

    line, out, place = make_line(tmp_path / "line"), tmp_path / "run", tmp_path / "trackio"
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(place)}
    for how, status in (("begin", -signal.SIGKILL), ("resume", 0)):
        command = [sys.executable, "-c", RUN_SCRIPT, str(line), str(out), how]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, timeout=240)
        assert done.returncode == status, done.stderr
    log = {entry["step"]: entry["loss"] for entry in read_log(out / "log.jsonl")}
    assert [*log] == [3, 4, 5, 6, 8, 9, 10, 12]
    assert [step for file in sorted(out.glob("wandb/offline-run-*/*.wandb")) for step in read_steps(file)] == [*log]
    with sqlite3.connect(next(place.glob("*.db"))) as opened:
        rows = [
            (step, json.loads(row)) for step, row in opened.execute("SELECT step, metrics FROM metrics ORDER BY id")
        ]
    assert [(step, row["loss"]) for step, row in rows] == [*log.items()]
    assert [step for step, row in rows if "samples" in row] == [5, 10]


pytest.importorskip("tensorboard")


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def test_the_checksum_is_tensorboards() -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    for data in (b"", b"123456789", bytes(range(256)) * 3):
        assert struct.unpack("<I", _checksum(data))[0] == masked_crc32c(data)


def test_messages_are_those_of_the_protocol(tmp_path: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    tracker = TensorBoard(tmp_path, 1)
    tracker.log(300, {"loss": 0.1, "lr": -2.0})
    data, records = tracker.path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert data[8:12] == _checksum(data[:8])
        records.append(data[12 : 12 + length])
        assert data[12 + length : 16 + length] == _checksum(records[-1])
        data = data[16 + length :]
    events = [Event.FromString(record) for record in records]
    assert [event.file_version for event in events] == ["brain.Event:2", "", ""]
    assert events[1].session_log.status == 1
    values = [Summary.Value(tag="loss", simple_value=0.1), Summary.Value(tag="lr", simple_value=-2.0)]
    expected = Event(wall_time=events[2].wall_time, step=300, summary=Summary(value=values))
    assert records[2] == expected.SerializeToString()


def test_curves_and_pictures_are_read_back(tmp_path: Path) -> None:
    tracker = TensorBoard(tmp_path, 1)
    for step in (1, 200, 70_000):
        tracker.log(step, {"loss": 1 / step})
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    tracker.log(200, {"samples": picture})
    assert scalars(tmp_path, "loss") == [(step, pytest.approx(1 / step)) for step in (1, 200, 70_000)]
    (event,) = read(tmp_path).Images("samples")
    assert (event.step, event.width, event.height) == (200, 7, 5)
    (tmp_path / "found.png").write_bytes(event.encoded_image_string)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "found.png")), picture)


def test_repeated_steps_do_not_show_twice(tmp_path: Path) -> None:
    killed = TensorBoard(tmp_path, 1)
    for step in range(1, 8):
        killed.log(step, {"loss": float(step)})
    resumed = TensorBoard(tmp_path, 5)  # from the checkpoint of step 4
    assert scalars(tmp_path, "loss") == [(step, step) for step in range(1, 5)]
    for step in range(5, 10):
        resumed.log(step, {"loss": -float(step)})
    assert scalars(tmp_path, "loss") == [*((s, s) for s in range(1, 5)), *((s, -s) for s in range(5, 10))]


def test_a_file_cut_short_is_read_to_the_cut(tmp_path: Path) -> None:
    tracker = TensorBoard(tmp_path, 1)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": float(step)})
    tracker.path.write_bytes(tracker.path.read_bytes()[:-3])
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0)]
