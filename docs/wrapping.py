"""MkDocs hook: lines break between options and measurements, not inside one, and cells of text are not squeezed."""

import re
from typing import Any

WORD = 34
"""Characters of the longest word of code that stays on one line. It fits on a phone."""
TEXT = 24
"""Characters of the longest cell that gets no room of its own."""


def on_page_content(html: str, **_: Any) -> str:
    """Mark words of code and cells of text for site.css, and put no-break spaces into numbers."""
    html = re.sub(r"(?s)<(t[dh])>(.*?)</\1>", _cell, html)
    pieces = re.split(r"(?s)(<pre\b.*?</pre>|<svg\b.*?</svg>|<code>[^<]*</code>)", html)
    return "".join(
        _code(piece) if piece.startswith("<code>") else piece if at % 2 else _numbers(piece)
        for at, piece in enumerate(pieces)
    )


def _cell(found: re.Match[str]) -> str:
    tag, content = found.groups()
    text = re.sub(r"<[^>]*>", "", content)
    return f'<{tag} class="text">{content}</{tag}>' if len(text) > TEXT else found[0]


def _code(code: str) -> str:
    """An option stays with its value, if both fit."""
    return re.sub(r"(?<![^\s>])(?:--\S+ (?!--)[^\s<]+|[^\s<]+)(?![^\s<])", _word, code)


def _word(found: re.Match[str]) -> str:
    words = [found[0]] if len(found[0]) <= WORD else found[0].split(" ")
    return " ".join(f'<span class="word">{word}</span>' if len(word) <= WORD else word for word in words)


def _numbers(text: str) -> str:
    text = re.sub(r"(?<=\d) (?=[±%]|x \d)|(?<=±) (?=\d)|(?<=\d x) (?=\d)", "\N{NO-BREAK SPACE}", text)
    return re.sub(r"\(-?[\d.]+(?: to|,) -?[\d.]+\)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
