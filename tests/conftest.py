import fcntl
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # sizes are tiny: more threads only wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start too

settings.register_profile("st-ar", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("st-ar")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in, or taken from, the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ST_AR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """once(name, make): the file or folder that `make` writes, called by whichever worker needs it first. All see its error."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def once(name: str, make: Callable[[Path], object]) -> Path:
        path, error = shared / name, shared / f"{name}.error"
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not error.exists():
                try:
                    make(path)
                    error.touch()
                except Exception:
                    error.write_text(traceback.format_exc())
        if text := error.read_text():
            pytest.fail(text, pytrace=False)
        return path

    return once
