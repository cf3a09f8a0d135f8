import os
from collections.abc import Iterator

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
