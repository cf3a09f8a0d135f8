"""The pages of `st-ar evaluate`, `probe` and `invariance`: what the terminal shows, with figures and all that identifies it."""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from st_ar.errors import UserError
from st_ar.evaluation.generation import format_number, one_line
from st_ar.evaluation.image_sets import ImageSet
from st_ar.evaluation.probe import ProbeMethod
from st_ar.evaluation.probe_report import Probed, accuracy_figure, accuracy_table
from st_ar.figures import embedded
from st_ar.report import Chart, Gallery, Section, Table, png_uri, write_report

LONGEST = 200
"""Characters of a value; lists of labels are longer."""
SHOWN = 16
"""Samples on the page of an evaluation."""


def facts(record: Mapping[str, Any], before: str = "") -> list[list[str]]:
    """A nested record as rows: names joined by dots, values as text; what is empty is left out."""
    rows: list[list[str]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            rows += facts(value, f"{before}{key}.")
        elif value is not None and value != "" and value != [] and value != {}:
            text = value if isinstance(value, str) else json.dumps(value)
            rows.append([f"{before}{key}", text if len(text) <= LONGEST else f"{text[:LONGEST]} .."])
    return rows


def _identified(result: Mapping[str, Any], keys: Sequence[str]) -> Section:
    found = [Table(columns=[key, ""], rows=facts(result[key])) for key in keys]
    return Section(title="What identifies these numbers", parts=[table for table in found if table.rows])


def evaluation_page(path: Path, result: dict[str, Any], samples: ImageSet) -> None:
    """Write the page of `evaluate`'s result, with the first samples.

    Raises:
        UserError: jinja2 is not installed, or the page cannot be written.
    """
    numbers = [[name, format_number(name, value)] for name, value in result["metrics"].items()]
    pictures = [png_uri(pixels) for _, pixels in islice(samples.read(0, 1), SHOWN)]
    rows = [(f"from {first}", pictures[first : first + 8]) for first in range(0, len(pictures), 8)]
    gallery = Gallery(columns=[str(n) for n in range(min(8, len(pictures)))], rows=rows, caption="The first samples.")
    sections = [
        Section(title="Numbers", paragraphs=result["notes"], parts=[Table(columns=["", "value"], rows=numbers)]),
        Section(title="In a line, for a paper", commands=[one_line(result)]),
        Section(title="Samples", parts=[gallery]),
        _identified(result, ["samples", "reference", "extractor", "settings", "environment"]),
    ]
    about = result["samples"], result["reference"]
    lead = f"{about[0]['count']:,} samples of {about[0]['name']}, measured against {about[1]['name']}."
    write_report(path, title="Samples against a reference", lead=lead, sections=sections)


def probe_page(
    path: Path, probed: Sequence[Probed], method: ProbeMethod, record: dict[str, Any], notes: Sequence[str]
) -> None:
    """Write the page of linear probes: table, curves, and what `describe_probes` says.

    Raises:
        UserError: jinja2 or matplotlib is not installed, or the page cannot be written.
    """
    header, rows = accuracy_table(probed)
    curves = Chart(svg=accuracy_figure(probed, method).svg(), caption="Top-1 accuracy on the test images.")
    weights = [
        [each.subject.name, str(described["file"]), str(described["sha256"])[:16], str(described["step"])]
        for each in probed
        if (described := each.subject.describe())
    ]
    columns = ["model", "weights", "SHA-256", "step"]
    read = Table(columns=columns, rows=[list(row) for row in dict.fromkeys(map(tuple, weights))])
    sections = [
        Section(title="Accuracy", paragraphs=notes, parts=[Table(columns=header, rows=rows), curves]),
        Section(title="Weights", parts=[read]),
        _identified(record, ["settings", "train", "test", "environment"]),
    ]
    first = probed[0].result
    lead = f"{record['method']}; {first.train_images:,} training and {first.test_images:,} test images."
    write_report(path, title="What the features tell of the class", lead=lead, sections=sections)


def invariance_page(
    path: Path, header: Sequence[str], rows: Sequence[Sequence[str]], result: dict[str, Any], out: Path
) -> None:
    """Write the page of `st-ar invariance`, with the figures that lie in `out`.

    Raises:
        UserError: jinja2 is not installed, a figure cannot be read, or the page cannot be written.
    """
    captions = {"curve.svg": "Equal tokens over the shift.", "views.svg": "Two views; tokens that differ are marked."}
    try:
        figures = [
            Chart(svg=embedded((out / name).read_text()), caption=caption)
            for name, caption in captions.items()
            if (out / name).exists()
        ]
    except OSError as error:
        raise UserError(f"cannot read the figures in {out} ({error}): measure again into another --out") from error
    sections = [
        Section(title="Equal tokens", parts=[Table(columns=header, rows=rows), *figures]),
        _identified(result, ["images", "settings", "environment"]),
    ]
    about = result["images"]
    lead = f"The share of tokens that stay when the view of an image changes; {about['count']:,} images of {about['name']}."
    write_report(path, title="Token invariance", lead=lead, sections=sections)
