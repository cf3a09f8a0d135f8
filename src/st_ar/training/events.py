"""TensorBoard's event files, written without TensorBoard: records of Event messages (tensorflow/core/util/event.proto).

A record is the message's length (uint64), a checksum of it, the message, and a checksum of that. A checksum is a masked
CRC-32C. Messages are Protocol Buffers; the few fields that are needed are encoded here.
"""

import io
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


class TensorBoard:
    """Appends to an event file of its own in `folder`.

    Args:
        first_step: what earlier files there say of this step and later ones is taken back (TensorBoard's purging), so that
            steps that a resumed run makes anew do not show twice.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.st-ar"  # files are read in the order of their names
        self._append(first_step, _message(3, b"brain.Event:2"))  # file_version
        self._append(first_step, _message(7, _integer(1, 1)))  # session_log: START

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add a step's numbers."""
        values = [
            _message(1, _message(1, name.encode()) + _float(2, value))  # tag, simple_value
            for name, value in scalars.items()
        ]
        self._append(step, _message(5, b"".join(values)))  # summary

    def images(self, step: int, name: str, array: np.ndarray) -> None:
        """Add a picture uint8 [H, W, 3]."""
        png = io.BytesIO()
        Image.fromarray(array).save(png, format="PNG")
        height, width = array.shape[:2]
        image = _integer(1, height) + _integer(2, width) + _integer(3, 3) + _message(4, png.getvalue())
        self._append(step, _message(5, _message(1, _message(1, name.encode()) + _message(4, image))))

    def close(self) -> None:
        """Everything is in the file already."""

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
