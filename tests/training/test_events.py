"""TensorBoard's files, read by TensorBoard itself."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from st_ar.training.track import TensorBoard, _checksum

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
    tracker.images(200, "samples", picture)
    assert scalars(tmp_path, "loss") == [(step, pytest.approx(1 / step)) for step in (1, 200, 70_000)]
    (event,) = read(tmp_path).Images("samples")
    assert (event.step, event.width, event.height) == (200, 7, 5)
    (tmp_path / "found.png").write_bytes(event.encoded_image_string)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "found.png")), picture)


def test_steps_that_are_made_anew_do_not_show_twice(tmp_path: Path) -> None:
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
