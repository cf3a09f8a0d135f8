"""Pieces of the page as HTML: pictures with their names, tables and figures. Whatever comes from a file is escaped."""

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from html import escape

import numpy as np
from PIL import Image

from st_ar.demo.draw import Frame, GenerationRecord, to_png
from st_ar.demo.reading import Guesses, Reading
from st_ar.demo.setup import Seen
from st_ar.report import png_uri

SMALL = 64
"""Pixels a side up to which a picture is shown as it is, without loss."""


def data_uri(content: bytes, kind: str) -> str:
    """A file's content as an address of its own."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def preview_uri(picture: np.ndarray) -> str:
    """A picture uint8 [H, W, 3 or 4] that is soon replaced: small before it is exact, unless it is small anyway."""
    if picture.shape[0] <= SMALL:
        return png_uri(picture)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="WEBP", quality=80, method=0)
    return data_uri(file.getvalue(), "image/webp")


def figures(frame: Frame, names: Sequence[str], title: str) -> str:
    """The pictures of a frame, each with its class; whole ones with their file to download."""
    cells: list[str] = []
    for index, (picture, name) in enumerate(zip(frame.pictures, names, strict=True)):
        if frame.recipes:
            recipe = frame.recipes[index]
            uri = data_uri(to_png(picture, recipe), "image/png")
            file = f"{safe_name(name)}-seed{recipe.settings.seed}-{index}.png"
            link = f'<a class="save" download="{file}" href="{uri}" title="{file}: the image with all its settings">save</a>'
        else:
            uri, link = preview_uri(picture), ""
        label = escape(f"{title}, {name}, image {index}", quote=True)
        cells.append(
            f'<figure><img src="{uri}" alt="{label}"><figcaption><span>{escape(name)}</span>{link}</figcaption></figure>'
        )
    return "".join(cells)


def gallery(frame: Frame, names: Sequence[str], title: str) -> str:
    """The pictures of one model, as many to a row as fit."""
    return f'<div class="pictures n{min(len(names), 4)}">{figures(frame, names, title)}</div>'


def side_by_side(frames: Sequence[Frame], titles: Sequence[str], names: Sequence[str]) -> str:
    """The pictures of several models, a column for each."""
    columns = [
        f'<section><h3>{escape(title)}</h3><div class="pictures n2">{figures(frame, names, title)}</div></section>'
        for title, frame in zip(titles, frames, strict=True)
    ]
    return f'<div class="beside">{"".join(columns)}</div>'


def safe_name(name: str) -> str:
    """A class's name as part of a file's."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name).strip("-")[:40] or "image"


def status(frame: Frame, models: int = 1) -> str:
    """How far the drawing is, for those who cannot see it too."""
    rate = frame.drawn / max(frame.seconds, 1e-9)
    if frame.tokens is None:
        text = f"token {frame.drawn} of {frame.total} &middot; {rate:.1f} tokens a second"
    else:
        text = f"{frame.total} tokens in {frame.seconds:.2f} s &middot; {rate:.1f} tokens a second"
    both = " in each model" if models > 1 else ""
    share = 100 * frame.drawn / frame.total
    return (
        f'<div class="bar" role="status"><div style="width:{share:.1f}%"></div></div><p class="quiet">{text}{both}</p>'
    )


def note(text: str) -> str:
    """A line of quiet text."""
    return f'<p class="quiet">{escape(text)}</p>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table whose first column names the row."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def chart(svg: str, caption: str) -> str:
    """A figure of st_ar.figures."""
    return f'<figure class="chart">{svg}<figcaption>{escape(caption)}</figcaption></figure>'


def row(parts: Sequence[str]) -> str:
    """Pieces beside one another where there is room."""
    return f'<div class="charts">{"".join(parts)}</div>'


def picture(uri: str, alt: str, caption: str) -> str:
    """One picture as wide as the page."""
    return f'<figure class="wide"><img src="{uri}" alt="{escape(alt, quote=True)}"><figcaption>{escape(caption)}</figcaption></figure>'


def image_uri(image: Image.Image) -> str:
    """An image, as a PNG."""
    return png_uri(np.asarray(image))


def only(frame: Frame, number: int) -> Frame:
    """One image of a frame."""
    some = slice(number, number + 1)
    return replace(frame, pictures=frame.pictures[some], recipes=frame.recipes[some])


def in_words(recipe: GenerationRecord) -> str:
    """How an image was drawn, in a few words."""
    how = recipe.settings
    return (
        f"seed {how.seed}, image {recipe.number} of {len(recipe.labels)}, guidance {how.cfg_scale:g} ({how.cfg_schedule}), "
        f"temperature {how.temperature:g}, top-k {how.top_k}, top-p {how.top_p:g}"
    )


def step_words(seen: Seen, token: int, reading: Reading, on_class: float, most: float) -> str:
    """What there is to say of the step that predicts a token; `most` is the entropy of an even guess."""
    rows = [
        ("entropy (nats)", f"{reading.entropy[token]:.3f}"),
        ("entropy of all tokens", f"{reading.entropy.min():.3f}\u00a0to\u00a0{reading.entropy.max():.3f}"),
        ("entropy of an even guess", f"{most:.3f}"),
        ("probability of the token that is there", f"{reading.chance[token]:.4f}"),
        ("likelier tokens", f"{int(reading.rank[token]):,}"),
        ("attention on the class", f"{on_class:.3f}"),
    ]
    caption = f"The step that predicts token {token}, having read {token} of {len(seen.tokens)} of {seen.title}."
    return table(("", f"token {token}"), rows, caption)


def guess_table(guesses: Guesses, name: str, truth: str | None, length: int) -> str:
    """What a probe takes an image of `length` tokens for as it is read; `truth` is its class, if it is known."""
    rows = [
        (str(read), *(f"{known}\u00a0✓" if known == truth else known for known in best))
        for read, best in guesses.by_step
    ]
    places = ("first guess", "second", "third")[: len(rows[0]) - 1]
    caption = (
        f"What a linear probe on layer {guesses.layer} of {name}, which is not told the class, takes the image of {length} tokens for. "
        f"Ridge regression on {guesses.total:,} images of the probe's store, not the MAE protocol."
    )
    return table(("tokens read", *places), rows, caption)
