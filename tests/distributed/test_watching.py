"""Watching on several ranks: the first shows what all have trained, and the weights do not change."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from st_ar.figures import strip
from st_ar.model.weights import load_model
from st_ar.sampling import sample_images
from st_ar.tokenizer import load_tokenizer
from st_ar.training.watch import spread_labels
from tests.disk import contents
from tests.ranks import checked_torchrun
from tests.training.test_watch import make_line


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_first_rank_shows_the_run_of_all(tmp_path: Path, parallel: str) -> None:
    line = make_line(tmp_path / "line")
    checked_torchrun(2, "-m", "tests.distributed.watching", line, tmp_path, parallel, logs=tmp_path / "logs")
    watched, unseen = tmp_path / "watched", tmp_path / "unseen"
    for file in ("model.safetensors", "ema.safetensors"):
        assert contents(watched / "export")[file] == contents(unseen / "export")[file]
    log = {entry["step"]: entry for entry in map(json.loads, (watched / "log.jsonl").read_text().splitlines())}
    assert list(log) == [2, 3, 4]
    assert [step for step, entry in log.items() if "ridge_probe_top1" in entry] == [3]
    assert all(1 <= entry["rank_projected"] <= 8 + 1e-6 for entry in log.values())  # images of the batch
    assert len(list((watched / "tensorboard").iterdir())) == 1
    assert sorted(path.name for path in (watched / "samples").iterdir()) == ["step_00000002.png", "step_00000004.png"]
    images = sample_images(load_model(watched), load_tokenizer(line / "tokenizer"), spread_labels(3, 16))
    found = np.asarray(Image.open(watched / "samples" / "step_00000004.png"))
    np.testing.assert_array_equal(found, strip(images, 8))
