"""Decoding images in worker processes. Nothing here imports torch, so that workers start fast and stay small."""

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

from st_ar.data.source import BrokenImageError, Example
from st_ar.errors import UserError


class Decoded(NamedTuple):
    """The result of decoding a chunk of examples."""

    pixels: np.ndarray
    """uint8 [k, side, side, 3] of the usable images."""
    used: list[int]
    """Their indices [k] in the chunk."""
    broken: list[tuple[int, str]]
    """Indices of the other images, with the reason."""


def decode(examples: Sequence[Example], side: int) -> Decoded:
    """Decode images, resize them and crop their centre to `side` pixels."""
    pixels: list[np.ndarray] = []
    used: list[int] = []
    broken: list[tuple[int, str]] = []
    for index, example in enumerate(examples):
        try:
            pixels.append(example.read_cropped(side))
            used.append(index)
        except BrokenImageError as error:
            broken.append((index, str(error)))
    return Decoded(np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8), used, broken)


class ImageDecoder:
    """Decodes chunks of examples in worker processes, or in this process."""

    def __init__(self, side: int, pool: ProcessPoolExecutor | None, workers: int) -> None:
        self.side, self.pool, self.workers = side, pool, workers

    def decode(self, chunks: Iterable[list[Example]]) -> Iterator[tuple[list[Example], Decoded]]:
        """Yield each chunk with its result, in order; at most 2 * workers + 1 chunks are pending.

        Raises:
            UserError: a process died, for example of a lack of memory.
        """
        if self.pool is None:
            yield from ((chunk, decode(chunk, self.side)) for chunk in chunks)
            return
        source = iter(chunks)
        pending: deque[tuple[list[Example], Future[Decoded]]] = deque()
        try:
            while True:
                for chunk in islice(source, 2 * self.workers + 1 - len(pending)):
                    pending.append((chunk, self.pool.submit(decode, chunk, self.side)))
                if not pending:
                    return
                chunk, future = pending.popleft()
                yield chunk, future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {self.workers} decoding processes died, perhaps out of memory, or in a script without "
                "`if __name__ == '__main__':`: give the same command with fewer --workers (0 for none) to continue; "
                "finished shards are kept"
            ) from error


@contextlib.contextmanager
def open_decoder(side: int, workers: int) -> Generator[ImageDecoder]:
    """A decoder whose processes end with the block, or with this process.

    Processes are spawned because torch's threads do not survive a fork. A script with workers therefore needs
    `if __name__ == "__main__":`.
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
    """The number of available cores, at most 8; 0 for fewer than 10,000 images, which workers do not speed up."""
    if count is not None and count < 10_000:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
