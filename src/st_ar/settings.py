"""Frozen dataclasses of settings: checks that name the flag, JSON and back, and differences. Imports no torch: help is fast."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from numbers import Integral, Real
from types import UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeGuard,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from st_ar.errors import UserError

C = TypeVar("C")


def require(condition: bool, message: str) -> None:
    """Raise a UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class Range:
    """The range of a field: `Annotated[int, Range(1)]`. `low` and `high` are inclusive, `above` and `below` exclusive."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    means: str = ""
    """The meaning of `low`, such as "off"."""
    hint: str = ""
    """The remedy."""

    def __contains__(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        start = f"({self.above}" if self.above is not None else f"[{self.low}"
        if self.high is not None or self.below is not None:
            return f"lie in {start}, {f'{self.below})' if self.below is not None else f'{self.high}]'}"
        if self.above is not None:
            return f"be above {self.above}"
        means = f" ({self.means})" if self.means else ""
        return f"be 0{means} or more" if self.low == 0 else f"be at least {self.low}{means}"


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
Portion = Annotated[float, Range(0, below=1)]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]
Seed = Annotated[int, Range(0, 2**64 - 1)]


class Checked:
    """Base of frozen dataclasses whose fields must match their types and `Range`s.

    `class ModelConfig(Checked, prefix="--model.")` sets the prefix of its flags in error messages.
    """

    prefix: ClassVar[str] = "--"

    def __init_subclass__(cls, prefix: str | None = None) -> None:
        if prefix is not None:
            cls.prefix = prefix

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(cast(Any, self)):
            value, flag = getattr(self, field.name), f"{self.prefix}{flag_name(field.name)}"
            if not matches_type(value, hints[field.name]):
                limit = " below 2^64" if isinstance(value, int) and abs(value) >= LARGEST else ""
                raise UserError(f"{flag} must be {_in_words(hints[field.name])}{limit}, not {value!r}")
            if broken := _broken_range(value, hints[field.name]):
                raise UserError(f"{flag} must {broken}, not {value}{broken.hint and '; '}{broken.hint}")


def flag_name(field: str) -> str:
    """The option that tyro makes of a field, without its leading dashes."""
    return field.replace("_", "-")


def _broken_range(value: Any, hint: Any) -> Range | None:
    """The range that a value violates, if any."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return next((part for part in parts[1:] if isinstance(part, Range) and value not in part), None)
    if kind in (Union, UnionType):
        fitting = next(part for part in parts if matches_type(value, part))
        return _broken_range(value, fitting)
    if kind is tuple:
        inner = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return next(filter(None, map(_broken_range, value, inner)), None)
    return None


LARGEST = 1 << 64
"""Integers are smaller."""
WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "nothing"}


def matches_type(value: Any, hint: type[C]) -> TypeGuard[C]:
    """Whether a value matches the type of a config field. An integer is also a float; true and false are not numbers."""
    kind: Any = get_origin(hint)
    parts = get_args(hint)
    if kind is Annotated:
        return matches_type(value, parts[0])
    if hint is Any:  # pyright: ignore[reportUnnecessaryComparison] -- typing's `Any` is not a class
        return True
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind in (Union, UnionType):
        return any(matches_type(value, part) for part in parts)
    if kind is dict:
        return isinstance(value, dict) and all(
            matches_type(k, parts[0]) and matches_type(v, parts[1]) for k, v in value.items()
        )
    if kind in (list, tuple):
        repeated = kind is list or parts[-1] is Ellipsis
        expected = parts[:1] * len(value) if repeated and isinstance(value, kind) else parts
        return isinstance(value, kind) and len(value) == len(expected) and all(map(matches_type, value, expected))
    if isinstance(value, bool):
        return hint is bool
    if hint is int:
        return isinstance(value, Integral) and abs(int(value)) < LARGEST
    if hint is float:
        return isinstance(value, Integral | Real) and abs(value) <= sys.float_info.max  # pyright: ignore[reportOperatorIssue]
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _in_words(parts[0])
    if kind is Literal:
        return f"one of {', '.join(parts)}"
    if kind in (Union, UnionType):
        return " or ".join(map(_in_words, parts))
    return WORDS.get(hint) or str(getattr(hint, "__name__", hint) if kind is None else hint)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[C], values: Any, where: str) -> C:
    """Build a config from the result of `to_dict`; `where` names the file in errors."""
    assert dataclasses.is_dataclass(cls)
    if not isinstance(values, dict):
        raise UserError(f"{where}: the settings of {cls.__name__} are not a JSON object: the file is damaged")
    types = get_type_hints(cls)
    if unknown := set(values) - {f.name for f in dataclasses.fields(cls)}:
        raise UserError(f"{where}: unknown settings {sorted(unknown)}; was it written by a newer version of st-ar?")
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := required - set(values):
        raise UserError(f"{where}: settings {sorted(missing)} are missing; the file is damaged or was edited")
    built = {key: _from_json(types[key], value, where) for key, value in values.items()}
    try:
        return cls(**built)
    except UserError as error:
        raise UserError(f"{where}: {error}; the file is damaged or was edited") from error


def _from_json(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(cast(type[Any], hint), value, where)
    return tuple(value) if get_origin(hint) is tuple and isinstance(value, list) else value


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ between two configs given as dicts: dotted name -> (old, new)."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found
