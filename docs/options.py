"""Writes the end of options.md from the code: every option of every command, as `st-ar COMMAND --help` has it. `make docs` runs it."""

import re
import warnings
from argparse import Action
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tyro

from st_ar.cli import COMMANDS, load_command
from st_ar.cli.train import Train, TrainKMeans, TrainVQ
from st_ar.config import VQ_PRESETS, RunConfig
from st_ar.presets import PRESETS
from st_ar.reproduce.paper import options
from st_ar.settings import differences, to_dict

PAGE = Path(__file__).with_name("options.md")
MARK = "<!-- From here on written by docs/options.py -->\n"


def page() -> str:
    """The page with its end as the code has it now."""
    return PAGE.read_text(encoding="utf-8").partition(MARK)[0] + MARK + "\n" + "\n".join(_commands())


def _commands() -> Iterator[str]:
    yield "## Commands\n\n| command | what it does |\n|---|---|"
    yield from (f"| [`{name}`](#st-ar-{name}) | {command.help} |" for name, command in COMMANDS.items())
    for name in COMMANDS:
        yield f"\n## st-ar {name}\n"
        if name == "train":
            yield "`st-ar train PRESET` trains a model on a token store. Defaults are those of `llamagen-b`.\n"
            yield from _options(Train, config=PRESETS["llamagen-b"]())
            yield from _presets(name, PRESETS)
        elif name == "train-tokenizer":
            yield "`st-ar train-tokenizer kmeans` fits a k-means codebook of pixel patches.\n"
            yield from _options(TrainKMeans)
            yield "\nAny other preset trains a VQ-GAN. Defaults are those of `vq-16`.\n"
            yield from _options(TrainVQ, config=VQ_PRESETS["vq-16"]())
            yield from _presets(name, VQ_PRESETS)
        else:
            command = load_command(name)
            yield f"{command.__doc__}".replace("\n    ", "\n").strip() + "\n"
            yield from _options(command)


def _options(command: type, **config: RunConfig) -> Iterator[str]:
    """A table of the options of a command's class."""
    default = command(preset="", **dict.fromkeys(_required(command), tyro.MISSING), **config) if config else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro's own parser has no list of its options
        parser: Any = tyro.extras.get_parser(command, default=default) if config else tyro.extras.get_parser(command)
    yield "| option | default | |\n|---|---|---|"
    for action in parser._actions:
        if action.dest != "help":
            yield f"| {' '.join(_row(action))} |"


def _required(command: type) -> list[str]:
    return [name for name in ("tokens", "images", "out") if name in command.__annotations__]


def _row(action: Action) -> tuple[str, ...]:
    text, _, default = str(action.help).rpartition(" (")
    default = default.removesuffix(")").removeprefix("default: ")
    value = re.sub(r"\{None\}\||[{}]", "", str(action.metavar)) if action.nargs != 0 else ""
    value = re.sub(r"\[(\S+) \[.*?\.\.\.\]\]", r"\1 ..", value).replace("|", " or ").replace(",", ", ")
    names = ", ".join(f"`{name}`" for name in action.option_strings or [action.dest.upper()])
    words = {"None": "", "required": "required"} | ({"True": "on", "False": "off"} if action.nargs == 0 else {})
    text = re.sub(r"(?<![\w`-])--[a-z][\w.-]*\w", r"`\g<0>`", text).replace("|", r"\|")
    return f"{names} {value}".strip(), "|", words.get(default, f"`{default}`" if default else ""), "|", text


def _presets(command: str, presets: Mapping[str, Callable[[], RunConfig]]) -> Iterator[str]:
    """A table of presets, each as options added to the most similar one above it."""
    yield f"\n### Presets of {command}\n\n| preset | what it is | as options |\n|---|---|---|"
    before: dict[str, RunConfig] = {}
    for name, build in presets.items():
        config = build()
        base = min(before, key=lambda one: len(differences(to_dict(before[one]), to_dict(config))), default=None)
        changed = f"`{base}` with `{' '.join(options(before[base], config))}`" if base else ""
        yield f"| `{name}` | {(build.__doc__ or '').splitlines()[0]} | {changed} |"
        before[name] = config


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
