"""Batches of random crops for training tokenizers."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from st_ar.data.decoding import default_workers, open_decoder
from st_ar.data.source import Example, ImageSource
from st_ar.distributed import Ranks
from st_ar.errors import UserError
from st_ar.progress import Progress, progress
from st_ar.randomness import RandomStream, numpy_generator

SPAN = 512
"""Consecutive images of the source that are read together."""
MEMORY = 2 << 30
"""Bytes of decoded images in a window. Two windows exist while the next one is decoded."""
CHUNK = 64
"""Images that a process decodes at once."""


class Window(NamedTuple):
    """Images that are shuffled together."""

    images: np.ndarray
    """Indices [n] in the source, in reading order."""
    order: np.ndarray
    """The order [n] of training, as indices into `images`."""
    start: int
    """Number of training images before this window, over all epochs."""


class CropLoader:
    """Random crops of a source's images, each image once an epoch. Use it as a context manager.

    Args:
        size, crop_range: images are resized and centre-cropped to int(size * crop_range), then cut at random to `size`.
        mirror: mirror half of the images, if the source allows it.
        batch_size: images of a step over all ranks; each rank gets an equal part.
        workers: decoding processes besides this one. Default: `default_workers`, or 0 if all images fit in memory.
        memory: bytes of decoded images in a window.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        size: int,
        crop_range: float,
        mirror: bool,
        batch_size: int,
        seed: int,
        workers: int | None = None,
        ranks: Ranks | None = None,
        memory: int = MEMORY,
    ) -> None:
        ranks = ranks or Ranks()
        count = source.count if source.count is not None else source.expected
        if not count:
            raise UserError(f"{source.name} has an unknown number of images: give a folder: or parquet: source")
        self.source, self.images, self.size, self.seed = source, count, size, seed
        self.side = int(size * crop_range + 1e-6)
        self.mirror, self.batch_size = mirror and source.mirror, batch_size
        self.share, self.shown = ranks.share(batch_size), ranks.rank == 0
        fitting = memory // (self.side**2 * 3)
        self.spans = 0 if count <= fitting else max(1, fitting // SPAN)
        """Spans of a window; 0 if one window holds the whole source."""
        self.workers = workers if workers is not None else default_workers(None) if self.spans else 0
        self.broken: dict[int, str] = {}
        """Index -> reason, of unreadable images. Other images replace them."""
        self._plan = lru_cache(maxsize=3)(self._draw_plan)
        self._stream: tuple[int, Iterator[Example]] = (-1, iter(()))

    def __enter__(self) -> Self:
        self._decoding = open_decoder(self.side, self.workers)
        self._decoder = self._decoding.__enter__()
        self._thread = ThreadPoolExecutor(1)
        self._loaded: dict[int, Future[np.ndarray]] = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._decoding.__exit__(None, None, None)

    def prepare(self, step: int) -> None:
        """Decode the images of a step, with a progress bar."""
        window = self._find(step * self.batch_size)
        with progress("decode", len(window.images), unit="images", shown=self.shown) as bar:
            loading = self._loaded[self._key(window)] = self._thread.submit(self._load, window, bar)
            loading.result()

    def batch(self, step: int) -> Tensor:
        """The images of this rank at a step: uint8 [B / ranks, size, size, 3]."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.share]
        rng = numpy_generator(self.seed, RandomStream.CROPS, step)
        tops, lefts = rng.integers(self.side - self.size + 1, size=(2, self.batch_size))[:, self.share]
        mirrored = (rng.random(self.batch_size) < 0.5)[self.share] & self.mirror
        out = np.empty((len(positions), self.size, self.size, 3), np.uint8)
        for row, position in enumerate(positions):
            pixels = self._pixels(int(position))[tops[row] :, lefts[row] :][: self.size, : self.size]
            out[row] = pixels[:, ::-1] if mirrored[row] else pixels
        return torch.from_numpy(out)

    def _pixels(self, position: int) -> np.ndarray:
        """The image at a position in the sequence of all epochs: uint8 [side, side, 3]."""
        window = self._find(position)
        key = self._key(window)
        if key not in self._loaded:
            self._loaded[key] = self._thread.submit(self._load, window)
        pixels = self._loaded[key].result()
        if self.spans:
            following = self._find(window.start + len(window.images))
            if following.start not in self._loaded:
                self._loaded = {key: self._loaded[key], following.start: self._thread.submit(self._load, following)}
        return pixels[window.order[position - window.start]]

    def _key(self, window: Window) -> int:
        return window.start if self.spans else 0

    def _find(self, position: int) -> Window:
        windows = self._plan(position // self.images)
        starts = [window.start for window in windows]
        return windows[int(np.searchsorted(starts, position, side="right")) - 1]

    def _draw_plan(self, epoch: int) -> list[Window]:
        """The windows of an epoch: groups of spans in random order; a stream's spans keep their order."""
        rng = numpy_generator(self.seed, RandomStream.ORDER, epoch)
        if not self.spans:
            return [Window(np.arange(self.images), rng.permutation(self.images), epoch * self.images)]
        starts = np.arange(0, self.images, SPAN)
        if not self.source.streaming:
            starts = rng.permutation(starts)
        windows: list[Window] = []
        position = epoch * self.images
        for first in range(0, len(starts), self.spans):
            spans = [np.arange(s, min(s + SPAN, self.images)) for s in starts[first : first + self.spans]]
            images = np.concatenate(spans)
            windows.append(Window(images, rng.permutation(len(images)), position))
            position += len(images)
        return windows

    def _load(self, window: Window, bar: Progress | None = None) -> np.ndarray:
        """The window's images: uint8 [n, side, side, 3]. With several windows, images of other ranks stay zero."""
        needed = np.ones(len(window.images), bool)
        if self.spans:
            offset = (window.start + np.arange(len(window.images))) % self.batch_size
            needed[window.order] = (offset >= self.share.start) & (offset < self.share.stop)
        out = np.zeros((len(window.images), self.side, self.side, 3), np.uint8)
        rows = np.flatnonzero(needed)
        good: list[int] = []
        bad: list[int] = []
        decoding = self._decoder.decode(self._read(window.images, needed))
        for start, (chunk, decoded) in zip(range(0, len(rows), CHUNK), decoding, strict=True):
            chunk_rows = rows[start : start + CHUNK]
            out[chunk_rows[decoded.used]] = decoded.pixels
            good += chunk_rows[decoded.used].tolist()
            for index, reason in decoded.broken:
                bad.append(int(chunk_rows[index]))
                self.broken[int(window.images[bad[-1]])] = f"{chunk[index].name}: {reason}"
            if bar is not None:
                bar.advance(len(chunk))
        if len(bad) > len(good):
            raise UserError(
                f"{self.source.name}: {len(bad)} of {len(rows)} images cannot be read, such as "
                f"{self.broken[int(window.images[bad[0]])]}; repair or remove them"
            )
        for index, row in enumerate(bad):
            out[row] = out[good[index % len(good)]]
        return out

    def _read(self, images: np.ndarray, needed: np.ndarray) -> Iterator[list[Example]]:
        """Chunks of the needed examples among those with the indices `images`; consecutive indices are read together."""
        runs = np.split(np.arange(len(images)), np.flatnonzero(np.diff(images) != 1) + 1)
        examples = (
            example
            for run in runs
            for row, example in zip(run, self._examples(int(images[run[0]]), len(run)), strict=True)
            if needed[row]
        )
        while chunk := list(islice(examples, CHUNK)):
            yield chunk

    def _examples(self, start: int, length: int) -> Iterator[Example]:
        """`length` examples from index `start` on; a stream continues from its position if it can."""
        position, examples = self._stream
        if not self.source.streaming or position != start:
            examples = self.source.examples(start)
        count = 0
        for example in islice(examples, length):
            yield example
            count += 1
        if count < length:
            raise UserError(
                f"{self.source.name} ended before image {start + count + 1} of {self.images}: it has changed or is damaged"
            )
        self._stream = (start + length, examples)
