"""What trees of frozen dataclasses of settings share: checks that name the flag, JSON and back, and what differs.

Nothing here imports torch, so that `st-ar --help` is quick.
"""

import dataclasses
import json
import sys
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, TypeGuard, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from st_ar.errors import UserError

C = TypeVar("C")


def require(condition: bool, message: str) -> None:
    """A UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_types(config: Any, prefix: str) -> None:
    """Every field must hold what its type says; numbers are finite. `prefix` begins the flags: `--model.`, say."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not matches_type(value, hint):
            raise UserError(f"{prefix}{name.replace('_', '-')} must be {_in_words(hint)}, not {value!r}")


def require_most(config: Any, prefix: str, **most: int) -> None:
    """Sizes that no machine has are mistakes, or damaged files that would ask for all of its memory."""
    for name, limit in most.items():
        value = getattr(config, name)
        require(value <= limit, f"{prefix}{name.replace('_', '-')} must be at most {limit}, not {value}")


LARGEST = 1 << 64
"""Whole numbers are smaller."""
WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "nothing"}


def matches_type(value: Any, hint: type[C]) -> TypeGuard[C]:
    """Whether a value is of a type of config fields. A whole number will do for a float; true and false are no numbers."""
    kind: Any = get_origin(hint)
    parts = get_args(hint)
    if hint is Any:  # pyright: ignore[reportUnnecessaryComparison] -- a type to typing alone
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
    if kind is Literal:
        return f"one of {', '.join(parts)}"
    if kind in (Union, UnionType):
        return " or ".join(map(_in_words, parts))
    return WORDS.get(hint) or str(getattr(hint, "__name__", hint) if kind is None else hint)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[C], values: Any, where: str) -> C:
    """Build a config from what `to_dict` gave; `where` names the file in the error for unknown or missing fields."""
    assert dataclasses.is_dataclass(cls)
    if not isinstance(values, dict):
        raise UserError(f"{where}: the settings of {cls.__name__} are no JSON object: the file is damaged")
    types = get_type_hints(cls)
    if unknown := set(values) - {f.name for f in dataclasses.fields(cls)}:
        raise UserError(f"{where}: unknown settings {sorted(unknown)}; was it written by a newer version of st-ar?")
    needed = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := needed - set(values):
        raise UserError(f"{where}: settings {sorted(missing)} are missing; the file is damaged, or was changed by hand")
    built = {key: _from_json(types[key], value, where) for key, value in values.items()}
    try:
        return cls(**built)
    except UserError as error:
        raise UserError(f"{where}: {error}; the file is damaged, or was changed by hand") from error


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
