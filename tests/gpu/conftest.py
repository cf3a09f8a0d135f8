"""Scripts that run on fake CUDA: started once per test session, by whichever worker needs them first."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Once
from tests.programs import find_program

ROOT = Path(__file__).parents[2]
HEADERS = Path(torch.__file__).parent / "include"
Script = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run_script(once: Once) -> Script:
    """Runs tests/gpu/NAME.py on fake CUDA, with arguments if any, and returns what it prints."""
    if sys.platform != "linux" or torch.version.cuda or torch.version.hip:
        pytest.skip("the fake device is for torch's CPU build on Linux")
    compiler = find_program("g++")

    def build(file: Path) -> None:
        include = [f"-I{HEADERS}", f"-I{HEADERS}/torch/csrc/api/include"]
        source = Path(__file__).with_name("no_device.cpp")
        command = [compiler, "-O0", "-std=c++20", "-shared", "-fPIC", *include, source, "-o", file]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def run(name: str, *arguments: str) -> dict[str, Any]:
        library = once("no_device.so", build)

        def script(file: Path) -> None:
            environment = os.environ | {"ST_AR_NO_DEVICE": str(library), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-W", "ignore", "-m", f"tests.gpu.{name}", *arguments]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
            file.write_text(done.stdout)

        return json.loads(once("-".join(["gpu", name, *arguments]), script).read_text())

    return run
