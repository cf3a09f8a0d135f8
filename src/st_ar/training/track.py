"""Trackers: TensorBoard, Weights & Biases and trackio, each with `log` for numbers and images uint8 [H, W, 3], and `close`.

A tracker that fails is reported and switched off; training continues. wandb and trackio send in the background.
"""

import io
import os
import secrets
import struct
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st_ar.config import TrackerName
from st_ar.errors import UserError, cause
from st_ar.files import printable, read_json, write_json
from st_ar.training.run import read_log

PATIENCE = 5.0
"""Seconds that wandb has to reach its server at the start, and to send the rest at the end."""
PROJECT = "st-ar"


class Service:
    """A run in wandb or trackio, which have the same interface. It stores a step with all its values or not at all."""

    stored = 0
    """Last step that it had stored when it was opened."""
    options: Mapping[str, Any] = {}
    """More arguments of the run's `log`."""

    def __init__(self, module: Any, **settings: Any) -> None:
        self.module, self.run = module, module.init(resume="allow", **settings)
        self.step, self.values = 0, dict[str, Any]()

    def log(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
        if step != self.step:
            self._send()
            self.step = step
        self.values |= {k: self.module.Image(v) if isinstance(v, np.ndarray) else v for k, v in values.items()}

    def close(self) -> None:
        self._send()
        self.run.finish()

    def _send(self) -> None:
        if self.values:
            self.run.log(self.values, step=self.step, **self.options)
            self.values = {}


def open_wandb(folder: Path, identity: dict[str, str], config: dict[str, Any], logged: int) -> Service:
    """Open Weights & Biases, configured by its environment variables (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ..)."""
    wandb = import_module("wandb")
    settings = wandb.Settings(init_timeout=PATIENCE, finish_timeout=PATIENCE, silent=True, console="off")
    online = os.environ.get("WANDB_MODE", "online") == "online"
    if online and not wandb.login(prompt=False, verify=False):  # without a key `init` would ask on the terminal
        raise UserError("it has no key: set WANDB_API_KEY or call `wandb login`, or set WANDB_MODE=offline")
    names = {"project": os.environ.get("WANDB_PROJECT", PROJECT), "id": identity["id"], "name": identity["name"]}
    files = list(folder.glob(f"wandb/offline-run-*/run-{identity['id']}.wandb"))
    service = Service(wandb, dir=folder, config=config, settings=settings, **names)
    steps = [step for file in files for step in read_steps(file)]
    if not (online or files):  # nothing yet, or synchronised and removed
        steps = [logged]
    service.options = {"commit": True}  # otherwise it would wait for yet another step
    service.stored = max([service.run.starting_step - 1, *steps])  # the server's, or those in the files
    return service


def read_steps(file: Path) -> Iterator[int]:
    """The steps in a .wandb file: records in LevelDB's log format, of which a killed run leaves the last incomplete."""
    record_type = import_module("wandb.proto.wandb_internal_pb2").Record
    data, start, record = file.read_bytes(), 7, b""
    while start + 7 <= len(data):
        if (rest := -start % 32768) and rest < 7:  # no space for a header at a block's end
            start += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, start)
        start += 7 + length
        record += data[start - length : start]
        if kind in (1, 4) and start <= len(data):  # whole, or the last part
            found, record = record_type.FromString(record), b""
            if found.HasField("history"):
                yield found.history.step.num


def open_trackio(identity: dict[str, str], config: dict[str, Any], logged: int) -> Service:
    """Open trackio, on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set."""
    name = f"{identity['name']}-{identity['id']}"
    quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    service = Service(import_module("trackio"), project=PROJECT, name=name, config=config, **quiet)
    service.stored = getattr(service.run, "_next_step", logged + 1) - 1
    return service


