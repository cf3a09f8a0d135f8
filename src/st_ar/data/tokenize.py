"""The tokenizing job: images of a source -> crops -> codes -> a token store, shard by shard."""

from pathlib import Path

import numpy as np
import torch

from st_ar.data.crops import Crops
from st_ar.data.images import Example, ImageSource
from st_ar.data.store import META, StoreMeta, TokenStore, shard_names
from st_ar.errors import UserError
from st_ar.files import is_taken, read_json, save_array, sha256, write_json
from st_ar.progress import progress
from st_ar.tokenizer import Tokenizer, to_pixels

JOB = "job.json"


def tokenize(
    source: ImageSource,
    tokenizer: Tokenizer,
    crops: Crops,
    out: Path,
    *,
    batch_size: int = 256,
    images_per_shard: int = 65536,
) -> TokenStore:
    """Encode every crop of every image and write the store.

    A job that was stopped is continued by calling it again: finished shards are never rewritten, and meta.json, written
    last, marks the store complete.

    Args:
        batch_size: crops encoded at once.
        images_per_shard: a shard is held in memory until it is whole.

    Raises:
        UserError: `out` holds another store or job, or the crops' size does not suit the tokenizer.
    """
    grid = tokenizer.grid(crops.size)
    if tokenizer.vocab_size > 1 << 16:
        raise UserError(f"a codebook of {tokenizer.vocab_size} does not fit the store's 16-bit codes")
    shards = -(-source.count // images_per_shard)
    job: dict[str, object] = {
        "source": source.name,
        "images": source.count,
        "tokenizer": tokenizer.fingerprint,
        "crops": crops.names,
        "size": crops.size,
        "range": crops.range,
        "images_per_shard": images_per_shard,
    }
    _claim(out, job)
    written: list[dict[str, str | int]] = []
    with progress("tokenize", source.count, unit="images") as bar:
        for index in range(shards):
            codes_name, labels_name = shard_names(index, shards)
            start = index * images_per_shard
            count = min(images_per_shard, source.count - start)
            if not (out / labels_name).exists():  # the labels are written last
                codes = np.empty((count, len(crops.names), grid**2), np.uint16)
                labels = np.empty(count, np.int32)
                images_at_once = max(1, batch_size // len(crops.names))
                examples = source.examples(start)
                for first in range(0, count, images_at_once):
                    chunk = [next(examples) for _ in range(min(images_at_once, count - first))]
                    here = slice(first, first + len(chunk))
                    codes[here] = _encode(chunk, tokenizer, crops)
                    labels[here] = [example.label for example in chunk]
                    bar.advance(len(chunk))
                for name, array in ((codes_name, codes), (labels_name, labels)):
                    save_array(out / name, array)
            else:
                bar.advance(count)
            written.append(
                {
                    "images": count,
                    "codes": codes_name,
                    "labels": labels_name,
                    "codes_sha256": sha256(out / codes_name),
                    "labels_sha256": sha256(out / labels_name),
                }
            )
    StoreMeta(
        source=source.name,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        grid=grid,
        crops=crops.names,
        class_names=list(source.class_names),
        images=source.count,
        shards=written,
    ).write(out)
    (out / JOB).unlink()
    return TokenStore(out)


def _claim(out: Path, job: dict[str, object]) -> None:
    """Start or continue the job in `out`, or refuse."""
    if (out / META).exists():
        raise UserError(f"{out} is a finished token store already: choose another --out or remove it")
    if (out / JOB).exists():
        begun = read_json(out / JOB, "an unfinished token store")
        for key, value in job.items():
            if begun.get(key) != value:
                raise UserError(
                    f"{out} holds an unfinished store of other {key} ({begun.get(key)}, now {value}): "
                    "give the same settings to finish it, or choose another --out"
                )
    elif is_taken(out):
        raise UserError(f"{out} exists already and is not a token store: choose another --out")
    else:
        write_json(out / JOB, job)


def _encode(chunk: list[Example], tokenizer: Tokenizer, crops: Crops) -> np.ndarray:
    """Codes [images, crops, T]."""
    pixels = np.stack([crops.cut(example.image) for example in chunk])
    images = to_pixels(torch.from_numpy(pixels).flatten(0, 1))
    return tokenizer.encode(images).flatten(1).unflatten(0, pixels.shape[:2]).numpy().astype(np.uint16)
