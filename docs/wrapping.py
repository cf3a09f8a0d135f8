"""MkDocs hook: lines break between options and measurements, not inside one, and cells of text are not squeezed."""

import re
from typing import Any

WORD = 34
"""Characters of the longest word of code that stays on one line. It fits on a phone."""
TEXT = 20
"""Characters from which on a cell is text, and gets room."""


def on_page_content(html: str, **_: Any) -> str:
    """Mark words of code and cells of text for site.css, and put no-break spaces into numbers."""
    html = re.sub(r"(?s)<td>(.*?)</td>", _cell, html)
    pieces = re.split(r"(?s)(<pre\b.*?</pre>|<svg\b.*?</svg>|<code>[^<]*</code>)", html)
    return "".join(
        _code(piece) if piece.startswith("<code>") else piece if at % 2 else _numbers(piece)
        for at, piece in enumerate(pieces)
    )


def _cell(found: re.Match[str]) -> str:
    text = re.sub(r"<[^>]*>", "", found[1])
    return f'<td class="text">{found[1]}</td>' if len(text) > TEXT else found[0]


def _code(code: str) -> str:
    words = code.removeprefix("<code>").removesuffix("</code>").split(" ")
    marked = (f'<span class="word">{word}</span>' if len(word) <= WORD else word for word in words)
    return f"<code>{' '.join(marked)}</code>"


def _numbers(text: str) -> str:
    text = re.sub(r"(?<=\d) (?=[±%]|x \d)|(?<=±) (?=\d)|(?<=\d x) (?=\d)", "\N{NO-BREAK SPACE}", text)
    return re.sub(r"\((-?[\d.]+) to (-?[\d.]+)\)", "(\\1\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}\\2)", text)
