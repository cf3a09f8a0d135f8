"""The code blocks of README.md and docs/, told apart by how they begin: what is neither command nor Python must be declared."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from tests.docs.stand_ins import LISTINGS

ROOT = Path(__file__).parents[2]
PROGRAMS = ("st-ar", "torchrun", "python", "python3", "pip", "make", "tensorboard", "mkdir", "curl", ".")
"""What the commands of shell blocks begin with."""


@dataclass(frozen=True)
class Block:
    page: str
    """Its path in docs/, or README.md."""
    line: int
    """Of its first line in the page, counted from 1."""
    kind: Literal["shell", "bash", "python", "script", "yaml", "listing"]
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Of a shell block: one command each, continued lines joined, comments left out."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [command for line in joined.splitlines() if (command := re.sub(r"(^|\s+)#.*$", "", line).strip())]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """A page's path in docs/, or README.md."""
    return page.relative_to(ROOT if page.parent == ROOT else ROOT / "docs").as_posix()


@cache
def blocks(page: Path) -> list[Block]:
    """The page's indented and fenced blocks, in order.

    Raises:
        AssertionError: a block is nothing that is known.
    """
    found: list[Block] = []
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        line, begun = lines[number], number
        before = lines[number - 1] if number else ""
        if fence := re.match(r"```(\w*)$", line):
            end = lines.index("```", number + 1)
            found.append(_block(name_of(page), begun + 2, "\n".join(lines[number + 1 : end]), fence[1]))
            number = end
        elif line.startswith("    ") and not before.strip():
            while number + 1 < len(lines) and (lines[number + 1].startswith("    ") or not lines[number + 1].strip()):
                number += 1
            text = "\n".join(one[4:] for one in lines[begun : number + 1]).rstrip()
            found.append(_block(name_of(page), begun + 1, text, ""))
        number += 1
    return found


def _block(page: str, line: int, text: str, language: str) -> Block:
    first = text.splitlines()[0]
    if (page, first) in LISTINGS or page == "formats.md" or language in ("bibtex", "diff"):
        kind = "listing"
    elif language == "bash":  # run whole
        kind = "bash"
    elif first.startswith("#!"):
        kind = "script"
    elif first.split()[0] in PROGRAMS:
        kind = "shell"
    elif re.match(r"(import|from) |st_ar\.|\w+ = ", first):
        kind = "python"
    elif re.match(r"\w+: ", first):
        kind = "yaml"
    else:
        raise AssertionError(
            f"{page}:{line}: {first!r} is neither command nor Python: declare it in tests/docs/stand_ins.py"
        )
    fences = {
        ("text", "listing"),
        ("diff", "listing"),
        ("bibtex", "listing"),
        ("bash", "bash"),
        ("shell", "shell"),
        ("python", "python"),
    }
    assert not language or (language, kind) in fences, first
    block = Block(page, line, kind, text)
    if kind == "shell":
        for command in block.commands:
            assert command.split()[0] in PROGRAMS, f"{block}: {command!r} begins with no program that is known"
    elif kind == "listing" and not language:
        assert not re.search(r"(?m)^(st-ar|torchrun) \S", text), f"{block}: a listing with commands in it"
    return block
