"""A step never waits for the GPU: training, decoding, a VQ-GAN's training and feature reading on fake CUDA.

Proven: no value is read by the host, no copy waits, no operator mixes devices or computes in float64, all state is on the device,
and the attention kernels are the fused ones. Not proven: NaN in fused kernels, graph capture, races of streams, NCCL and TF32.
"""

from typing import Any

import pytest

from tests.gpu.conftest import Script

Report = dict[str, Any]
LAYERS = {
    "plain tiny": 4,
    "guided tiny": 4,
    "plain B": 4,
    "guided B": 6,
    "guided B, one row": 6,
    "guided text": 2,
    "plain 3B": 2,
}
MICRO = "guided tiny, own position, 2 micro-batches"
RUNS = [*LAYERS, MICRO, "guided tiny, as a graph"]
LOG = {"objective.py <genexpr>": 5, "loop.py train": 1}
"""What a line of log.jsonl reads: the losses and the gradient norm."""
SAVE = {"checkpoint.py <genexpr>": 4}
"""Whether the loss and the norm are finite, asked before a line is logged and before a checkpoint is saved."""


@pytest.fixture(scope="module")
def steps(run_script: Script) -> Report:
    return run_script("steps")


def places(noted: dict[str, int]) -> dict[str, int]:
    """Notes by file and function, without operators and lines."""
    found: dict[str, int] = {}
    for name, count in noted.items():
        file, function = name.split(" at ")[1].split(" ")
        place = f"{file.split(':')[0]} {function}"
        found[place] = found.get(place, 0) + count
    return found


def faults(report: Report) -> Report:
    return {kind: report[kind] for kind in ("wait", "copy", "mixed", "float64") if report[kind]}


@pytest.mark.parametrize("run", RUNS)
def test_a_training_step_does_not_wait(steps: Report, run: str) -> None:
    assert faults(steps[run]["step 1"]) == {}
    assert places(steps[run]["step 1"]["moved"]).keys() == {"hardware.py to_device"}


@pytest.mark.parametrize("run", RUNS)
def test_only_logging_and_saving_read_values(steps: Report, run: str) -> None:
    report = steps[run]["step 2"]
    assert {place: count for place, count in places(report["wait"]).items() if count > (LOG | SAVE).get(place, 0)} == {}
    assert places(report["copy"]) == ({"watch.py measure": 1} if "guided" in run else {})
    assert (report["mixed"], report["float64"]) == ({}, {})


@pytest.mark.parametrize("run", RUNS)
def test_all_state_is_on_the_device(steps: Report, run: str) -> None:
    assert steps[run]["devices"] == ["cuda:0"]


@pytest.mark.parametrize("run", LAYERS)
def test_training_uses_fused_attention(steps: Report, run: str) -> None:
    layers = LAYERS[run]
    if run == "guided text":  # padding is masked in the teacher too
        expected = {"efficient": 2 * layers, "efficient backward": layers}
    elif "guided" in run:
        expected = {"flash": layers, "efficient": layers, "efficient backward": layers}
    else:
        expected = {"flash": layers, "flash backward": layers}
    assert steps[run]["step 1"]["attention"] == expected


def test_each_micro_batch_uses_fused_attention(steps: Report) -> None:
    assert steps[MICRO]["step 1"]["attention"] == {"flash": 8, "efficient": 8, "efficient backward": 8}


def test_decoding_waits_only_before_and_after_the_tokens(steps: Report) -> None:
    report = steps["decode"]
    assert places(report["wait"]) == {"transformer.py check": 2, "generate.py steps": 1}
    assert places(report["copy"]) == {"generate.py steps": 1}  # the draw's random numbers
    assert report["mixed"] == {}
    assert (report["graphs"], report["streams"]) == (2, 1)
    # 12 layers: the condition, and for each length the step that comes before the recording, and the recording
    assert report["attention"] == {"efficient": 12 * (1 + 2 * 2)}
    # A draw compares one number for each image with integers that float32 cannot hold.
    assert all("[[2, 1]]" in name for name in report["float64"])


def test_heads_of_width_100_use_fused_attention(steps: Report) -> None:
    assert steps["decode 3B"]["attention"] == {"efficient": 2 * (1 + 2 * 2)}


def test_one_row_of_masked_keys_needs_no_square_mask(steps: Report) -> None:
    square, row = (steps[run]["step 1"]["square"] for run in ("guided B", "guided B, one row"))
    assert (square, row) == (True, False)


def test_a_step_of_a_vqgan_does_not_wait(steps: Report) -> None:
    report = steps["vq-16"]
    assert faults(report) == {}
    assert report["moved"] == {}
    assert report["devices"] == ["cuda:0"]
    assert report["attention"] == {"efficient": 7, "efficient backward": 7}


@pytest.mark.parametrize("run", ["read", "read from the device"])
def test_reading_features_waits_only_for_the_features(steps: Report, run: str) -> None:
    report = steps[run]
    assert faults(report) == {"copy": report["copy"]}
    assert [name.split(" at ")[0] for name in report["copy"]] == ["cuda to cpu [4, 2, 768]"]
    assert list(report["copy"].values()) == [2]  # layers
    assert report["attention"] == {"flash": 4}


def test_a_value_read_in_a_step_is_found(steps: Report) -> None:
    report = steps["faults"]["step 1"]
    assert places(report["wait"]) == {"steps.py read_loss": 1, "steps.py read_norm": 1}


def test_a_run_too_large_for_the_gpu_is_noted_before_it_begins(steps: Report) -> None:
    assert {run: steps[run]["notes"] for run in RUNS} == {run: [] for run in RUNS}
    [note] = steps["faults"]["notes"]
    assert note.startswith("training may take 0.0355 GiB, more than 90% of a GPU's 0.0312 GiB: give --accumulate 4 (")


def test_every_kind_of_wait_is_found(steps: Report) -> None:
    expected = {name: [name.split(":")[0]] for name in steps["noted"] if not name.startswith("none")}
    expected |= {name: [] for name in steps["noted"] if name.startswith("none")}
    assert len(expected) == 16
    assert steps["noted"] == expected
