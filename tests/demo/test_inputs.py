"""What a browser may send in place of numbers."""

from typing import Any

import pytest

from st_ar.config import SampleSettings
from st_ar.demo.inputs import MOST_SEED, settings_from, whole
from st_ar.errors import UserError

GOOD: dict[str, Any] = {
    "scale": 2,
    "schedule": "linear",
    "power": 1.5,
    "temperature": 0.9,
    "top_k": 3.0,
    "top_p": 1,
    "seed": MOST_SEED,
    "vocab_size": 11,
}


def test_good_fields_are_settings() -> None:
    expected = SampleSettings(
        cfg_scale=2.0, cfg_schedule="linear", cfg_power=1.5, temperature=0.9, top_k=3, top_p=1.0, seed=MOST_SEED
    )
    assert settings_from(**GOOD) == expected


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("scale", None, "the guidance scale must be a number, not None"),
        ("scale", "2", "the guidance scale must be a number"),
        ("scale", float("nan"), "the guidance scale must be a number"),
        ("scale", 0.5, "the guidance scale must be at least 1"),
        ("schedule", "cosine", "cfg-schedule must be one of constant, linear, power-cosine"),
        ("schedule", ["linear"], "cfg-schedule must be one of"),
        ("power", 0, "--cfg-power must be above 0"),
        ("temperature", 0, "the temperature must be above 0"),
        ("top_k", 12, "top-k must lie between 0 and 11, not 12"),
        ("top_k", 1.5, "top-k must be a whole number from 0 to 11"),
        ("top_p", 0, r"--top-p must lie in \(0, 1\]"),
        ("seed", -1, "the seed must lie between 0 and"),
        ("seed", 2**53, "the seed must lie between 0 and"),
        ("seed", True, "the seed must be a whole number"),
        ("seed", float("inf"), "the seed must be a whole number"),
        ("seed", {}, "the seed must be a whole number"),
    ],
)
def test_bad_fields_are_refused_by_name(name: str, value: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        settings_from(**GOOD | {name: value})


def test_whole_numbers_may_come_as_floats() -> None:
    assert whole(4.0, "x", 0, 4) == 4
    assert isinstance(whole(4.0, "x", 0, 4), int)
