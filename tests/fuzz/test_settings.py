"""Strange settings make a config that works, or an error that names the flag."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_ar.cli import main
from st_ar.config import (
    AdversaryConfig,
    InvarianceSettings,
    ModelConfig,
    OptimConfig,
    SampleSettings,
    SelfGuidedConfig,
    TrainConfig,
    VQConfig,
    VQTrainConfig,
    vq_cifar10,
)
from st_ar.errors import UserError
from st_ar.evaluation.probe_classifiers import ProbeConfig
from st_ar.presets import get_preset
from st_ar.settings import from_dict, to_dict
from tests.fuzz.trial import bounded
from tests.small_line import SmallLine, make_line
from tests.toys import TINY

CONFIGS: list[Any] = [
    *(TINY, SelfGuidedConfig(), OptimConfig(), get_preset("st-ar-cifar10"), VQConfig(), AdversaryConfig()),
    *(vq_cifar10(), SampleSettings(), InvarianceSettings(), ProbeConfig()),
]
NUMBERS = [0, 1, 2, 3, 7, -1, 64, 1000, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.5, 1e-308, 1e308, 2.0]
INF = float("inf")
ODD = [float("nan"), INF, -INF, None, True, False, "", "x", "constant", "1", "\ud800", "y" * 9999, [], {}]
strange = st.sampled_from([*NUMBERS, *ODD, (), (1,), (1, 1), (0.5, 0.5), (-1,), (1,) * 500, ("a",), [1, 2], {"a": 1}])


@given(data=st.data(), config=st.sampled_from(CONFIGS))
def test_a_config_works_or_names_its_flag(data: st.DataObject, config: Any) -> None:
    names = st.sampled_from([field.name for field in dataclasses.fields(config)])
    changes = data.draw(st.dictionaries(names, strange, min_size=1, max_size=2))
    with bounded():
        for make in (dataclasses.replace, _from_json):
            try:
                found = make(config, **changes)
                use(found)
                assert from_dict(type(found), to_dict(found), "again") == found
            except UserError as error:
                message = str(error)
                names_a_flag = any(name.replace("_", mark) in message for name in changes for mark in "- ")
                assert names_a_flag or "--" in message or "settings" in message, message


def _from_json(config: Any, **changes: Any) -> Any:
    return from_dict(type(config), to_dict(config) | changes, "config.json")


def use(config: Any) -> None:
    """Evaluate what the classes compute from their fields."""
    if isinstance(config, ModelConfig):
        assert config.head_dim * config.n_heads == config.dim
        assert config.sequence_length + config.condition_length < 1 << 21
    if isinstance(config, TrainConfig | VQTrainConfig):
        assert config.total_steps(1000) >= 1
    if isinstance(config, TrainConfig):
        assert 1 <= config.selfguided.layer(config.model.n_layers) <= config.model.n_layers
    if isinstance(config, VQConfig):
        assert 1 <= config.patch <= 512
    if isinstance(config, AdversaryConfig):
        assert len(config.widths) == config.layers + 1
    if isinstance(config, SampleSettings):
        assert config.cfg_scale is not None or config.resolved(TINY).cfg_scale == 1.0


# The command line

VALUES = ("-1", "0", "nan", "inf", "1e308", "1e-308", "9" * 30, "x", "9" * 5000, "", "0.5", "1,2", "None")


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> SmallLine:
    return make_line(tmp_path_factory.mktemp("line"))


def commands(line: SmallLine) -> dict[str, tuple[list[str], list[str]]]:
    """Command -> its required options, and the options to vary."""
    model = ["--model", str(line.model), "--device", "cpu"]
    paired = [*model, "--tokenizer", str(line.tokenizer)]
    probed = [*model, "--tokens", str(line.tokens), "--test-tokens", str(line.tokens)]
    tokens = ["--tokens", str(line.tokens), "--device", "cpu", "--model.vocab-size", "11", "--model.grid", "3"]
    drawing = "num labels cfg-scale temperature top-k top-p seed batch-size cfg-interval dtype"
    training = "model.dim model.n-layers model.n-heads batch-size optim.lr optim.betas seed views"
    training += " model.drop-path class-dropout steps epochs model.rope-base"
    return {
        "sample": ([*paired, "--num", "2"], drawing.split()),
        "probe": (probed, ["layers", "steps", "train-crops", "epochs", "base-lr", "seed", "cache-limit", "penalty"]),
        "train llamagen-b": (tokens, training.split()),
        "train-tokenizer kmeans": (["--images", "digits"], ["vocab-size", "patch", "size", "seed"]),
        "invariance": (["--images", "digits", "--tokenizers", str(line.tokenizer)], ["num", "size", "shifts", "seed"]),
    }


@pytest.mark.parametrize("command", ["sample", "probe", "train llamagen-b", "train-tokenizer kmeans", "invariance"])
def test_a_strange_option_ends_in_one_line_or_in_work(
    command: str, line: SmallLine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed, options = commands(line)[command]
    monkeypatch.setattr("st_ar.training.loop.train", lambda *_, **__: None)  # tests/training covers what it refuses
    pairs = [(option, value) for index, option in enumerate(options) for value in VALUES[index % 2 :: 2]]
    for number, (option, value) in enumerate(pairs):
        out = ["--out", str(tmp_path / f"out-{number}")]
        assert _status([*command.split(), *fixed, *out, f"--{option}={value}"]) in (0, 2), (option, value)
        assert "Traceback" not in capsys.readouterr().err


def _status(arguments: list[str]) -> object:
    try:
        with bounded():
            main(arguments)
    except SystemExit as stop:
        return stop.code
    return 0
