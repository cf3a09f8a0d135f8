"""MkDocs hook: draws equations between $ and $$, as GitHub reads them, as SVG. The site needs no script and no font for them."""

import re
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.mathtext import MathTextParser
from matplotlib.path import Path
from matplotlib.textpath import TextPath

CODE = re.compile(r"(?ms)^```.*?^```$|^    .*?$|`[^`\n]+`")
COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
EM = 100


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every equation outside code."""
    pieces: list[str] = []
    end = 0
    for code in CODE.finditer(markdown):
        pieces += [_convert(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, _convert(markdown[end:])])


def _convert(text: str) -> str:
    text = re.sub(r"\$\$\s*(.+?)\s*\$\$", _display, text, flags=re.DOTALL)
    return re.sub(r"\$([^\s$](?:[^$\n]*[^\s$])?)\$", lambda found: draw(found[1]), text)


def _display(found: re.Match[str]) -> str:
    tex = found[1].replace(r"\frac", r"\dfrac")  # matplotlib has no display style of its own
    return f'<p class="equation">{draw(tex)}</p>'


def draw(tex: str) -> str:
    """An equation as an SVG element in the text's colour, standing on the text's baseline."""
    source = f"${' '.join(tex.split())}$"
    with rc_context({"mathtext.fontset": "stix"}):
        width, height, depth, *_ = MathTextParser("path").parse(source, dpi=72)
        scale = EM / 10  # the parser's text is 10 points high
        width, height, depth = width * scale, height * scale, depth * scale
        path = TextPath((0, 0), source, size=EM)
    steps: list[str] = []
    for points, code in path.iter_segments(simplify=False, curves=True):
        ends = zip(points[::2], points[1::2], strict=True) if code != Path.CLOSEPOLY else ()
        steps.append(COMMANDS[code] + " ".join(f"{x:.1f} {-y:.1f}" for x, y in ends))
    size = f'width="{width / EM:.2f}em" height="{height / EM:.2f}em" style="vertical-align:{-depth / EM:.2f}em"'
    box = f"0 {depth - height:.1f} {width:.1f} {height:.1f}"
    drawing = f'<path fill="currentColor" d="{"".join(steps)}"/>'
    return f'<svg {size} viewBox="{box}" role="img" aria-label="{escape(" ".join(tex.split()))}">{drawing}</svg>'
