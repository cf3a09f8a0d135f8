"""Damaged input of every kind ends in one line that says what to do, or in work that is right; never in anything else.

`python -m tests.fuzz FIRST LAST` goes beyond the seeds tried here.
"""

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, keep_in
from tests.fuzz.trial import attempt

FEW, MANY = 6, 66
"""Seeds of each target in the normal run, and in the slow one."""


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keep_in(tmp_path_factory.mktemp("made"))
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.parametrize("seed", range(FEW))
@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_refused_or_does_no_harm(name: str, seed: int, scratch: Path) -> None:
    attempt(name, seed, scratch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FEW, MANY))
@pytest.mark.parametrize("name", TARGETS)
def test_much_damage_is_refused_or_does_no_harm(name: str, seed: int, scratch: Path) -> None:
    attempt(name, seed, scratch)
