"""A store and a run that many tests look at."""

import shutil
from pathlib import Path

import pytest

from st_ar.training.loop import train
from tests.data.random_store import random_store
from tests.training.toy_runs import GUIDED_RUN


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_store(tmp_path_factory.mktemp("data") / "tokens", images=20, crops=4, shards=2)[0]


@pytest.fixture(scope="module")
def straight(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GUIDED_RUN, never stopped. Tests that change a run take a copy: `run`."""
    return train(GUIDED_RUN, tokens, tmp_path_factory.mktemp("straight") / "run", preset="toy")


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    return shutil.copytree(straight, tmp_path / "run")
