"""The language of README.md, docs/ and the sources: short sentences, and none of the phrases that a native reader stumbles on."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, name_of, pages

MEAN, LONGEST = 20, 40
"""Words of a page's mean sentence (fewer), and of its longest."""
PHRASES = (
    r"tell(s|ing)? one another",
    r"trouble with them",
    r"tells? no \w+ from",
    r"told from chance",
    r"could reach at best",
    r"learnt .* by heart",
    r"who stops in time",
    r"says? no\b|said no\b",
    r"machine's pace",
    r"took a little of",
    r"the price",
    r"paint(s|ed|ing)?",
    r"averaged weights",
    r"the whole line",
    r"whose script",
    r"the classes in turn|taken in turn",
    r"the same again",
    r"is said",
)


def sentences(text: str) -> list[str]:
    """The sentences of a page: no code blocks, tables, headings, quoted messages, equations or pictures.

    A list's items begin new sentences. Code in a sentence is one word, and a link is its text.
    """
    text = re.sub(r"(?ms)^```.*?^```$|\$\$.*?\$\$|^<!--.*?-->$", "\n", text)
    text = re.sub(r"(?m)^( {4}|[|#>!]).*$", "\n", text)
    text = re.sub(r"`[^`]+`", "CODE", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"(?m)^\s*(-|\d+\.) ", "\n\n", text)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    end = r"(?<!\bEq\.)(?<!\bFig\.)(?<=[.!?])[*)\"]*\s+(?=[A-Z0-9\[*($\"'.])"
    return [one for part in paragraphs for one in re.split(end, part) if one]


def count_words(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def test_sentences_are_split_and_counted() -> None:
    text = "# Title\n\nFour words, (Eq. 2) [here](a.md). Two more!\n\n- `st-ar train` runs: a\n  b\n- c.\n\n    code\n\n| cell |\n"
    assert [count_words(one) for one in sentences(text)] == [5, 2, 4, 1]
    bad = "Refused are models that have no null class; stores of one class, which have no labels; and stores whose names differ."
    assert [count_words(one) for one in sentences(f"{bad}\n{bad}")] == [21, 21]
    assert [count_words(one) for one in sentences(bad.replace(".", "; ") + bad)] == [42]


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_sentences_are_short(page: Path) -> None:
    lengths = {one: count_words(one) for one in sentences(page.read_text(encoding="utf-8"))}
    assert len(lengths) > 10
    longest = max(lengths, key=lambda one: lengths[one])
    assert lengths[longest] <= LONGEST, longest
    assert sum(lengths.values()) / len(lengths) < MEAN


def found_phrases(text: str) -> list[str]:
    """The phrases that occur as whole words."""
    plain = " ".join(text.split())
    return [phrase for phrase in PHRASES if re.search(rf"\b(?:{phrase})\b", plain, re.IGNORECASE)]


def literals(path: Path) -> Iterator[str]:
    """Every string of a module, docstrings too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_phrases_are_found() -> None:
    assert found_phrases("Trouble with\nthem is said.") == ["trouble with them", "is said"]
    assert found_phrases("the painter repaints; it is saidless") == []


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_no_odd_phrase_is_in_the_pages(page: Path) -> None:
    assert found_phrases(page.read_text(encoding="utf-8")) == []


def test_no_odd_phrase_is_in_the_sources() -> None:
    for path in sorted((ROOT / "src").rglob("*.py")):
        for text in literals(path):
            assert found_phrases(text) == [], f"{path}: {text}"
            assert not text.startswith("Of "), f"{path}: {text}"
