"""A measurement of token invariance from images on disk to a folder with its numbers, its curve and pictures of two views."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from st_ar.evaluation.invariance import (
    DIRECTIONS,
    IDENTITY,
    Agreement,
    Change,
    Geometry,
    compare,
    list_changes,
    measure,
    patch_of,
    whole_tokens,
)
from st_ar.evaluation.pictures import Pictures, open_pictures
from st_ar.figures import Drawing, line_chart, require_matplotlib
from st_ar.files import folder_aside, require_absent, require_place, write_csv, write_json
from st_ar.hardware import describe
from st_ar.invariance_config import InvarianceSettings
from st_ar.progress import progress
from st_ar.token_figures import TwoViews, views_figure
from st_ar.tokenizer import Tokenizer, to_pixels
from st_ar.tokenizer.vq import VQTokenizer

FORMAT_VERSION = 1
FILE, TABLE, CURVE, VIEWS = "invariance.json", "invariance.csv", "curve", "views"


def choose_shifts(patches: Sequence[int]) -> list[int]:
    """Shifts from 0 to two tokens of the largest, an eighth of the smallest apart, and every whole token."""
    farthest = 2 * max(patches)
    whole = {pixels for patch in patches for pixels in range(0, farthest + 1, patch)}
    return sorted(whole | set(range(0, farthest + 1, max(1, min(patches) // 8))))


def measure_invariance(
    tokenizers: Mapping[str, Tokenizer], images: str, out: Path, settings: InvarianceSettings
) -> tuple[dict[str, Any], dict[str, Agreement]]:
    """Measure, and write `out`/invariance.csv and .json, then the figures curve.* and views.*.

    Args:
        tokenizers: by the names that they have in table and figures.
        images: an image source, a .npz file or a folder of PNGs.

    Returns:
        What invariance.json holds, and the agreements by name.

    Raises:
        UserError: settings or images that do not suit, or `out` is taken.
    """
    require_absent(out, "a measurement of invariance")
    require_place(out)
    require_matplotlib()
    source = open_pictures(images)
    size = source.size if settings.size is None else settings.size
    patches = [patch_of(tokenizer, size) for tokenizer in tokenizers.values()]
    shifts = sorted(set(settings.shifts)) or [s for s in choose_shifts(patches) if s <= size - max(patches)]
    shown_shift = max(1, min(patches) // 2) if settings.shown_shift is None else settings.shown_shift
    shown = Change(kind="shift", direction="diagonal", amount=shown_shift)
    for patch in patches:
        shown.pairs(size // patch, patch)  # refuses a shift that is too large before anything is done
    factors = sorted(set(settings.factors))
    geometry = Geometry.around(size, [*shifts, shown_shift], factors)
    changes = list_changes(shifts, factors)
    pictures = Pictures(source, num=settings.num, seed=settings.seed)
    kept: list[np.ndarray] = []

    def batches() -> Iterator[np.ndarray]:
        for batch in pictures.batches(geometry.side, settings.batch_size):
            kept.extend(batch[: settings.shown - len(kept)])
            yield batch

    with progress("invariance", pictures.count * len(changes) * len(tokenizers), unit="views") as bar:
        found = measure(tokenizers, batches(), changes, geometry, bar.advance)
    result = {
        "format_version": FORMAT_VERSION,
        "images": {
            "name": source.name,
            "content": source.content,
            "count": pictures.used,
            "drawn": pictures.drawn,
            "skipped": pictures.skipped,
            "enlarged": pictures.enlarged,
            "sha256": pictures.digests.hexdigest(),
        },
        "settings": asdict(settings)
        | {"shifts": shifts, "factors": factors, "shown_shift": shown_shift, **asdict(geometry)},
        "tokenizers": [_describe(name, tokenizers[name], agreement) for name, agreement in found.items()],
        "environment": describe(),
    }
    drawings = {CURVE: _curve(found)}
    if kept:
        drawings[VIEWS] = views_figure(
            {name: two_views(tokenizer, np.stack(kept), shown, geometry) for name, tokenizer in tokenizers.items()},
            titles=("view A", f"view B (+{shown_shift}, +{shown_shift} px)"),
            name=f"two views of an image, {shown_shift} pixels apart each way",
        )
    with folder_aside(out) as folder:
        _write_table(folder / TABLE, result)
        write_json(folder / FILE, result)
        for file, drawing in drawings.items():
            for ending in (".svg", ".png"):
                drawing.save(folder / f"{file}{ending}")
    return result, found


def summarise(agreement: Agreement) -> dict[str, tuple[float, float] | None]:
    """What a table says: label -> mean and standard error; shifts are averaged over what was measured and the directions."""
    patch = agreement.patch
    rows: dict[str, tuple[float, float] | None] = {
        "shifts of whole tokens": agreement.mean(
            lambda c: c.kind == "shift" and c.amount > 0 and c.amount % patch == 0
        ),
        "shifts below a token": agreement.mean(lambda c: c.kind == "shift" and 0 < c.amount < patch),
        "shifts between tokens": agreement.mean(
            lambda c: c.kind == "shift" and c.amount > patch and c.amount % patch > 0
        ),
        "mirror image": agreement.mean(lambda c: c.kind == "flip"),
    }
    for factor in (change.amount for change in agreement.changes if change.kind == "resize"):
        rows[f"resized by {factor:g}"] = agreement.mean(lambda c, f=factor: c.kind == "resize" and c.amount == f)
    return rows


def _describe(name: str, tokenizer: Tokenizer, agreement: Agreement) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for change in agreement.changes:
        mean, error = agreement.mean(lambda c, this=change: c == this) or (None, None)
        tokens = {"tokens": whole_tokens(int(change.amount), agreement.patch)} if change.kind == "shift" else {}
        rows.append(asdict(change) | tokens | {"agreement": mean, "standard_error": error})
    summary = {
        label: dict(zip(("agreement", "standard_error"), m, strict=True))
        for label, m in summarise(agreement).items()
        if m
    }
    about = {"kind": tokenizer.kind, "codes": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    if isinstance(tokenizer, VQTokenizer):
        about |= {"dtype": str(tokenizer.dtype), "device": str(tokenizer.device)}
    return {
        "name": name,
        **about,
        "patch": agreement.patch,
        "chance": agreement.chance,
        "summary": summary,
        "changes": rows,
    }


def _write_table(path: Path, result: dict[str, Any]) -> None:
    """A row for each tokenizer and change, and one for its chance level."""
    header = ["tokenizer", "change", "direction", "amount", "agreement", "standard_error", "images"]
    count, rows = result["images"]["count"], list[list[object]]()
    for each in result["tokenizers"]:
        for row in each["changes"]:
            numbers = (row[key] for key in ("kind", "direction", "amount", "agreement", "standard_error"))
            rows.append([each["name"], *numbers, count])
        rows.append([each["name"], "chance", "", "", each["chance"], "", count])
    write_csv(path, header, rows)


def _curve(found: Mapping[str, Agreement]) -> Drawing:
    """Agreement over the shift: a line for each direction of one tokenizer, or for each of several, averaged over directions."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    shifts: list[float] = []
    for name, agreement in found.items():
        shifts = sorted({change.amount for change in agreement.changes if change.kind == "shift"})
        chance = f"chance {100 * agreement.chance:.2g} %"
        groups = {f"{name} ({chance})": DIRECTIONS} if len(found) > 1 else {way: (way,) for way in DIRECTIONS}
        for label, ways in groups.items():
            means = [agreement.mean(lambda c, s=s, w=ways: c.direction in w and c.amount == s) for s in shifts]
            lines[label] = (shifts, [100 * mean[0] for mean in means if mean])
        if len(found) == 1:
            lines[f"different images ({chance})"] = (shifts, [100 * agreement.chance] * len(shifts))
    whole = max(agreement.patch for agreement in found.values())
    ticks = list(range(0, int(shifts[-1]) + 1, max(1, whole // 2)))
    return line_chart(
        lines, name="token invariance", x="shift (pixels)", y="equal tokens (%)", x_ticks=ticks, legend_above=True
    )


def two_views(tokenizer: Tokenizer, pictures: np.ndarray, change: Change, geometry: Geometry) -> TwoViews:
    """Both views of pictures uint8 [k, side, side, 3], and which of their tokens differ."""
    views = [each.view(pictures, geometry.origin, geometry.size) for each in (IDENTITY, change)]
    a, b = (tokenizer.encode(to_pixels(torch.from_numpy(view))) for view in views)
    rows, columns = change.pairs(a.shape[1], geometry.size // a.shape[1])
    equal = compare(a, b, (rows, columns)).numpy()
    states = np.full((2, *a.shape), np.nan)
    for view in (0, 1):
        states[view][:, rows[view].numpy()[:, None], columns[view].numpy()] = ~equal
    return TwoViews(first=views[0], second=views[1], differ=states)
