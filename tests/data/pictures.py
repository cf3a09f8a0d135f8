"""Image files in memory: whole ones of every kind, and broken ones."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The file that Pillow writes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 20, height: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG by hand: colour 0 is grey, 2 RGB; `rows` are the samples, big-endian."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    stride = len(rows) // max(1, height)
    lines = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def broken_pictures() -> dict[str, bytes]:
    """Files that no image can be had from."""
    jpeg = encoded(noise(64, 64), "JPEG")
    return {
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "truncated png": encoded(noise(64, 64))[:600],
        "header alone": encoded(noise())[:20],
        "empty": b"",
        "text": b"<html>404 Not Found</html>",
        "postscript": encoded(noise(), "EPS"),
        "bomb": png(30_000, 30_000, 8, 0, b""),
    }
