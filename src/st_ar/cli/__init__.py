"""The command line: `st-ar COMMAND ...`.

COMMANDS names where each command is, as a string, so that `st-ar --help` imports none of them. Modules here import what a command
needs when it runs, so that its help is quick too.
"""

import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import tyro

from st_ar import __version__
from st_ar.errors import Interrupted, UserError


@dataclass(frozen=True)
class Command:
    """Where a command is and what `st-ar --help` says of it."""

    place: str
    """module:name in this package. A class is the command's options; a function reads the command line itself."""
    help: str
    several_ranks: bool = False
    """Whether torchrun's ranks share its work."""


COMMANDS = {
    "quickstart": Command(
        "projects:Quickstart", "run the whole pipeline on embedded photographs: three methods side by side, in minutes"
    ),
    "train-tokenizer": Command(
        "train:read_train_tokenizer", "images -> tokenizer: a VQ-GAN, or k-means in seconds", True
    ),
    "tokenize": Command("train:Tokenize", "images -> token store", True),
    "import-tokens": Command("train:ImportTokens", "LlamaGen's folders of .npy files -> token store"),
    "train": Command("train:read_train", "token store -> run, with a preset of LlamaGen or ST-AR", True),
    "sample": Command("generate:Sample", "model -> images", True),
    "reference": Command("evaluate:MakeReference", "images -> statistics to evaluate against, computed once", True),
    "evaluate": Command(
        "evaluate:Evaluate", "samples against a reference: FID, sFID, IS, precision, recall, and others", True
    ),
    "sweep": Command("generate:Sweep", "find the best guidance scale, temperature and top-k"),
    "reconstruct": Command("evaluate:Reconstruct", "measure a tokenizer: rFID, PSNR, SSIM, use of the codebook", True),
    "invariance": Command("understand:Invariance", "measure how many tokens stay when the view of an image changes"),
    "likelihood": Command("understand:Likelihood", "measure the validation loss of models"),
    "probe": Command("understand:Probe", "train linear probes on a model's features, after each number of tokens read"),
    "attention": Command("understand:Attention", "draw and measure where a model attends"),
    "demo": Command("projects:Demo", "serve a web demo on this machine: generate, compare, inspect, follow runs"),
    "reproduce": Command("projects:Reproduce", "make the paper's tables and figures, at full size or small"),
    "convert": Command("train:Convert", "convert models and VQ tokenizers to and from LlamaGen's .pt files"),
    "env": Command("projects:Env", "print versions, CPU, GPUs and threads for a bug report", True),
    "completion": Command("projects:Completion", "print the completion script for bash, zsh or fish", True),
}

HELP = """\
usage: st-ar COMMAND [options]     st-ar COMMAND --help explains each

Train LlamaGen-style image generators with and without self-guidance (ST-AR), and see what they understand.

    images --tokenize--> token store --train--> run --sample--> images --evaluate--> table
                                                 |---- probe, attention ----> figures

{commands}

exit status: 0 done, 2 an error that the message explains, 130 or 143 interrupted (training is saved)
"""


def load_command(name: str) -> Any:
    """The class or function behind a command."""
    module, _, attribute = COMMANDS[name].place.partition(":")
    return getattr(import_module(f"st_ar.cli.{module}"), attribute)


def require_one_rank(name: str) -> None:
    """Refuse a command under torchrun when every rank would do the same work.

    Raises:
        UserError: there are several ranks.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    from st_ar.distributed import Ranks

    if (world := Ranks.from_environment().world) > 1:
        raise UserError(
            f"st-ar {name} runs in one process, not in {world}: start it without torchrun, WORLD_SIZE unset"
        )


def expand_home(argument: str) -> str:
    """An argument with ~ as the home folder in its value, which shells leave alone in --out=~/run."""
    option, mark, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + mark + (os.path.expanduser(value) if value.startswith("~") else value)  # noqa: PTH111 -- text


def read_command(arguments: Sequence[str]) -> Callable[[], None]:
    """Parse a command line, the command first; returns what to call to run it.

    Raises:
        UserError: unknown command or preset, or several ranks for a command that has no work to share.
        SystemExit: unknown options or wrong values; the cause is printed.
    """
    name, *rest = arguments
    rest = [expand_home(argument) for argument in rest]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: give one of {', '.join(COMMANDS)}; st-ar --help explains them")
    if not COMMANDS[name].several_ranks:
        require_one_rank(name)
    command = load_command(name)
    if isinstance(command, type):
        return tyro.cli(command, prog=f"st-ar {name}", args=rest).run  # pyright: ignore[reportAttributeAccessIssue]
    return command(rest)


def run_command(arguments: Sequence[str]) -> None:
    """Parse and run a command line, the command first.

    Raises:
        UserError, Interrupted: as the command does.
    """
    read_command(arguments)()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `st-ar` and `python -m st_ar`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    if rank:  # the stack traces of ranks that cannot meet say less than our message
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(HELP.format(commands="\n".join(f"  {name:18} {it.help}" for name, it in COMMANDS.items())), end="")
        elif arguments[0] == "--version":
            print(__version__)
        else:
            run_command(arguments)
    except UserError as error:
        print(f"st-ar{rank and ', rank '}{rank}: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        if rank in ("", "0"):  # all ranks stop together
            print(f"st-ar: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        print("st-ar: interrupted", file=sys.stderr)
        sys.exit(130)
    except PermissionError as error:
        print(f"st-ar: {error.filename}: {error.strerror}; give a path that you may read and write", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
