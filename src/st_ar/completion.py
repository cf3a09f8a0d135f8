"""Completion by the shell: scripts that hold every verb, preset, option and choice.

They are made from the dataclasses that tyro makes the command line's parsers from.
"""

import ast
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from inspect import getsource
from itertools import pairwise
from textwrap import dedent
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import tyro

Shell = Literal["bash", "zsh", "fish"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a verb."""

    choices: Sequence[str] = ()
    """What it takes, if that is one of a few words."""
    takes_value: bool = True
    """Whether a word follows it."""
    help: str = ""
    """The first sentence of its help."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """What may follow a verb."""

    presets: Sequence[str] = ()
    """The words that its first place takes, if they are known: presets, shells, tables of the paper."""
    options: Mapping[str, Option]
    """--name -> what it is."""


def read_verb(command: type, presets: Sequence[str] = ()) -> Verb:
    """The options of a verb, from the fields of its dataclass: as tyro makes its parser from them."""
    words, options = list(presets), dict[str, Option]()
    for name, kind, marks, help_ in _fields(command):
        if tyro.conf.Positional in marks:
            words += _choices(kind)
        elif kind is bool:
            *groups, last = name.split(".")
            options[f"--{name}"] = options[f"--{'.'.join([*groups, f'no-{last}'])}"] = Option(
                takes_value=False, help=help_
            )
        else:
            for alias in (f"--{name}", *(alias for mark in marks for alias in getattr(mark, "aliases", None) or ())):
                options[alias] = Option(choices=_choices(kind), help=help_)
    options["--help"] = Option(takes_value=False, help="Show the help")
    return Verb(presets=words, options=options)


def _fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Sequence[Any], str]]:
    """Name, type, tyro's marks and the first sentence of the help of each field, with those of the dataclasses inside."""
    hints, helps = get_type_hints(kind, include_extras=True), _helps(kind)
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
            yield name, inside, marks, helps.get(each.name, "")


def _helps(kind: type) -> dict[str, str]:
    """Field -> the first sentence of the docstring below it."""
    found: dict[str, str] = {}
    for parent in reversed([each for each in kind.__mro__ if is_dataclass(each)]):
        [body] = [node.body for node in ast.parse(dedent(getsource(parent))).body if isinstance(node, ast.ClassDef)]
        for field, after in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
                text = " ".join(str(ast.literal_eval(after.value)).split())
                found[field.target.id] = text.split(". ")[0].rstrip(".")
    return found


def _choices(kind: Any) -> list[str]:
    """The words of the literals in a type."""
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    return [word for inside in get_args(kind) for word in _choices(inside)]


def read_verbs() -> dict[str, Verb]:
    """Every verb of the command line, by name."""
    from st_ar.cli import Train
    from st_ar.data_verbs import TrainKMeans, TrainVQ
    from st_ar.presets import PRESETS
    from st_ar.verbs import VERBS
    from st_ar.vq_config import VQ_PRESETS

    tokenizers = [read_verb(TrainKMeans), read_verb(TrainVQ)]
    return {
        "train": read_verb(Train, list(PRESETS)),
        "train-tokenizer": Verb(
            presets=["kmeans", *VQ_PRESETS], options={**tokenizers[0].options, **tokenizers[1].options}
        ),
        **{name: read_verb(command) for name, command in VERBS.items()},
    }


def completion(shell: Shell) -> str:
    """The script for a shell."""
    verbs = read_verbs()
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](verbs)


def _words(words: Sequence[str]) -> str:
    return " ".join(words)


def _cases(verbs: Mapping[str, Verb]) -> str:
    """What the functions for bash and zsh know: words by verb, and by verb and option."""
    lines = ["  case $verb in"]
    for name, verb in verbs.items():
        chosen = {option: it.choices for option, it in verb.options.items() if it.choices}
        lines += [f"    {name})", f"      options={shlex.quote(_words(list(verb.options)))}"]
        lines += [f"      presets={shlex.quote(_words(verb.presets))}"] if verb.presets else []
        lines += ["      case $option in"] if chosen else []
        lines += [f"        {option}) choices={shlex.quote(_words(words))} ;;" for option, words in chosen.items()]
        lines += ["      esac"] if chosen else []
        lines += ["      ;;"]
    return "\n".join([*lines, "  esac"])


def _bash(verbs: Mapping[str, Verb]) -> str:
    return f"""\
# bash completion for st-ar, written by `st-ar completion bash`
_st_ar() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} verb=${{COMP_WORDS[1]}} option= options= presets= choices= word
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W {shlex.quote(_words([*verbs, "--help", "--version"]))} -- "$current"))
    return
  fi
  for word in "${{COMP_WORDS[@]:2:COMP_CWORD-2}}"; do
    case $word in --*) option=$word ;; esac
  done
{_cases(verbs)}
  if [[ $current == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$current"))
  elif [ -n "$choices" ]; then
    COMPREPLY=($(compgen -W "$choices" -- "$current"))
  elif [ "$COMP_CWORD" -eq 2 ] && [ -n "$presets" ]; then
    COMPREPLY=($(compgen -W "$presets" -- "$current"))
  fi
}}
complete -o default -F _st_ar st-ar
"""


def _zsh(verbs: Mapping[str, Verb]) -> str:
    return f"""\
#compdef st-ar
# zsh completion for st-ar, written by `st-ar completion zsh`
_st_ar() {{
  local verb=$words[2] option= options= presets= choices= word
  if (( CURRENT == 2 )); then
    compadd -- {_words([*verbs, "--help", "--version"])}
    return
  fi
  for word in $words[3,CURRENT-1]; do
    [[ $word == --* ]] && option=$word
  done
{_cases(verbs)}
  if [[ $words[CURRENT] == -* ]]; then
    compadd -- ${{=options}}
  elif [[ -n $choices ]]; then
    compadd -- ${{=choices}}
  elif (( CURRENT == 3 )) && [[ -n $presets ]]; then
    compadd -- ${{=presets}}
  else
    _files
  fi
}}
_st_ar "$@"
"""


def _fish(verbs: Mapping[str, Verb]) -> str:
    lines = [
        "# fish completion for st-ar, written by `st-ar completion fish`",
        "complete -c st-ar -n __fish_use_subcommand -f -a " + shlex.quote(_words(list(verbs))),
    ]
    for name, verb in verbs.items():
        seen = f"'__fish_seen_subcommand_from {name}'"
        if verb.presets:
            first = f"'__fish_seen_subcommand_from {name}; and test (count (commandline -opc)) -eq 2'"
            lines.append(f"complete -c st-ar -n {first} -f -a {shlex.quote(_words(verb.presets))}")
        for option, it in verb.options.items():
            line = f"complete -c st-ar -n {seen} -l {option.removeprefix('--')}"
            if it.choices:
                line += f" -x -a {shlex.quote(_words(it.choices))}"
            elif it.takes_value:
                line += " -r"
            lines.append(line + f" -d {_fish_quoted(it.help)}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
