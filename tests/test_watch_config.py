"""What may be asked for when a run is watched."""

from pathlib import Path
from typing import Any

import pytest

from st_ar.config import WatchConfig
from st_ar.errors import UserError

T = Path("tokenizer")


def test_without_a_word_there_are_tensorboards_curves_alone() -> None:
    config = WatchConfig()
    assert config.track == ("tensorboard",)
    assert not any(config.looks_at(step) for step in range(1, 100))


def test_samples_and_probes_are_due_at_their_own_steps() -> None:
    config = WatchConfig(sample_every=6, sample_tokenizer=T, probe_every=4, probe_test_tokens=T)
    assert [step for step in range(1, 13) if config.looks_at(step)] == [4, 6, 8, 12]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"track": ("mlflow",)}, "--track must be some of tensorboard, wandb, trackio, none, not 'mlflow'"),
        ({"track": ("wandb", "wandb")}, "--track wandb wandb names one more than once"),
        ({"track": ("none", "wandb")}, "--track none stands alone"),
        ({"sample_every": -1}, "--sample-every must be 0"),
        ({"sample_every": 5}, "--sample-every 5 needs --sample-tokenizer"),
        ({"probe_every": 5}, "--probe-every 5 needs --probe-test-tokens"),
        ({"sample_tokenizer": T}, "--sample-tokenizer does nothing without --sample-every"),
        ({"sample_labels": (0,)}, "--sample-labels does nothing without --sample-every"),
        ({"sample_cfg_scale": 2.0}, "--sample-cfg-scale does nothing without --sample-every"),
        (
            {"sample_every": 5, "sample_tokenizer": T, "sample_cfg_scale": 0.5},
            "--sample-cfg-scale must be at least 1",
        ),
        ({"probe_test_tokens": T}, "--probe-test-tokens does nothing without --probe-every"),
    ],
)
def test_what_would_do_nothing_or_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WatchConfig(**values)
