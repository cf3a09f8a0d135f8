"""Rank variables that a cluster has left over: within seconds a rank says whom it waits for, and it ends in one line."""

import os
import re
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from st_ar import distributed
from st_ar.errors import UserError
distributed.JOIN_NOTE, distributed.JOIN_TIMEOUT = 0.2, 1.0
try:
    with distributed.process_group("cpu", 3600):
        print("joined")
except UserError as error:
    print(error)
"""


def join(rank: int, **variables: str) -> tuple[str, str]:
    """What a rank of two says on standard output and standard error."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    environment |= {"RANK": str(rank), "WORLD_SIZE": "2", "TORCH_CPP_LOG_LEVEL": "ERROR", **variables}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout, done.stderr


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_alone_says_whom_it_waits_for(rank: int) -> None:
    port = str(free_port())
    out, err = join(rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    what = f"rank {rank} of 2, as RANK and WORLD_SIZE say,"
    assert (
        f"st-ar: note: {what} waits for the others at 127.0.0.1:{port}; unset RANK and WORLD_SIZE to run alone\n" in err
    )
    remedy = "start them by torchrun, or unset RANK and WORLD_SIZE\n"
    assert re.fullmatch(rf"{what} cannot connect to the others at 127.0.0.1:{port} \(.*[Tt]imed out.*\): {remedy}", out)


@pytest.mark.parametrize("case", ["no address", "no such host", "port in use", "port that is no number"])
def test_ranks_that_cannot_meet_end_in_one_line(case: str) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        rank, variables = {
            "no address": (0, {}),
            "no such host": (1, {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500"}),
            "port in use": (0, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}),
            "port that is no number": (0, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"}),
        }[case]
        out, _ = join(rank, **variables)
    assert len(out.splitlines()) == 1
    assert out.startswith(f"rank {rank} of 2, as RANK and WORLD_SIZE say, cannot connect to the others at ")
    assert out.endswith("start them by torchrun, or unset RANK and WORLD_SIZE\n")
