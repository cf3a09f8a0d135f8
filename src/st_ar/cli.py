"""The command line: `st-ar VERB ...`, one verb for each arrow between artefacts."""

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from st_ar import __version__
from st_ar.config import TrainConfig
from st_ar.data_verbs import TrainKMeans, TrainVQ, vq_command
from st_ar.errors import Interrupted, UserError
from st_ar.presets import PRESETS, get_preset, unknown_preset
from st_ar.run_config import RunConfig
from st_ar.verbs import VERBS
from st_ar.vq_config import VQ_PRESETS
from st_ar.watch_config import WatchConfig

HELP = """\
usage: st-ar VERB [options]        st-ar VERB --help explains each

Train LlamaGen-style image generators with and without self-guidance (ST-AR), and see what they understand.

    images --tokenize--> token store --train--> run --sample--> images --evaluate--> table
                                                 |----- probe, attention ----> figures

  quickstart         the whole line on photographs that are already here: AR and ST-AR side by side, minutes on a CPU
  train-tokenizer    images -> tokenizer: a VQ-GAN, or k-means in seconds
  tokenize           images -> token store
  import-tokens      LlamaGen's folders of .npy files -> token store
  train              token store -> run; presets for LlamaGen and ST-AR
  sample             run -> images
  reference          images -> statistics to evaluate against, computed once
  evaluate           samples against a reference: FID, sFID, IS, precision, recall, and others
  sweep              samples and their distance over guidance scales, with the best setting
  reconstruct        how faithful a tokenizer is: rFID, PSNR, SSIM, use of the codebook
  invariance         how many tokens stay when the view of an image shifts a little
  likelihood         how well a model predicts images that it has not seen
  probe              what a model's features say about an image, token by token
  attention          what a model looks at
  demo               a web page on this machine: draw, compare, see what models look at, follow runs
  reproduce          the paper's tables and figures, at full size or small
  convert            to and from the weight files of LlamaGen's scripts, models and VQ tokenizers
  env                versions, CPU, GPUs and threads, for a bug report
  completion         a script with which bash, zsh or fish complete all this

exit status: 0 done, 2 a mistake or trouble that the message explains, 130 or 143 interrupted (training: and saved)
"""


@dataclass(kw_only=True)
class Train:
    """Train a model on a token store."""

    tokens: Path
    """The token store."""
    text: Path | None = None
    """Captions' features for a text model (--model.condition text): a .safetensors file, or a folder of them."""
    validation: Path | None = None
    """A token store to measure the averaged weights on at each checkpoint; the best so far are kept, in OUT/best."""
    init: Path | None = None
    """A model to begin with instead of random weights: a run, an export folder, .safetensors, LlamaGen's .pt, hub:OWNER/NAME."""
    init_ema: bool = False
    """Begin with the averaged instead of the live weights of --init."""
    out: Path
    """Folder of the run."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint; give the settings it was begun with."""
    watching: Annotated[WatchConfig, tyro.conf.arg(name="")] = field(default_factory=WatchConfig)
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    def run(self, preset: str) -> None:
        from st_ar.training.loop import train

        train(
            self.config,
            self.tokens,
            self.out,
            text=self.text,
            validation=self.validation,
            init=self.init,
            init_ema=self.init_ema,
            watching=self.watching,
            resume=self.resume,
            preset=preset,
        )
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.out}: trained; weights in {self.out / 'export'}")
            self._print_best()

    def _print_best(self) -> None:
        """Say when the averaged weights had the lowest validation loss, and where they are."""
        from st_ar.files import read_json
        from st_ar.settings import fits

        best = self.out / "best"
        if self.validation is None or not (best / "config.json").exists():
            return
        info = read_json(best / "config.json", "an export folder")
        loss, step = info.get("validation_loss"), info.get("step")
        if fits(loss, float) and fits(step, int):
            print(f"{best}: its lowest validation loss, {loss:.4f}, at step {step}")


def _read_train(arguments: Sequence[str]) -> Callable[[], None]:
    """`st-ar train PRESET ...`: the preset gives every setting its default."""
    usage = (
        "--tokens STORE [--text TEXT] [--validation STORE] [--init MODEL] --out RUN [--resume] [--steps N | --epochs N] "
        "[any setting]"
    )
    chosen = _choose_preset("train", usage, PRESETS, arguments)
    if isinstance(chosen, str):
        return partial(print, chosen)
    name, rest = chosen
    default = _with_budget(get_preset(name), rest)
    command = tyro.cli(
        _train_command(default), prog=f"st-ar train {name}", args=rest, description=PRESETS[name].__doc__
    )
    return partial(command.run, name)


