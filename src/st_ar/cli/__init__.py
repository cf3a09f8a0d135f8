"""The command line: `st-ar COMMAND ...`.

`st-ar --help` imports no command: COMMANDS names them as strings. The help of a command does not import torch: modules here import
what a command needs when it runs.
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import zip_longest
from typing import Any

import tyro

from st_ar import __version__
from st_ar.errors import Interrupted, UserError


@dataclass(frozen=True)
class Command:
    """A command's code and its line in `st-ar --help`."""

    target: str
    """module:name in this package. A class holds the command's options; a function parses the command line itself."""
    help: str
    multi_rank: bool = False
    """Whether the ranks of torchrun share its work."""


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
    "reference": Command("evaluate:MakeReference", "images -> reference statistics for evaluate", True),
    "evaluate": Command(
        "evaluate:Evaluate", "compare samples with a reference: FID, sFID, IS, precision, recall and more", True
    ),
    "train-classifier": Command(
        "evaluate:TrainClassifier", "token store -> classifier, to check whether samples show their class"
    ),
    "sweep": Command("generate:Sweep", "find the best guidance scale, temperature and top-k"),
    "reconstruct": Command("evaluate:Reconstruct", "measure a tokenizer: rFID, PSNR, SSIM, codebook usage", True),
    "invariance": Command("understand:Invariance", "measure how many tokens stay the same when an image shifts"),
    "likelihood": Command("understand:Likelihood", "measure the validation loss of models"),
    "probe": Command("understand:Probe", "train linear probes on a model's features"),
    "attention": Command("understand:Attention", "plot and measure a model's attention"),
    "demo": Command("projects:Demo", "serve a web demo on this machine: generate, compare, inspect, follow runs"),
    "reproduce": Command("projects:Reproduce", "reproduce the paper's tables and figures, at full size or small"),
    "convert": Command("train:Convert", "convert models and VQ tokenizers to and from LlamaGen's .pt files"),
    "env": Command("projects:Env", "print versions, CPU, GPUs and threads for a bug report", True),
    "completion": Command("projects:Completion", "print the completion script for bash, zsh or fish", True),
}

HELP = """\
usage: st-ar COMMAND [options]     st-ar COMMAND --help explains each

Train LlamaGen-style image generators with and without self-guidance (ST-AR), and evaluate them.

    images --tokenize--> token store --train--> run --sample--> images --evaluate--> table
                                                 |---- probe, attention ----> figures

{commands}

exit status: 0 success, 2 an error that the message explains, 130 or 143 interrupted (training is saved)
"""


def load_command(name: str) -> Any:
    """Import the class or function of a command."""
    module, _, attribute = COMMANDS[name].target.partition(":")
    return getattr(import_module(f"st_ar.cli.{module}"), attribute)


def require_one_rank(name: str) -> None:
    """Raise a UserError under torchrun if every rank would do the same work."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    from st_ar.distributed import Ranks

    if (world := Ranks.from_environment().world) > 1:
        raise UserError(
            f"st-ar {name} runs in one process, not in {world}: start it without torchrun and with WORLD_SIZE unset"
        )


def spell_out(arguments: Sequence[str]) -> list[str]:
    """Expand ~, and give --compile, which may also be auto, its value where it stands as a flag."""
    spelled: list[str] = []
    for argument, following in zip_longest(arguments, arguments[1:]):
        if argument == "--no-compile":
            spelled += ["--compile", "False"]
        else:
            alone = argument == "--compile" and following not in ("auto", "True", "False")
            spelled += [expand_home(argument), *(["True"] if alone else [])]
    return spelled


def expand_home(argument: str) -> str:
    """An argument with ~ as the home folder in its value, which shells leave alone in --out=~/run."""
    option, mark, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + mark + (os.path.expanduser(value) if value.startswith("~") else value)  # noqa: PTH111 -- text


def read_command(arguments: Sequence[str]) -> Callable[[], None]:
    """Parse a command and its options; return the function that runs it.

    Raises:
        UserError: an unknown command or preset, or several ranks for a command that runs in one process.
        SystemExit: unknown options or wrong values, after the error is printed.
    """
    name, *rest = arguments
    rest = spell_out(rest)
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: give one of {', '.join(COMMANDS)}; st-ar --help explains them")
    if not COMMANDS[name].multi_rank:
        require_one_rank(name)
    command = load_command(name)
    if isinstance(command, type):
        return tyro.cli(command, prog=f"st-ar {name}", args=rest).run  # pyright: ignore[reportAttributeAccessIssue]
    return command(rest)


def run_command(arguments: Sequence[str]) -> None:
    """Parse and run a command and its options."""
    read_command(arguments)()


def tell_torchrun(error: str) -> None:
    """Leave an error where torchrun looks for it, so that its report, which comes last, says more than the exit status."""
    if where := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": error, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(where, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": error, "extraInfo": extra}}, file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `st-ar` and `python -m st_ar`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Read when torch is imported: threads that wait soon give way to other programs (benchmarks/threads.py).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    if rank:  # the stack traces of ranks that cannot meet say less than our message
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may not be valid UTF-8
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(HELP.format(commands="\n".join(f"  {name:18} {c.help}" for name, c in COMMANDS.items())), end="")
        elif arguments[0] == "--version":
            print(__version__)
        else:
            run_command(arguments)
    except UserError as error:
        print(f"st-ar{rank and ', rank '}{rank}: {error}", file=sys.stderr)
        tell_torchrun(str(error))
        sys.exit(2)
    except Interrupted as stopped:
        if rank in ("", "0"):  # all ranks are interrupted together
            print(f"st-ar: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        print("st-ar: interrupted", file=sys.stderr)
        sys.exit(130)
    except PermissionError as error:
        print(f"st-ar: {error.filename}: {error.strerror}; give a path that you can read and write", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
