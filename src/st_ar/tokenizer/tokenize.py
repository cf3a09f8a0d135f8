"""Tokenize a source of images into a token store, shard by shard."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from st_ar.data.decoding import ImageDecoder, open_decoder
from st_ar.data.skipped import Skipped
from st_ar.data.source import MAX_CLASSES, BrokenImageError, Crops, Example, ImageSource
from st_ar.data.store import TokenStore
from st_ar.data.store_writer import TokenStoreWriter
from st_ar.distributed import JOB_TIMEOUT, barrier, process_group
from st_ar.errors import UserError
from st_ar.progress import Progress, progress
from st_ar.tokenizer import Tokenizer, to_pixels


def tokenize(
    source: ImageSource,
    tokenizer: Tokenizer,
    crops: Crops,
    out: Path,
    *,
    batch_size: int = 256,
    images_per_shard: int = 16384,
    workers: int = 0,
    max_skipped: float = 0.01,
) -> TokenStore:
    """Encode every crop of every image and write the store.

    Another call continues a stopped job. Finished shards are kept, except those that skipped an image which is readable now. Broken
    images, and those whose label is not a class, are left out and listed. Under torchrun, rank r writes the shards r, r + world, ..;
    the bytes depend neither on the number of ranks nor on `workers`.

    Args:
        batch_size: crops encoded at once.
        images_per_shard: images of a shard, which is kept in memory until it is complete.
        workers: decoding processes besides this one.
        max_skipped: largest share of unusable images.

    Raises:
        UserError: `out` holds another store or job, the crops do not fit the tokenizer's patches, too many images are unusable,
            the source ends early, or the disk is too small.
    """
    grid = tokenizer.grid(crops.size)
    if tokenizer.vocab_size > 1 << 16:
        raise UserError(
            f"a codebook of {tokenizer.vocab_size} does not fit the store's 16-bit codes: use at most 65536"
        )
    if batch_size < 1 or images_per_shard < 1:
        raise UserError(f"--batch-size {batch_size} and images per shard {images_per_shard} must be 1 or more")
    if workers < 0:
        raise UserError(f"--workers must be 0 or more, not {workers}")
    settings: dict[str, object] = {
        "source": source.name,
        "images": source.count,
        "content": source.content,
        "tokenizer": tokenizer.fingerprint,
        "crops": crops.names,
        "size": crops.size,
        "range": crops.range,
        "dtype": str(getattr(tokenizer, "dtype", torch.float32)),
        **({"compiled": True} if getattr(tokenizer, "compiled", False) else {}),
        "images_per_shard": images_per_shard,
    }
    shards = None if source.count is None else -(-source.count // images_per_shard)
    expected = source.count if source.count is not None else source.expected
    with process_group("cpu", JOB_TIMEOUT) as (ranks, _):
        job = TokenStoreWriter(
            out,
            command="tokenize",
            settings=settings,
            shards=shards,
            needed_bytes=(expected or 0) * (len(crops.names) * grid**2 * 2 + 4),
            max_skipped=max_skipped,
        )
        if job.is_complete:
            return TokenStore(out)
        total, done, indices = expected, 0, count(ranks.rank, ranks.world)
        if source.count is not None and shards is not None:
            indices = range(ranks.rank, shards, ranks.world)
            for index in indices:
                job.reopen_mended(index, partial(_usable, source))
            barrier()  # no rank reads a list of skipped images that another one removes
            sizes = {index: min(images_per_shard, source.count - index * images_per_shard) for index in indices}
            total, done = sum(sizes.values()), sum(size for index, size in sizes.items() if job.is_finished(index))
        with (
            open_decoder(crops.side, workers) as decoder,
            progress("tokenize", total, unit="images", done=done, shown=ranks.rank == 0) as bar,
        ):
            encoder = _ShardEncoder(source, tokenizer, crops, job, decoder, bar, batch_size, images_per_shard)
            for index in indices:
                if not job.is_finished(index) and not encoder.write(index):
                    break  # a source of unknown length has ended
        if shards is None:
            shards = -(-encoder.position // images_per_shard)
        return job.finish(
            shards=shards,
            source=source.name,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            grid=grid,
            crops=crops.names,
            names=list(source.class_names),
            notes=source.notes,
        )


@dataclass
class _ShardEncoder:
    """Reads, encodes and writes shards."""

    source: ImageSource
    tokenizer: Tokenizer
    crops: Crops
    job: TokenStoreWriter
    decoder: ImageDecoder
    bar: Progress
    batch_size: int
    images_per_shard: int
    examples: Iterator[Example] | None = None
    position: int = 0
    """Examples read or skipped; after the end of a stream, their number."""

    def write(self, index: int) -> bool:
        """Encode and write a shard. Return False, and write nothing, if the source ends before it."""
        start = index * self.images_per_shard
        length = self.images_per_shard
        if self.source.count is not None:
            length = min(length, self.source.count - start)
        tokens = self.tokenizer.grid(self.crops.size) ** 2
        codes = np.empty((length, len(self.crops.names), tokens), np.uint16)
        labels: list[int] = []
        skipped: list[Skipped] = []
        done = 0
        chunks = self._chunks(start, length, max(1, self.batch_size // len(self.crops.names)))
        for chunk, decoded in self.decoder.decode(chunks):
            for offset, reason in decoded.broken:
                skipped.append(Skipped(start + done + offset, chunk[offset].name, reason))
            usable: list[int] = []
            for row, offset in enumerate(decoded.used):
                if fault := label_fault(self.source, chunk[offset]):
                    skipped.append(Skipped(start + done + offset, chunk[offset].name, fault))
                else:
                    usable.append(row)
            if skipped and (images := self.source.count or self.source.expected):
                self.job.check_skipped(skipped, images)
            if usable:
                pixels = decoded.pixels if len(usable) == len(decoded.used) else decoded.pixels[usable]
                codes[len(labels) : len(labels) + len(usable)] = self._encode(pixels)
                labels += [chunk[decoded.used[row]].label for row in usable]
            done += len(chunk)
            self.bar.count(len(chunk))
        if self.source.count is not None and done < length:
            raise UserError(
                f"{self.source.name} ended after {start + done} of {self.source.count} images: it has changed or is damaged; "
                "finished shards are kept"
            )
        if not done:
            return False
        self.job.check_skipped(skipped, self.source.count or max(start + done, self.source.expected or 0))
        self.job.write(index, codes[: len(labels)], np.array(labels, np.int32), skipped)
        return True

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        """Images uint8 [n, side, side, 3] -> codes [n, crops, T]."""
        cut = torch.from_numpy(self.crops.cut_pixels(pixels))
        codes = self.tokenizer.encode(to_pixels(cut.flatten(0, 1)))
        return codes.flatten(1).unflatten(0, cut.shape[:2]).cpu().numpy().astype(np.uint16)

    def _chunks(self, start: int, length: int, size: int) -> Iterator[list[Example]]:
        """Up to `length` examples from index `start` on, `size` at a time. A stream is read once, from its beginning."""
        if not self.source.streaming:
            self.examples, self.position = self.source.examples(start), start
        elif self.examples is None:
            self.examples = self.source.examples(0)
        assert self.position <= start
        self.position += sum(1 for _ in islice(self.examples, start - self.position))
        if self.position < start:
            return
        span = islice(self.examples, length)
        while chunk := list(islice(span, size)):
            self.position += len(chunk)
            yield chunk


def _usable(source: ImageSource, index: int) -> bool:
    """Whether a skipped image of a source can be decoded now, and has a label."""
    example = None if source.streaming else next(source.examples(index), None)
    if example is None or label_fault(source, example):
        return False
    try:
        example.read()
    except BrokenImageError:
        return False
    return True


def label_fault(source: ImageSource, example: Example) -> str:
    """Why the label of an example cannot be used; empty if it can."""
    classes = len(source.class_names)
    if 0 <= example.label < (classes or MAX_CLASSES):
        return ""
    label = "no label" if example.label == -1 else f"label {example.label}"
    return f"{label}, outside the {classes or 'numbered'} classes (a split without labels? #label=none takes all as one class)"
