"""HTML of the demo: images with captions, tables and figures. Text from files is escaped."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from st_ar.demo.generation import Frame, to_png
from st_ar.demo.reading import Prediction, Reading
from st_ar.demo.setup import DemoImage
from st_ar.report import png_uri

LOSSLESS_SIDE = 64
"""Largest side in pixels at which previews are encoded without loss."""


def data_uri(content: bytes, kind: str) -> str:
    """Return a file's content as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def preview_uri(image: np.ndarray) -> str:
    """Return a preview uint8 [H, W, 3 or 4] as a data URI. Large previews are compressed with loss, since they are replaced soon."""
    if image.shape[0] <= LOSSLESS_SIDE:
        return png_uri(image)
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="WEBP", quality=80, method=0)
    return data_uri(file.getvalue(), "image/webp")


def figures(frame: Frame, names: Sequence[str], title: str) -> str:
    """Return the images of a frame with their classes. Finished images have a download link."""
    cells: list[str] = []
    for index, (image, name) in enumerate(zip(frame.images, names, strict=True)):
        if frame.records:
            record = frame.records[index]
            uri = data_uri(to_png(image, record), "image/png")
            safe = "".join(c if c.isascii() and c.isalnum() else "-" for c in name).strip("-")[:40] or "image"
            file = f"{safe}-seed{record.settings.seed}-{index}.png"
            link = f'<a class="save" download="{file}" href="{uri}" title="{file}: the image with all its settings">save</a>'
        else:
            uri, link = preview_uri(image), ""
        label = escape(f"{title}, {name}, image {index}", quote=True)
        cells.append(
            f'<figure><img src="{uri}" alt="{label}"><figcaption><span>{escape(name)}</span>{link}</figcaption></figure>'
        )
    return "".join(cells)


def gallery(frames: Sequence[Frame], titles: Sequence[str], names: Sequence[str]) -> str:
    """Return the images of one model in a grid, or those of several, one column each."""
    images = [figures(frame, names, title) for title, frame in zip(titles, frames, strict=True)]
    if len(images) == 1:
        return f'<div class="pictures n{min(len(names), 4)}">{images[0]}</div>'
    columns = [
        f'<section><h3>{escape(title)}</h3><div class="pictures n2">{content}</div></section>'
        for title, content in zip(titles, images, strict=True)
    ]
    return f'<div class="beside">{"".join(columns)}</div>'


def status(frames: Sequence[Frame]) -> str:
    """Return a progress bar with the number of tokens and their rate for each model."""
    frame = frames[0]
    rate = frame.done / max(frame.seconds, 1e-9)
    if frame.tokens is None:
        text = f"token {frame.done} of {frame.total} &middot; {rate:.1f} tokens/s"
    else:
        text = f"{frame.total} tokens in {frame.seconds:.2f} s &middot; {rate:.1f} tokens/s"
    each = " for each model" if len(frames) > 1 else ""
    share = 100 * frame.done / frame.total
    return (
        f'<div class="bar" role="status"><div style="width:{share:.1f}%"></div></div><p class="quiet">{text}{each}</p>'
    )


def note(text: str) -> str:
    """Return a line of muted text."""
    return f'<p class="quiet">{escape(text)}</p>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Return a table whose first column names the row."""
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
    """Return a figure of st_ar.figures with a caption."""
    return f'<figure class="chart">{svg}<figcaption>{escape(caption)}</figcaption></figure>'


def step_table(image: DemoImage, token: int, reading: Reading, class_weight: float, uniform: float) -> str:
    """Return the numbers of the step that predicts a token; `uniform` is the entropy of a uniform guess."""
    rows = [
        ("entropy (nats)", f"{reading.entropy[token]:.3f}"),
        ("entropy of all tokens", f"{reading.entropy.min():.3f}\u00a0to\u00a0{reading.entropy.max():.3f}"),
        ("entropy of a uniform distribution", f"{uniform:.3f}"),
        ("probability of the image's token", f"{reading.probability[token]:.4f}"),
        ("tokens with a higher probability", f"{int(reading.rank[token]):,}"),
        ("attention on the class", f"{class_weight:.3f}"),
    ]
    caption = f"Prediction of token {token} after {token} of {len(image.tokens)} tokens of {image.title}."
    return table(("", f"token {token}"), rows, caption)


def prediction_table(prediction: Prediction, name: str, truth: str | None, length: int) -> str:
    """Return a probe's predictions for an image of `length` tokens, with `truth`, the image's class, marked."""
    rows = [
        (str(read), *(f"{label}\u00a0✓" if label == truth else label for label in best))
        for read, best in prediction.by_step
    ]
    ranks = ("most likely", "second", "third")[: len(rows[0]) - 1]
    caption = (
        f"Class of the image, of {length} tokens, predicted by a linear probe on layer {prediction.layer} of {name}. "
        "The model is not given the class. "
        f"The probe is a ridge regression on {prediction.total:,} images of the probe's store, not the MAE protocol."
    )
    return table(("tokens read", *ranks), rows, caption)
