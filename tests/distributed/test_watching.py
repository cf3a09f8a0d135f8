"""Watching on several ranks: rank 0 shows the common run, and the weights do not change."""

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


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of both kinds of parallelism, by one start of two ranks."""
    folder = tmp_path_factory.mktemp("out")
    line = make_line(folder / "line")
    checked_torchrun(2, "-m", "tests.distributed.watching", line, folder, logs=folder / "logs")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_rank_0_shows_the_common_run(out: Path, parallel: str) -> None:
    watched, unseen = out / parallel / "watched", out / parallel / "unseen"
    for file in ("model.safetensors", "ema.safetensors"):
        assert contents(watched / "export")[file] == contents(unseen / "export")[file]
    log = {entry["step"]: entry for entry in map(json.loads, (watched / "log.jsonl").read_text().splitlines())}
    assert list(log) == [2, 3, 4]
    assert [step for step, entry in log.items() if "ridge_probe_top1" in entry] == [3]
    assert all(1 <= entry["rank_projected"] <= 8 + 1e-6 for entry in log.values())  # images of the batch
    assert len(list((watched / "tensorboard").iterdir())) == 1
    assert sorted(path.name for path in (watched / "samples").iterdir()) == ["step_00000002.png", "step_00000004.png"]
    images = sample_images(load_model(watched), load_tokenizer(out / "line" / "tokenizer"), spread_labels(range(3), 16))
    found = np.asarray(Image.open(watched / "samples" / "step_00000004.png"))
    np.testing.assert_array_equal(found, strip(images, 8))
