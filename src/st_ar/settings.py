"""What trees of frozen dataclasses of settings share: checks that name the flag, JSON and back, and what differs.

Nothing here imports torch, so that `st-ar --help` is quick.
"""

import dataclasses
import json
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from st_ar.errors import UserError

C = TypeVar("C")


def require(condition: bool, message: str) -> None:
    """A UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_choices(config: Any, prefix: str) -> None:
    """Fields with a fixed set of words must hold one of them."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            flag = prefix + name.replace("_", "-")
            raise UserError(f"{flag} must be one of {', '.join(get_args(hint))}, not {value!r}")


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
    built = {
        key: from_dict(types[key], value, where)
        if dataclasses.is_dataclass(types[key])
        else tuple(value)
        if isinstance(value, list)
        else value
        for key, value in values.items()
    }
    try:
        return cls(**built)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error


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
