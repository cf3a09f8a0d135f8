"""`st-ar invariance`: how many of an image's tokens stay the same when its view changes a little (the paper's Fig. 1c).

View A is a square of S pixels cut from a larger picture. View B shows the same picture shifted, mirrored or resized. Agreement
is the share of equal tokens at corresponding positions that both views have.

b: images, S: side of a view in pixels, P: side of a token in pixels, g = S / P: tokens per side, T = g^2.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from st_ar.config import InvarianceSettings
from st_ar.errors import UserError, require
from st_ar.evaluation.generation.image_sets import Pictures, open_pictures
from st_ar.figures import Drawing, line_chart, views_figure
from st_ar.files import atomic_folder, require_absent, require_place, write_csv, write_json
from st_ar.hardware import describe
from st_ar.progress import progress
from st_ar.report import Chart, Section, Table, provenance, write_report
from st_ar.tokenizer import Tokenizer, to_pixels
from st_ar.tokenizer.vq import VQTokenizer

DIRECTIONS = ("horizontal", "vertical", "diagonal")
Pairs = tuple[Tensor, Tensor]
"""Corresponding positions along one axis: of view A and of view B, int64 [n] each."""


def whole_tokens(shift: int, patch: int) -> int:
    """Return a shift in tokens: 0 below one token, else rounded to the nearest integer, and halves down."""
    return 0 if shift < patch else (2 * shift + patch - 1) // (2 * patch)


def resized(grid: int, factor: float) -> Pairs:
    """Pairs for a resize about the centre: each token of A and the token of B that contains its centre, if it is in view."""
    positions = torch.arange(grid)
    targets = (grid / 2 + factor * (positions.double() + 0.5 - grid / 2)).floor().long()
    visible = (targets >= 0) & (targets < grid)
    return positions[visible], targets[visible]


@dataclass(frozen=True, kw_only=True)
class Change:
    """The change from view A to view B."""

    kind: Literal["shift", "flip", "resize"]
    direction: str = ""
    """Direction of a shift: horizontal (B is further right), vertical (further down) or diagonal (both)."""
    amount: float = 0
    """Pixels of a shift, or factor of a resize; above 1 enlarges."""

    @property
    def offset(self) -> tuple[int, int]:
        """Offset in pixels of view B's corner from view A's: down, right."""
        pixels = int(self.amount) if self.kind == "shift" else 0
        return pixels * (self.direction != "horizontal"), pixels * (self.direction != "vertical")

    def view(self, pictures: np.ndarray, origin: int, size: int) -> np.ndarray:
        """Cut view B from pictures whose view A begins at (origin, origin): uint8 [b, side, side, 3] -> [b, S, S, 3].

        A resized view is the central S / factor pixels of A, resized bicubically.
        """
        if self.kind == "resize":
            side, extent = pictures.shape[1], size / self.amount
            start = max(0.0, origin + (size - extent) / 2)
            end = min(float(side), start + extent)
            box = (start, start, end, end)
            images = (Image.fromarray(picture) for picture in pictures)
            return np.stack([np.asarray(i.resize((size, size), Image.Resampling.BICUBIC, box=box)) for i in images])
        top, left = (origin + pixels for pixels in self.offset)
        crop = pictures[:, top : top + size, left : left + size]
        return (crop[:, :, ::-1] if self.kind == "flip" else crop).copy()

    def pairs(self, grid: int, patch: int) -> tuple[Pairs, Pairs]:
        """Return the pairs of corresponding tokens along rows and along columns."""
        if self.kind == "resize":
            return resized(grid, self.amount), resized(grid, self.amount)
        if whole_tokens(max(self.offset), patch) >= grid:
            raise UserError(
                f"a shift of {max(self.offset)} pixels leaves nothing to compare in views of {grid * patch} pixels with tokens "
                f"of {patch}: shift by at most {(grid - 1) * patch}, or choose a larger --size"
            )
        shifts = (whole_tokens(pixels, patch) for pixels in self.offset)
        rows, columns = ((torch.arange(shift, grid), torch.arange(grid - shift)) for shift in shifts)
        return rows, (columns[0], columns[1].flip(0)) if self.kind == "flip" else columns


IDENTITY = Change(kind="shift", direction="horizontal")


def list_changes(shifts: Sequence[int], factors: Sequence[float]) -> list[Change]:
    """Return every shift in the three directions, the mirror image, and every resize."""
    moved = [Change(kind="shift", direction=d, amount=pixels) for d in DIRECTIONS for pixels in shifts]
    return [*moved, Change(kind="flip"), *(Change(kind="resize", amount=factor) for factor in factors)]


def compare(a: Tensor, b: Tensor, pairs: tuple[Pairs, Pairs]) -> Tensor:
    """Return whether the paired tokens of codes [b, g, g] are equal: bool [b, n, m]."""
    (rows_a, rows_b), (columns_a, columns_b) = pairs
    return a[:, rows_a][:, :, columns_a] == b[:, rows_b][:, :, columns_b]


def chance_level(codes: np.ndarray) -> float:
    """Return the share of equal tokens at one position of two different images, over all pairs of images: codes [N, T], N > 1."""
    count = len(codes)
    equal = 0
    for column in codes.T:
        _, times = np.unique(column, return_counts=True)
        equal += int((times * (times - 1)).sum())
    return equal / (codes.shape[1] * count * (count - 1))


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sides of a view and of a picture, and the position of view A, in pixels."""

    size: int
    origin: int
    """Distance of view A from the top and from the left."""
    side: int

    @classmethod
    def around(cls, size: int, shifts: Sequence[int], factors: Sequence[float]) -> "Geometry":
        """Return the smallest picture that contains all views."""
        origin = math.ceil(size * (1 / min([1.0, *factors]) - 1) / 2)
        return cls(size=size, origin=origin, side=origin + size + max(origin, *shifts, 0))


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The agreement of one tokenizer's tokens."""

    patch: int
    """Side of a token in pixels, P."""
    changes: Sequence[Change]
    shares: np.ndarray
    """Share of equal tokens of each image under each change: float64 [N, changes]."""
    codes: np.ndarray
    """Tokens of view A: int32 [N, T]."""

    @cached_property
    def chance(self) -> float:
        """Agreement of different images."""
        return chance_level(self.codes)

    def mean(self, condition: Callable[[Change], bool]) -> tuple[float, float] | None:
        """Return the mean over changes that meet a condition, and its standard error over images; None without such changes."""
        columns = [index for index, change in enumerate(self.changes) if condition(change)]
        if not columns:
            return None
        by_image = self.shares[:, columns].mean(1)
        return float(by_image.mean()), float(by_image.std(ddof=1) / math.sqrt(len(by_image)))


