"""What comes from the page, checked before anything is done with it: a browser can send what it likes."""

import math
from typing import Any

from st_ar.errors import UserError
from st_ar.sample_config import SampleSettings

MOST_SEED = 2**53 - 1
"""The largest whole number that a browser keeps exactly."""


def whole(value: Any, what: str, least: int, most: int) -> int:
    """A whole number between two others; UserError: it is none, or lies outside."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise UserError(f"{what} must be a whole number from {least} to {most}, not {value!r}")
    if not least <= value <= most:
        raise UserError(f"{what} must lie between {least} and {most}, not {int(value)}")
    return int(value)


def number(value: Any, what: str) -> float:
    """A number; UserError: it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{what} must be a number, not {value!r}")
    return float(value)


def settings_from(
    scale: Any, schedule: Any, power: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any, vocab_size: int
) -> SampleSettings:
    """How to draw, by the page's fields.

    Raises:
        UserError: one of them is missing, of another type or out of range.
    """
    return SampleSettings(
        cfg_scale=number(scale, "the guidance scale"),
        cfg_schedule=schedule,
        cfg_power=number(power, "the guidance's power"),
        temperature=number(temperature, "the temperature"),
        top_k=whole(top_k, "top-k", 0, vocab_size),
        top_p=number(top_p, "top-p"),
        seed=whole(seed, "the seed", 0, MOST_SEED),
    )