class SafeTracker:
    """A tracker whose errors switch it off with a message instead of ending the run. It gets only the steps that it lacks."""

    def __init__(self, name: str, open_tracker: "Callable[[], Service | TensorBoard]") -> None:
        self.name, self.after = name, 0
        self.tracker = None
        with self._switching_off():
            self.tracker = open_tracker()
            self.after = self.tracker.stored

    def log(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
        """Log the numbers and images of a step."""
        with self._switching_off():
            if self.tracker and step > self.after:
                self.tracker.log(step, values)

    def close(self) -> None:
        """Finish."""
        with self._switching_off():
            if self.tracker:
                self.tracker.close()

    @contextmanager
    def _switching_off(self) -> Generator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker raises, training continues
            self.tracker = None
            warn(f"{self.name} is switched off: {cause(error)}; training continues, and log.jsonl has everything")


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse trackers whose packages are not installed."""
    for name, extra in (("wandb", "tracking"), ("trackio", "trackio")):
        if name in names and find_spec(name) is None:
            raise UserError(f"--track {name} needs the package {name}: pip install 'st-ar[{extra}]', or leave it out")


def open_trackers(
    names: Sequence[TrackerName], out: Path, config: dict[str, Any], *, start: int, logged: int
) -> list[SafeTracker]:
    """Start to track the run in `out` from step `start`, or continue under its name in each tracker.

    tracking.json keeps the name in wandb and trackio. They accept no step twice, and get from log.jsonl what they lack: a killed run
    has logged more than they had stored. `logged` is the last step logged before, for a tracker that does not know its own.
    """
    opened: list[SafeTracker] = []
    if "tensorboard" in names:
        opened.append(SafeTracker("TensorBoard", lambda: TensorBoard(out / "tensorboard", start + 1)))
    if "wandb" in names or "trackio" in names:
        file = out / "tracking.json"
        if not file.exists():
            write_json(file, {"id": secrets.token_hex(4), "name": printable(out.name)})
        identity = read_json(file, "a tracked run")
        for name, open_service in (("wandb", partial(open_wandb, out)), ("trackio", open_trackio)):
            if name in names:
                opened.append(tracker := SafeTracker(name, partial(open_service, identity, config, logged)))
                for step, values in read_values(out, tracker.after):
                    tracker.log(step, values)
    return opened


def read_values(out: Path, after: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbers and sample grids of the logged steps after `after`."""
    for entry in read_log(out / "log.jsonl"):
        if (step := entry["step"]) > after:
            numbers = {name: value for name, value in entry.items() if name not in ("step", "skipped")}
            grid = out / "samples" / f"step_{step:08d}.png"
            with suppress(OSError):  # most steps have none
                numbers["samples"] = np.asarray(Image.open(grid))
            yield step, numbers


def warn(message: str) -> None:
    """Print a message to stderr."""
    print(f"st-ar: {message}", file=sys.stderr, flush=True)


class TensorBoard:
    """A new TensorBoard event file in `folder`.

    TensorBoard drops `first_step` and later steps of earlier files, so that a resumed run shows no step twice.
    """

    stored = 0

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.st-ar"  # files are read in the order of their names
        self._append(first_step, _message(3, b"brain.Event:2"))  # file_version
        self._append(first_step, _message(7, _integer(1, 1)))  # session_log: START

    def log(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
        # Fields: summary.value with tag and simple_value or image.
        fields = [_message(1, _message(1, name.encode()) + _content(value)) for name, value in values.items()]
        self._append(step, _message(5, b"".join(fields)))

    def close(self) -> None:
        """Do nothing: everything is in the file."""

    def _append(self, step: int, content: bytes) -> None:
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + _integer(2, step) + content
        length = struct.pack("<Q", len(event))
        with open(self.path, "ab") as file:
            file.write(length + _checksum(length) + event + _checksum(event))


def _content(value: float | np.ndarray) -> bytes:
    if not isinstance(value, np.ndarray):
        return _varint(2 << 3 | 5) + np.float32(value).tobytes()
    png = io.BytesIO()
    Image.fromarray(value).save(png, format="PNG")
    height, width = value.shape[:2]
    return _message(4, _integer(1, height) + _integer(2, width) + _integer(3, 3) + _message(4, png.getvalue()))


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def _integer(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in table]
    return table


_TABLE = _crc_table()


def _checksum(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
