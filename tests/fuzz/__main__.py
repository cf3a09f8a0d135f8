"""`python -m tests.fuzz [FIRST LAST [TARGET ..]]`: look for failures, far beyond what the tests try."""

import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

from tests.fuzz.targets import TARGETS, keep_in
from tests.fuzz.trial import attempt


def hunt(first: int, last: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ST_AR_CACHE"] = f"{scratch}/cache"
        keep_in(Path(scratch))
        (Path(scratch) / "trials").mkdir()
        for name in names or TARGETS:
            outcomes: Counter[str] = Counter()
            for seed in range(first, last):
                try:
                    outcomes[attempt(name, seed, Path(scratch) / "trials")] += 1
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    outcomes["FAILED"] += 1
                    print(f"{name}-{seed}: " + "".join(traceback.format_exception(error)[-4:]), flush=True)
            print(name, dict(outcomes), flush=True)


hunt(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
