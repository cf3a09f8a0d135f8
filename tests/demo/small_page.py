"""A page's setup with models that belong together, each made by the real thing in moments."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from st_ar.config import ModelConfig
from st_ar.data.store import TokenStore
from st_ar.demo.models import ModelPool
from st_ar.demo.setup import Setup
from tests.small_line import SmallLine, make_line, random_tokenizer
from tests.toys import TINY, random_model, save_export

LONG = replace(TINY, dim=32, grid=40)
"""1,600 tokens: some seconds."""


def export(folder: Path, config: ModelConfig, seed: int, class_names: list[str] | None = None) -> Path:
    """An export folder of random weights, live and averaged."""
    info = {"step": seed, "preset": "toy", "tokenizer": random_tokenizer().fingerprint}
    info |= {"class_names": class_names or ["ant", "bee", "cow"]}
    save_export(folder, random_model(config, seed), random_model(config, seed + 1), info)
    return folder


@contextmanager
def small_setup(folder: Path, *, config: ModelConfig = TINY) -> Generator[tuple[Setup, SmallLine]]:
    """Two models called first and second, live and averaged, a store that both can read, and no run."""
    line = make_line(folder)
    models = [export(folder / "first", config, 10), export(folder / "second", config, 20)]
    pool = ModelPool(models, line.tokenizer, device="cpu", dtype="float32")
    store = TokenStore(line.tokens) if config.grid == TINY.grid else None
    try:
        yield Setup(pool=pool, store=store, probe_store=store), line
    finally:
        pool.close()