def _patch(tokenizer: Tokenizer, size: int) -> int:
    return size // tokenizer.grid(size)


@torch.no_grad()
def measure(
    tokenizers: Mapping[str, Tokenizer],
    pictures: Iterable[np.ndarray],
    changes: Sequence[Change],
    geometry: Geometry,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Agreement]:
    """Encode both views of every picture with every tokenizer.

    Args:
        pictures: batches uint8 [b, side, side, 3].
        advance: called with the number of views that are done.
    """
    size, origin = geometry.size, geometry.origin
    patches = {name: _patch(tokenizer, size) for name, tokenizer in tokenizers.items()}
    pairs = {name: [change.pairs(size // patch, patch) for change in changes] for name, patch in patches.items()}
    shares: dict[str, list[list[Tensor]]] = {name: [[] for _ in changes] for name in tokenizers}
    codes: dict[str, list[Tensor]] = {name: [] for name in tokenizers}
    for batch in pictures:
        view_a = to_pixels(torch.from_numpy(IDENTITY.view(batch, origin, size)))
        codes_a = {name: tokenizer.encode(view_a) for name, tokenizer in tokenizers.items()}
        for name in tokenizers:
            codes[name].append(codes_a[name].flatten(1).int())
        for number, change in enumerate(changes):
            view_b = to_pixels(torch.from_numpy(change.view(batch, origin, size)))
            for name, tokenizer in tokenizers.items():
                equal = compare(codes_a[name], tokenizer.encode(view_b), pairs[name][number])
                shares[name][number].append(equal.double().mean((1, 2)))
            advance(len(batch) * len(tokenizers))
    if sum(map(len, codes[next(iter(tokenizers))])) < 2:
        raise UserError("fewer than 2 images are usable: give more images")
    return {
        name: Agreement(
            patch=patches[name],
            changes=changes,
            shares=torch.stack([torch.cat(by_batch) for by_batch in shares[name]], 1).numpy(),
            codes=torch.cat(codes[name]).numpy(),
        )
        for name in tokenizers
    }


FORMAT_VERSION = 1


def choose_shifts(patches: Sequence[int]) -> list[int]:
    """Return shifts up to two of the largest tokens: every whole token, and steps of an eighth of the smallest token."""
    largest = 2 * max(patches)
    whole = {pixels for patch in patches for pixels in range(0, largest + 1, patch)}
    return sorted(whole | set(range(0, largest + 1, max(1, min(patches) // 8))))


def measure_invariance(
    tokenizers: Mapping[str, Tokenizer], images: str, out: Path, settings: InvarianceSettings
) -> tuple[dict[str, Any], dict[str, Agreement], dict[str, Drawing]]:
    """Measure token invariance and write invariance.csv, invariance.json and the figures curve.* and views.* to `out`.

    Args:
        tokenizers: by their names in the table and figures.
        images: an image source, a .npz file or a folder of PNGs.

    Returns:
        The content of invariance.json, the agreements by name, and the figures: curve, and views if there are any to show.

    Raises:
        UserError: invalid settings or images, or `out` exists.
    """
    require_absent(out, "a measurement of invariance")
    require_place(out)
    require("matplotlib")
    source = open_pictures(images)
    size = source.size if settings.size is None else settings.size
    patches = [_patch(tokenizer, size) for tokenizer in tokenizers.values()]
    shifts = sorted(set(settings.shifts)) or [s for s in choose_shifts(patches) if s <= size - max(patches)]
    shown_shift = max(1, min(patches) // 2) if settings.shown_shift is None else settings.shown_shift
    shown = Change(kind="shift", direction="diagonal", amount=shown_shift)
    for patch in patches:
        shown.pairs(size // patch, patch)  # refuses a shift that is too large before the work
    factors = sorted(set(settings.factors))
    geometry = Geometry.around(size, [*shifts, shown_shift], factors)
    changes = list_changes(shifts, factors)
    pictures = Pictures(source, num=settings.num, seed=settings.seed, max_skipped=settings.max_skipped)
    shown_pictures: list[np.ndarray] = []

    def batches() -> Iterator[np.ndarray]:
        for batch in pictures.batches(geometry.side, settings.batch_size):
            shown_pictures.extend(batch[: settings.shown - len(shown_pictures)])
            yield batch

    with progress("invariance", pictures.count * len(changes) * len(tokenizers), unit="views") as bar:
        agreements = measure(tokenizers, batches(), changes, geometry, bar.advance)
    notes = [*source.notes, *pictures.skipped.finish(pictures.used)]
    result = {
        "format_version": FORMAT_VERSION,
        "images": {
            "name": source.name,
            "content": source.content,
            "count": pictures.used,
            "drawn": pictures.random,
            **pictures.skipped.describe(),
            "enlarged": pictures.enlarged,
            "sha256": pictures.digests.hexdigest(),
        },
        "settings": asdict(settings)
        | {"shifts": shifts, "factors": factors, "shown_shift": shown_shift, **asdict(geometry)},
        "tokenizers": [_describe(name, tokenizers[name], agreement) for name, agreement in agreements.items()],
        "notes": notes,
        "environment": describe(),
    }
    drawings = {"curve": _curve(agreements)}
    if shown_pictures:
        stack = np.stack(shown_pictures)
        drawings["views"] = views_figure(
            np.stack([change.view(stack, geometry.origin, size) for change in (IDENTITY, shown)]),
            {name: mark_differences(tokenizer, stack, shown, geometry) for name, tokenizer in tokenizers.items()},
            titles=("view A", f"view B (+{shown_shift}, +{shown_shift} px)"),
            name=f"two views of an image, {shown_shift} pixels apart each way",
        )
    with atomic_folder(out) as folder:
        _write_table(folder / "invariance.csv", result)
        write_json(folder / "invariance.json", result)
        for file, drawing in drawings.items():
            for suffix in (".svg", ".png"):
                drawing.save(folder / f"{file}{suffix}")
    return result, agreements, drawings


def summarise(agreement: Agreement) -> dict[str, tuple[float, float] | None]:
    """Return the rows of the table, label -> mean and standard error, averaged over shifts and directions."""
    patch = agreement.patch

    def shifts(condition: Callable[[float], bool]) -> tuple[float, float] | None:
        return agreement.mean(lambda c: c.kind == "shift" and condition(c.amount))

    rows = {
        "shifts of whole tokens": shifts(lambda pixels: pixels > 0 and pixels % patch == 0),
        "shifts below a token": shifts(lambda pixels: 0 < pixels < patch),
        "shifts between tokens": shifts(lambda pixels: pixels > patch and pixels % patch > 0),
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
    summary = {label: {"agreement": m[0], "standard_error": m[1]} for label, m in summarise(agreement).items() if m}
    identity = {"kind": tokenizer.kind, "codes": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    if isinstance(tokenizer, VQTokenizer):
        identity |= {"dtype": str(tokenizer.dtype), "device": str(tokenizer.device)}
    return {
        "name": name,
        **identity,
        "patch": agreement.patch,
        "chance": agreement.chance,
        "summary": summary,
        "changes": rows,
    }


def _write_table(path: Path, result: dict[str, Any]) -> None:
    """Write a row for each tokenizer and change, and one for each tokenizer's chance level."""
    header = ["tokenizer", "change", "direction", "amount", "agreement", "standard_error", "images"]
    count, rows = result["images"]["count"], list[list[object]]()
    for each in result["tokenizers"]:
        for row in each["changes"]:
            numbers = (row[key] for key in ("kind", "direction", "amount", "agreement", "standard_error"))
            rows.append([each["name"], *numbers, count])
        rows.append([each["name"], "chance", "", "", each["chance"], "", count])
    write_csv(path, header, rows)


def _curve(agreements: Mapping[str, Agreement]) -> Drawing:
    """Draw agreement over the shift: a line per direction of a single tokenizer, else a line per tokenizer."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    shifts: list[float] = []
    single = len(agreements) == 1
    for name, agreement in agreements.items():
        shifts = sorted({change.amount for change in agreement.changes if change.kind == "shift"})
        chance = f"chance {100 * agreement.chance:.2g} %"
        groups = {d: (d,) for d in DIRECTIONS} if single else {f"{name} ({chance})": DIRECTIONS}
        for label, directions in groups.items():
            means = [agreement.mean(lambda c, s=s, d=directions: c.direction in d and c.amount == s) for s in shifts]
            lines[label] = (shifts, [100 * mean[0] for mean in means if mean])
        if single:
            lines[f"different images ({chance})"] = (shifts, [100 * agreement.chance] * len(shifts))
    whole = max(agreement.patch for agreement in agreements.values())
    ticks = list(range(0, int(shifts[-1]) + 1, max(1, whole // 2)))
    return line_chart(
        lines, name="token invariance", x="shift (pixels)", y="equal tokens (%)", x_ticks=ticks, label_ends=True
    )


def mark_differences(tokenizer: Tokenizer, pictures: np.ndarray, change: Change, geometry: Geometry) -> np.ndarray:
    """Return which tokens of the views of pictures uint8 [k, side, side, 3] differ: [2, k, g, g], as for `views_figure`."""
    views = [each.view(pictures, geometry.origin, geometry.size) for each in (IDENTITY, change)]
    a, b = (tokenizer.encode(to_pixels(torch.from_numpy(view))) for view in views)
    pairs = change.pairs(a.shape[1], geometry.size // a.shape[1])
    equal = compare(a, b, pairs).numpy()
    states = np.full((2, *a.shape), np.nan)
    for state, rows, columns in zip(states, *pairs, strict=True):
        state[:, rows.numpy()[:, None], columns.numpy()] = ~equal
    return states


def invariance_page(
    path: Path,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    result: dict[str, Any],
    drawings: Mapping[str, Drawing],
) -> None:
    """Write the HTML report of `st-ar invariance`."""
    captions = {"curve": "Equal tokens over the shift.", "views": "Two views; tokens that differ are marked."}
    figures = [Chart(svg=drawing.svg(), caption=captions[name]) for name, drawing in drawings.items()]
    sections = [
        Section(title="Equal tokens", parts=[Table(columns=header, rows=rows), *figures]),
        provenance(result, ["images", "settings", "environment"]),
    ]
    images = result["images"]
    lead = f"The share of tokens that stay when an image's view changes, over {images['count']:,} images of {images['name']}."
    write_report(path, title="Token invariance", lead=lead, sections=sections)
