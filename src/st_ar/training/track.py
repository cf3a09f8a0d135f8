"""Trackers: TensorBoard, Weights & Biases and trackio behind one interface.

A tracker that fails is reported and switched off; training continues. wandb and trackio send in the background.
"""

import io
import os
import secrets
import struct
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st_ar.config import TrackerName
from st_ar.errors import UserError, cause
from st_ar.files import read_json, write_json

PATIENCE = 5.0
"""Seconds that wandb has to reach its server at the start, and to send the rest at the end."""
PROJECT = "st-ar"


class Tracker:
    """A tracker. wandb and trackio have the same interface and differ in how they open a run."""

    module: Any
    run: Any

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self.run.log(dict(scalars), step=step)

    def images(self, step: int, name: str, array: np.ndarray) -> None:
        """Log an image, uint8 [H, W, 3]."""
        self.run.log({name: self.module.Image(array)}, step=step)

    def close(self) -> None:
        """Finish."""
        self.run.finish()


class Wandb(Tracker):
    """Weights & Biases, configured by its environment variables (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ..)."""

    def __init__(self, folder: Path, identity: dict[str, str], config: dict[str, Any]) -> None:
        self.module = import_module("wandb")
        settings = self.module.Settings(init_timeout=PATIENCE, finish_timeout=PATIENCE, silent=True, console="off")
        online = os.environ.get("WANDB_MODE", "online") == "online"
        if online and not self.module.login(
            prompt=False, verify=False
        ):  # without a key `init` would ask on the terminal
            raise UserError("it has no key: set WANDB_API_KEY or call `wandb login`, or set WANDB_MODE=offline")
        self.run = self.module.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identity["id"],
            name=identity["name"],
            resume="allow",
            dir=folder,
            config=config,
            settings=settings,
        )


class Trackio(Tracker):
    """trackio, on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set."""

    def __init__(self, identity: dict[str, str], config: dict[str, Any]) -> None:
        self.module = import_module("trackio")
        self.run = self.module.init(
            project=PROJECT,
            name=f"{identity['name']}-{identity['id']}",
            resume="allow",
            config=config,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )


class SafeTracker:
    """A tracker whose errors switch it off with a message instead of ending the run. It gets only the steps after `after`."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], *, after: int = 0) -> None:
        self.name, self.after = name, after
        self.tracker: Tracker | None = None
        with self._switching_off():
            self.tracker = open_tracker()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        with self._switching_off():
            if self.tracker and step > self.after:
                self.tracker.log(step, scalars)

    def images(self, step: int, name: str, array: np.ndarray) -> None:
        """Log an image, uint8 [H, W, 3]."""
        with self._switching_off():
            if self.tracker and step > self.after:
                self.tracker.images(step, name, array)

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
    """Start to track a run, or continue under its name in each tracker.

    Args:
        out: the run's folder. tracking.json there keeps the run's name in wandb and trackio.
        config: settings that they show.
        start: the step that the run continues from.
        logged: the last step logged before; wandb and trackio accept no step twice.
    """
    opened: list[SafeTracker] = []
    if "tensorboard" in names:
        opened.append(SafeTracker("TensorBoard", lambda: TensorBoard(out / "tensorboard", start + 1)))
    if "wandb" in names or "trackio" in names:
        file = out / "tracking.json"
        if not file.exists():
            write_json(file, {"id": secrets.token_hex(4), "name": out.name})
        identity = read_json(file, "a tracked run")
        if "wandb" in names:
            opened.append(SafeTracker("wandb", lambda: Wandb(out, identity, config), after=logged))
        if "trackio" in names:
            opened.append(SafeTracker("trackio", lambda: Trackio(identity, config), after=logged))
    return opened


def warn(message: str) -> None:
    """Print a message to stderr."""
    print(f"st-ar: {message}", file=sys.stderr, flush=True)


class TensorBoard(Tracker):
    """A new TensorBoard event file in `folder`.

    Args:
        first_step: TensorBoard drops this step and later ones of earlier files, so that a resumed run shows no step twice.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.st-ar"  # files are read in the order of their names
        self._append(first_step, _message(3, b"brain.Event:2"))  # file_version
        self._append(first_step, _message(7, _integer(1, 1)))  # session_log: START

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        # Fields: summary.value with tag and simple_value.
        values = [_message(1, _message(1, name.encode()) + _float(2, value)) for name, value in scalars.items()]
        self._append(step, _message(5, b"".join(values)))

    def images(self, step: int, name: str, array: np.ndarray) -> None:
        png = io.BytesIO()
        Image.fromarray(array).save(png, format="PNG")
        height, width = array.shape[:2]
        image = _integer(1, height) + _integer(2, width) + _integer(3, 3) + _message(4, png.getvalue())
        self._append(step, _message(5, _message(1, _message(1, name.encode()) + _message(4, image))))

    def close(self) -> None:
        """Do nothing: everything is in the file."""

    def _append(self, step: int, content: bytes) -> None:
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + _integer(2, step) + content
        length = struct.pack("<Q", len(event))
        with open(self.path, "ab") as file:
            file.write(length + _checksum(length) + event + _checksum(event))


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def _integer(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _float(field: int, number: float) -> bytes:
    return _varint(field << 3 | 5) + np.float32(number).tobytes()


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
