"""Jobs other than training, killed at random instants and begun again by the same command: the same files."""

from pathlib import Path

import pytest

from tests.disk import contents
from tests.evaluation.generation.test_evaluate import pictures, save_folder
from tests.killing import survivors
from tests.small_line import make_line


@pytest.mark.parametrize("job", ["tokenizing", "sampling", "evaluating"])
def test_a_job_killed_four_times_ends_with_the_same_bytes(tmp_path: Path, job: str) -> None:
    make_line(tmp_path)
    for name, seed in (("images", 1), ("samples", 2)):
        save_folder(tmp_path / name, pictures(60, seed))
    straight, *killed = survivors(job, tmp_path, kills=4)
    expected = contents(straight)
    assert len(expected) >= 2
    for folder in killed:
        assert contents(folder) == expected
