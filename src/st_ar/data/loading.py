"""Decoding and resizing in other processes, in order and with bounded memory. Nothing here imports torch."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from st_ar.data.source import BrokenImageError, Example, ImageSource, center_crop, check_pixels
from st_ar.distributed import Ranks
from st_ar.errors import UserError
from st_ar.progress import Progress, progress
from st_ar.randomness import RandomStream, numpy_generator


class Decoded(NamedTuple):
    """What became of some examples that follow one another."""

    pixels: np.ndarray
    """uint8 [k, side, side, 3] of the k that could be used."""
    used: list[int]
    """Their places [k] among the examples."""
    broken: list[tuple[int, str]]
    """Places of the others, with the reason."""


def decode(examples: Sequence[Example], side: int) -> Decoded:
    """Decode images, resize them and crop their centre to `side` pixels."""
    pixels: list[np.ndarray] = []
    used: list[int] = []
    broken: list[tuple[int, str]] = []
    for place, example in enumerate(examples):
        try:
            image = example.read()
            scale = side / min(image.size)
            check_pixels(image.width * scale, image.height * scale)  # one pixel wide, it would grow to anything
        except BrokenImageError as error:
            broken.append((place, str(error)))
        else:
            pixels.append(center_crop(image, side))
            used.append(place)
    return Decoded(np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8), used, broken)


class ImageDecoder:
    """Decodes chunks of examples, in `workers` processes or (0) in this one."""

    def __init__(self, side: int, pool: ProcessPoolExecutor | None, workers: int) -> None:
        self.side, self.pool, self.workers = side, pool, workers

    def decode(self, chunks: Iterable[list[Example]]) -> Iterator[tuple[list[Example], Decoded]]:
        """Each chunk with what became of it, in order; at most 2 * workers + 1 are under way at once.

        Raises:
            UserError: a process died, as when memory runs out.
        """
        if self.pool is None:
            yield from ((chunk, decode(chunk, self.side)) for chunk in chunks)
            return
        source = iter(chunks)
        under_way: deque[tuple[list[Example], Future[Decoded]]] = deque()
        try:
            while True:
                for chunk in islice(source, 2 * self.workers + 1 - len(under_way)):
                    under_way.append((chunk, self.pool.submit(decode, chunk, self.side)))
                if not under_way:
                    return
                chunk, future = under_way.popleft()
                yield chunk, future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {self.workers} decoding processes died, perhaps for want of memory, or in a script without "
                "`if __name__ == '__main__':`: give the same command with fewer --workers (0 for none) to go on; "
                "finished shards are kept"
            ) from error


@contextlib.contextmanager
def open_decoder(side: int, workers: int) -> Generator[ImageDecoder]:
    """A decoder whose processes end with the block, or with this process however it ends.

    They are spawned, not forked: torch's threads do not survive a fork. A script that asks for workers therefore needs
    its `if __name__ == "__main__":`.
    """
    if not workers:
        yield ImageDecoder(side, None, 0)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield ImageDecoder(side, pool, workers)
    finally:
        pool.shutdown(cancel_futures=True)


def default_workers(count: int | None) -> int:
    """One for each core that is ours, at most 8; none for fewer than 10,000 images, which are done as soon."""
    if count is not None and count < 10_000:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


SPAN = 512
"""Images that follow one another in the source and are read together."""
MEMORY = 2 << 30
"""Bytes of decoded images in a window; while the next one is decoded there are two."""
CHUNK = 64
"""Images that a process decodes at once."""


class Window(NamedTuple):
    """Images that are mixed with one another."""

    images: np.ndarray
    """Their indices in the source [n], in the order they are read."""
    order: np.ndarray
    """The order [n] in which training takes them: places in `images`."""
    start: int
    """The place of the first, counting from the first image of the first epoch."""


class CropLoader:
    """Random crops of a source's images, every image once an epoch. To be used in a `with` block.

    Args:
        size, crop_range: images are resized and centre-cropped to int(size * crop_range), then cut at random to `size`.
        mirror: whether half of them are mirrored; never those of a source that forbids it.
        batch_size: images of a step, over all ranks; this rank gets its share of them.
        workers: processes that decode; 0 for none beside this one. By default one for each core, at most 8, and none
            where all images fit in memory and are decoded once.
        memory: bytes of decoded images in a window.

    Raises:
        UserError: a source whose number of images nobody knows.
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
            raise UserError(f"{source.name} does not say how many images it has: give a folder: or parquet: source")
        self.source, self.images, self.size, self.seed = source, count, size, seed
        self.side = int(size * crop_range + 1e-6)
        self.mirror, self.batch_size = mirror and source.mirror, batch_size
        self.mine, self.shown = ranks.share(batch_size), ranks.rank == 0
        fitting = memory // (self.side**2 * 3)
        self.spans = 0 if count <= fitting else max(1, fitting // SPAN)
        """Spans of a window; 0 if one window holds the whole source."""
        self.workers = workers if workers is not None else default_workers(None) if self.spans else 0
        self.broken: dict[int, str] = {}
        """Images that could not be read, with the reason; others stand in for them."""
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
        """Decode what step `step` needs, with a progress bar."""
        window = self._find(step * self.batch_size)
        with progress("decode", len(window.images), unit="images", shown=self.shown) as bar:
            loading = self._loaded[self._key(window)] = self._thread.submit(self._load, window, bar)
            loading.result()

    def batch(self, step: int) -> Tensor:
        """The images of step `step` (counted from 0) that are this rank's: uint8 [B / world, size, size, 3]."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.mine]
        rng = numpy_generator(self.seed, RandomStream.CROPS, step)
        tops, lefts = rng.integers(self.side - self.size + 1, size=(2, self.batch_size))[:, self.mine]
        mirrored = (rng.random(self.batch_size) < 0.5)[self.mine] & self.mirror
        out = np.empty((len(places), self.size, self.size, 3), np.uint8)
        for row, place in enumerate(places):
            pixels = self._pixels(int(place))[tops[row] :, lefts[row] :][: self.size, : self.size]
            out[row] = pixels[:, ::-1] if mirrored[row] else pixels
        return torch.from_numpy(out)

    def _pixels(self, place: int) -> np.ndarray:
        """The image at a place of the endless sequence of epochs: uint8 [side, side, 3]."""
        window = self._find(place)
        key = self._key(window)
        if key not in self._loaded:
            self._loaded[key] = self._thread.submit(self._load, window)
        pixels = self._loaded[key].result()
        if self.spans:
            following = self._find(window.start + len(window.images))
            if following.start not in self._loaded:
                self._loaded = {key: self._loaded[key], following.start: self._thread.submit(self._load, following)}
        return pixels[window.order[place - window.start]]

    def _key(self, window: Window) -> int:
        return window.start if self.spans else 0

    def _find(self, place: int) -> Window:
        windows = self._plan(place // self.images)
        starts = [window.start for window in windows]
        return windows[int(np.searchsorted(starts, place, side="right")) - 1]

    def _draw_plan(self, epoch: int) -> list[Window]:
        """The windows of an epoch: spans in an order drawn for it (a stream's in their own), so many to a window."""
        rng = numpy_generator(self.seed, RandomStream.ORDER, epoch)
        if not self.spans:
            return [Window(np.arange(self.images), rng.permutation(self.images), epoch * self.images)]
        starts = np.arange(0, self.images, SPAN)
        if not self.source.streaming:
            starts = rng.permutation(starts)
        windows: list[Window] = []
        place = epoch * self.images
        for first in range(0, len(starts), self.spans):
            spans = [np.arange(s, min(s + SPAN, self.images)) for s in starts[first : first + self.spans]]
            images = np.concatenate(spans)
            windows.append(Window(images, rng.permutation(len(images)), place))
            place += len(images)
        return windows

    def _load(self, window: Window, bar: Progress | None = None) -> np.ndarray:
        """The window's images: uint8 [n, side, side, 3]. Of a part of a source, only those that this rank will ask for."""
        wanted = np.ones(len(window.images), bool)
        if self.spans:
            turn = (window.start + np.arange(len(window.images))) % self.batch_size
            wanted[window.order] = (turn >= self.mine.start) & (turn < self.mine.stop)
        out = np.zeros((len(window.images), self.side, self.side, 3), np.uint8)
        places = np.flatnonzero(wanted)
        good: list[int] = []
        bad: list[int] = []
        for start, (chunk, decoded) in zip(
            range(0, len(places), CHUNK), self._decoder.decode(self._read(window.images, wanted)), strict=True
        ):
            here = places[start : start + CHUNK]
            out[here[decoded.used]] = decoded.pixels
            good += here[decoded.used].tolist()
            for place, reason in decoded.broken:
                bad.append(int(here[place]))
                self.broken[int(window.images[here[place]])] = f"{chunk[place].name}: {reason}"
            if bar is not None:
                bar.advance(len(chunk))
        if len(bad) > len(good):
            raise UserError(
                f"{self.source.name}: {len(bad)} of {len(places)} images cannot be read, such as "
                f"{self.broken[int(window.images[bad[0]])]}; mend or remove them"
            )
        for index, place in enumerate(bad):
            out[place] = out[good[index % len(good)]]
        return out

    def _read(self, images: np.ndarray, wanted: np.ndarray) -> Iterator[list[Example]]:
        """Chunks of the wanted ones among the examples with these indices, read run by run."""
        runs = np.split(np.arange(len(images)), np.flatnonzero(np.diff(images) != 1) + 1)
        examples = (
            example
            for run in runs
            for place, example in zip(run, self._examples(int(images[run[0]]), len(run)), strict=True)
            if wanted[place]
        )
        while chunk := list(islice(examples, CHUNK)):
            yield chunk

    def _examples(self, start: int, length: int) -> Iterator[Example]:
        """`length` examples from index `start` on; a stream goes on where it was."""
        position, examples = self._stream
        if not self.source.streaming or position != start:
            examples = self.source.examples(start)
        got = 0
        for example in islice(examples, length):
            yield example
            got += 1
        if got < length:
            raise UserError(
                f"{self.source.name} ended before image {start + got + 1} of {self.images}: it has changed or is damaged"
            )
        self._stream = (start + length, examples)