def _read_train_tokenizer(arguments: Sequence[str]) -> Callable[[], None]:
    """`st-ar train-tokenizer PRESET ...`: k-means, or a VQ-GAN whose preset gives every setting its default."""
    presets = {"kmeans": TrainKMeans, **VQ_PRESETS}
    usage = "--images SRC --out DIR [any setting]"
    chosen = _choose_preset("train-tokenizer", usage, presets, arguments)
    if isinstance(chosen, str):
        return partial(print, chosen)
    name, rest = chosen
    if name == "kmeans":
        _require_one_rank("train-tokenizer kmeans")
        command: type[TrainKMeans] | type[TrainVQ] = TrainKMeans
    else:
        command = vq_command(name, _with_budget(VQ_PRESETS[name](), rest))
    return tyro.cli(command, prog=f"st-ar train-tokenizer {name}", args=rest, description=presets[name].__doc__).run


SHARED = ("tokenize", "sample", "reference", "evaluate", "reconstruct", "env", "completion")
"""Verbs whose work several ranks share (as they do the training of models and VQ tokenizers), or that have none to share."""


def _require_one_rank(verb: str) -> None:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    from st_ar.distributed import Ranks

    if (world := Ranks.from_environment().world) > 1:
        raise UserError(
            f"st-ar {verb} runs in one process, not in {world}: start it without torchrun, WORLD_SIZE unset"
        )


def _choose_preset(
    verb: str, usage: str, presets: Mapping[str, Callable[..., object]], arguments: Sequence[str]
) -> tuple[str, list[str]] | str:
    """The preset and the options after it; or the help, if that was asked for."""
    if arguments and arguments[0] in presets:
        return arguments[0], list(arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        raise unknown_preset(arguments[0], presets)
    if not arguments or arguments[0] not in ("-h", "--help"):
        raise UserError(f"{verb} needs a preset before its options: one of {', '.join(presets)}")
    listed = "\n".join(f"  {name:24}{(build.__doc__ or '').splitlines()[0]}" for name, build in presets.items())
    return (
        f"usage: st-ar {verb} PRESET {usage}\n\n"
        f"st-ar {verb} PRESET --help lists every setting with the preset's values. The presets:\n\n{listed}"
    )


Run = TypeVar("Run", bound=RunConfig)


def _with_budget(default: Run, options: Sequence[str]) -> Run:
    """The preset, but for its length if the options give another in --steps or --epochs."""
    given = {flag: any(a.split("=")[0] == f"--{flag}" for a in options) for flag in ("steps", "epochs")}
    if given["steps"] == given["epochs"]:
        return default
    return replace(default, steps=1 if given["steps"] else None, epochs=1 if given["epochs"] else None)


def _train_command(default: TrainConfig) -> type[Train]:
    @dataclass(kw_only=True)
    class WithPreset(Train):
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: default)

    return WithPreset


def read_command(arguments: Sequence[str]) -> Callable[[], None]:
    """What a command line, the verb first, asks for: to be called to have it done.

    Raises:
        UserError: no such verb or preset, or several ranks that would each do the same.
        SystemExit: options that the verb does not have, or values that they do not take; the cause is printed.
    """
    verb, *rest = arguments
    if verb == "train":
        return _read_train(rest)
    if verb == "train-tokenizer":
        return _read_train_tokenizer(rest)
    if verb in VERBS:
        if verb not in SHARED:
            _require_one_rank(verb)
        return tyro.cli(VERBS[verb], prog=f"st-ar {verb}", args=rest).run
    raise UserError(
        f"unknown verb {verb!r}: give one of {', '.join(['train', 'train-tokenizer', *VERBS])}; st-ar --help explains them"
    )


def run_command(arguments: Sequence[str]) -> None:
    """Do what a command line asks for, the verb first.

    Raises:
        UserError, Interrupted: as the verb does.
    """
    read_command(arguments)()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `st-ar` and `python -m st_ar`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of names that are no text
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(HELP, end="")
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
