"""Decoding and resizing in other processes, in order and with bounded memory. Nothing here imports torch."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import NamedTuple

import numpy as np

from st_ar.data.crops import center_crop
from st_ar.data.decode import BrokenImageError, check_pixels
from st_ar.data.images import Example
from st_ar.errors import UserError


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


class Decoder:
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
def open_decoder(side: int, workers: int) -> Generator[Decoder]:
    """A decoder whose processes end with the block, or with this process however it ends.

    They are spawned, not forked: torch's threads do not survive a fork. A script that asks for workers therefore needs
    its `if __name__ == "__main__":`.
    """
    if not workers:
        yield Decoder(side, None, 0)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield Decoder(side, pool, workers)
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
