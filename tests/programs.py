"""Programs that tests drive and pip does not install."""

import os
import shutil

import pytest


def find_program(*names: str) -> str:
    """Path of the first that is here. Without any the test is skipped; `.ci/run` installs them all, and there it fails."""
    for name in names:
        if (path := shutil.which(name)) is not None:
            return path
    said = f"there is no {names[0]} to drive: apt-get install {names[0]}"
    if os.environ.get("ST_AR_NEEDS_PROGRAMS"):
        pytest.fail(said)
    pytest.skip(said)
