"""What a saved image says of itself, and what is refused of files that say something else."""

import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from st_ar.config import SampleSettings
from st_ar.demo.draw import KEY, Recipe, WeightsRecord, read_recipe, to_png
from st_ar.errors import UserError
from st_ar.settings import to_dict

RECIPE = Recipe(
    weights=WeightsRecord(file="model.safetensors", sha256="ab" * 32, ema=False, step=7),
    tokenizer="cd" * 32,
    settings=SampleSettings(cfg_scale=1.75, cfg_schedule="linear", top_k=3, top_p=0.9, temperature=0.8, seed=2**53 - 1),
    labels=(2, 0, 2),
    number=1,
    class_name="Straße <b>",
    dtype="bfloat16",
    device="cpu",
    threads=2,
    torch="2.13.0",
)
PICTURE = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)


def png(said: str | None) -> bytes:
    info = PngInfo()
    if said is not None:
        info.add_text(KEY, said)
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def changed(**values: Any) -> str:
    return json.dumps({**to_dict(RECIPE), **values})


def test_a_file_gives_its_picture_and_its_recipe_back() -> None:
    data = to_png(PICTURE, RECIPE)
    assert read_recipe(data) == RECIPE
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), PICTURE)
    assert json.loads(Image.open(io.BytesIO(data)).info["st-ar"])["settings"]["cfg_scale"] == 1.75


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "no PNG file"),
        (b"GIF89a", "no PNG file"),
        (to_png(PICTURE, RECIPE)[:60], "does not say|no PNG file"),
        (png(None), "does not say how it was drawn"),
        (png("{"), "what this PNG says of itself is damaged"),
        (png("[" * 100_000), "what this PNG says of itself is damaged"),
        (png("[]"), "the settings of Recipe are no JSON object"),
        (png("{}"), r"settings \[.*'labels'.*\] are missing"),
        (png(changed(more=1)), r"unknown settings \['more'\]"),
        (png(changed(format_version=2)), "format_version 2 is not 1"),
        (png(changed(labels=[])), "there are 0 labels, not 1 to 16"),
        (png(changed(labels=[0] * 17)), "there are 17 labels, not 1 to 16"),
        (png(changed(labels=["a", "b"])), "labels must be"),
        (png(changed(labels=[-1, 0])), "label -1 is below 0"),
        (png(changed(number=3)), "number 3 is none of the 3 images"),
        (png(changed(number=True)), "number must be a whole number"),
        (png(changed(settings={"temperature": 0})), "the temperature must be above 0"),
        (png(changed(settings={"seed": 2**70})), "seed must be a whole number"),
        (png(changed(weights={"file": "a", "sha256": "b", "ema": 1, "step": 0})), "weights.ema must be true or false"),
    ],
)
def test_other_files_are_refused_in_words(data: bytes, match: str) -> None:
    with pytest.raises(UserError, match=match):
        read_recipe(data)


def test_a_text_chunk_that_unpacks_to_gigabytes_is_refused() -> None:
    import struct
    import zlib

    bomb = zlib.compress(b"a" * (64 << 20), 9)
    body = b"st-ar\0\0" + bomb
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    data = png(None)
    with pytest.raises(UserError, match=r"no PNG file, or a damaged one|does not say"):
        read_recipe(data[:33] + chunk + data[33:])


@given(place=st.integers(0, 2000), value=st.integers(0, 255))
def test_a_damaged_byte_never_gives_another_recipe(place: int, value: int) -> None:
    data = bytearray(to_png(PICTURE, RECIPE))
    data[place % len(data)] = value
    with contextlib.suppress(UserError):
        assert read_recipe(bytes(data)) == RECIPE
