"""Completion scripts for bash, zsh and fish: commands, presets, options and their choices.

tyro can write such scripts too, but they do not complete presets, and in fish not file names.
"""

import ast
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from inspect import getsource
from itertools import pairwise
from textwrap import dedent
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import tyro

Shell = Literal["bash", "zsh", "fish"]


@dataclass(frozen=True)
class Option:
    """An option of a command."""

    choices: Sequence[str]
    """The option's values if there are few."""
    takes_value: bool
    help: str
    """First sentence of the option's help."""


@dataclass
class Words:
    """The words that can follow a command."""

    first: list[str] = field(default_factory=list)
    """Choices of the first word: presets, shells, or tables of the paper."""
    options: dict[str, Option] = field(default_factory=dict)


def read_words(command: type, first: Sequence[str] = ()) -> Words:
    """Return the options of a command from the fields of its dataclass, like tyro's parser."""
    words = Words(list(first))
    for name, kind, marks, text in _fields(command):
        if tyro.conf.Positional in marks:
            words.first += _choices(kind)
        elif kind is bool:
            *groups, last = name.split(".")
            for flag in (name, ".".join([*groups, f"no-{last}"])):
                words.options[f"--{flag}"] = Option((), False, text)
        else:
            aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
            words.options |= dict.fromkeys((f"--{name}", *aliases), Option(_choices(kind), True, text))
    words.options["--help"] = Option((), False, "Show the help")
    return words


def _fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Sequence[Any], str]]:
    """The name, type, tyro markers and first sentence of help of each field, including nested dataclasses."""
    hints, docs = get_type_hints(kind, include_extras=True), _field_docs(kind)
    for each in fields(kind):
        hint, name = hints[each.name], prefix + each.name.replace("_", "-")
        marks = getattr(hint, "__metadata__", ())
        inside = get_args(hint)[0] if marks else hint
        if tyro.conf.Suppress in marks:
            continue
        if is_dataclass(inside):
            flat = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _fields(cast(type, inside), prefix if flat else f"{name}.")
        else:
            shared = next((mark.help for mark in marks if getattr(mark, "help", None)), "")
            text = " ".join((docs.get(each.name) or shared).split())
            yield name, inside, marks, text.split(". ")[0].rstrip(".")


def _field_docs(kind: type) -> dict[str, str]:
    """Field -> its docstring."""
    found: dict[str, str] = {}
    for parent in reversed([each for each in kind.__mro__ if is_dataclass(each)]):
        [body] = [node.body for node in ast.parse(dedent(getsource(parent))).body if isinstance(node, ast.ClassDef)]
        for each, after in pairwise(body):
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and isinstance(after, ast.Expr):
                found[each.target.id] = str(ast.literal_eval(after.value))
    return found


def _choices(kind: Any) -> list[str]:
    """The values of the Literals in a type."""
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    return [word for inside in get_args(kind) for word in _choices(inside)]


def read_commands() -> dict[str, Words]:
    """Return the words that can follow each command."""
    from st_ar.cli import COMMANDS, load_command
    from st_ar.cli.train import Train, TrainKMeans, TrainVQ
    from st_ar.config import VQ_PRESETS
    from st_ar.presets import PRESETS

    found = {name: Words() for name in COMMANDS}
    found["train"] = read_words(Train, list(PRESETS))
    tokenizers = read_words(TrainKMeans).options | read_words(TrainVQ).options
    found["train-tokenizer"] = Words(["kmeans", *VQ_PRESETS], tokenizers)
    for name in COMMANDS:
        if isinstance(command := load_command(name), type):
            found[name] = read_words(command)
    return found


def completion(shell: Shell) -> str:
    """Return the script for a shell."""
    commands = read_commands()
    return _fish(commands) if shell == "fish" else SCRIPTS[shell].replace("CHOOSE", _choose(commands))


SCRIPTS = {
    "bash": """\
# bash completion for st-ar, written by `st-ar completion bash`
CHOOSE
_st_ar() {
  local offered=
  _st_ar_choose "${COMP_WORDS[@]:0:COMP_CWORD+1}"
  COMPREPLY=($(compgen -W "$offered" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _st_ar st-ar
""",
    "zsh": """\
#compdef st-ar
# zsh completion for st-ar, written by `st-ar completion zsh`
CHOOSE
_st_ar() {
  local offered=
  _st_ar_choose "${(@)words[1,CURRENT]}"
  if [[ -n $offered ]]; then
    compadd -- ${=offered}
  else
    _files
  fi
}
_st_ar "$@"
""",
}


def _choose(commands: Mapping[str, Words]) -> str:
    """The function that sets `offered` to the choices for the last of its arguments, the words of the command line."""
    lines: list[str] = []
    for name, words in commands.items():
        chosen = [(option, it.choices) for option, it in words.options.items() if it.choices]
        lines += [f"    {name})", f"      options={_quote(words.options)}", f"      first={_quote(words.first)}"]
        lines += ["      case $option in", *(f"        {o}) choices={_quote(values)} ;;" for o, values in chosen)]
        lines += ["      esac", "      ;;"]
    cases = "\n".join(lines)
    return f"""\
_st_ar_choose() {{
  local count=$# command=$2 current= option= options= first= choices= word
  if [ "$count" -eq 2 ]; then
    offered={_quote([*commands, "--help", "--version"])}
    return
  fi
  shift 2
  for word in "$@"; do
    case $current in --*) option=$current ;; esac
    current=$word
  done
  case $command in
{cases}
  esac
  if [[ $current == -* ]]; then
    offered=$options
  elif [ -n "$choices" ]; then
    offered=$choices
  elif [ "$count" -eq 3 ]; then
    offered=$first
  fi
}}"""


def _quote(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))


def _fish(commands: Mapping[str, Words]) -> str:
    lines = [
        "# fish completion for st-ar, written by `st-ar completion fish`",
        f"complete -c st-ar -n __fish_use_subcommand -f -a {_quote(commands)}",
    ]
    for name, words in commands.items():
        seen = f"'__fish_seen_subcommand_from {name}'"
        if words.first:
            first = f"'__fish_seen_subcommand_from {name}; and test (count (commandline -opc)) -eq 2'"
            lines.append(f"complete -c st-ar -n {first} -f -a {_quote(words.first)}")
        for option, it in words.options.items():
            line = f"complete -c st-ar -n {seen} -l {option.removeprefix('--')}"
            if it.choices:
                line += f" -x -a {_quote(it.choices)}"
            elif it.takes_value:
                line += " -r"
            quoted = it.help.replace("\\", "\\\\").replace("'", "\\'")
            lines.append(f"{line} -d '{quoted}'")
    return "\n".join(lines) + "\n"
