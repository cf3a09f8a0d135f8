"""Tokenizing and sampling on several ranks write the same files as one process."""

from pathlib import Path

import pytest

from st_ar.distributed import Ranks
from st_ar.errors import UserError
from tests.disk import contents
from tests.ranks import checked_torchrun, torchrun
from tests.sampling_processes import draw
from tests.small_line import make_line
from tests.tokenizer.test_tokenize import mixed_source, tiny_source, tokenize_mixed


def test_two_ranks_write_the_files_of_one_process(tmp_path: Path) -> None:
    model = make_line(tmp_path / "line").model
    tokenize_mixed(tmp_path / "alone" / "store")
    tokenize_mixed(tmp_path / "alone" / "stream", mixed_source(count=None, streaming=True))
    for out in ("samples.npz", "samples"):
        draw(model, tmp_path / "alone" / "drawn" / out)
    checked_torchrun(2, "-m", "tests.distributed.jobs", model, tmp_path / "both", logs=tmp_path / "logs")
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")


def test_a_job_with_a_killed_rank_continues_to_the_same_bytes(tmp_path: Path) -> None:
    done = torchrun(2, "-m", "tests.distributed.jobs", "kill", tmp_path, logs=tmp_path / "logs")
    assert done.returncode != 0
    assert not (tmp_path / "killed" / "meta.json").exists()
    for out in ("killed", "straight"):
        tokenize_mixed(tmp_path / out, tiny_source())
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    ("environment", "expected"), [({}, (0, 1)), ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)), ({"RANK": "0"}, (0, 1))]
)
def test_ranks_are_read_from_the_environment(
    environment: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ranks = Ranks.from_environment()
    assert (ranks.rank, ranks.world) == expected


@pytest.mark.parametrize(
    ("rank", "world", "match"), [("x", "2", "must be numbers"), ("2", "2", r"RANK 2 must lie in \[0, ")]
)
def test_invalid_ranks_are_refused(rank: str, world: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match=match):
        Ranks.from_environment()
