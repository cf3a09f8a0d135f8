"""Token invariance (the paper's Fig. 1c): how many of an image's tokens stay when the view of it changes a little.

View A is a square of S pixels cut from a larger picture; view B shows the same picture shifted, mirrored or resized. Tokens at
corresponding places are compared, where there are any in both views. Agreement is the share of them that are equal.

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
from st_ar.figures import Drawing, TwoViews, embedded, line_chart, views_figure
from st_ar.files import atomic_folder, require_absent, require_place, write_csv, write_json
from st_ar.hardware import describe
from st_ar.progress import progress
from st_ar.report import Chart, Section, Table, identified, write_report
from st_ar.tokenizer import Tokenizer, to_pixels
from st_ar.tokenizer.vq import VQTokenizer

DIRECTIONS = ("horizontal", "vertical", "diagonal")
Pairs = tuple[Tensor, Tensor]
"""Along one axis, the places of tokens of view A and of the tokens of view B that they are compared with: int64 [n] each."""


def whole_tokens(shift: int, patch: int) -> int:
    """How many tokens a shift of so many pixels counts as.

    None below one token: the same places of the grid are compared. From one token on the nearest number, and of two that are
    equally near the smaller.
    """
    return 0 if shift < patch else (2 * shift + patch - 1) // (2 * patch)


def shifted(grid: int, tokens: int) -> Pairs:
    """Pairs of a view that lies so many tokens further on: token i of A is token i - tokens of B."""
    return torch.arange(tokens, grid), torch.arange(grid - tokens)


def mirrored(grid: int) -> Pairs:
    """Pairs of a mirrored view."""
    return torch.arange(grid), torch.arange(grid).flip(0)


def resized(grid: int, factor: float) -> Pairs:
    """Pairs of a view resized about its centre.

    Each token of A goes with the token of B whose centre is nearest to where its own has gone (of two that are equally near
    the later one), if that lies in view.
    """
    places = torch.arange(grid)
    centres = grid / 2 + factor * (places.double() + 0.5 - grid / 2)
    found = centres.floor().long()
    seen = (found >= 0) & (found < grid)
    return places[seen], found[seen]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What view B does to view A."""

    kind: Literal["shift", "flip", "resize"]
    direction: str = ""
    """Of a shift: horizontal (B lies further right), vertical (further down) or diagonal (both)."""
    amount: float = 0
    """Pixels of a shift, or the factor by which a resize enlarges what is seen."""

    @property
    def offset(self) -> tuple[int, int]:
        """Of view B's corner from A's, in pixels: down, right."""
        pixels = int(self.amount) if self.kind == "shift" else 0
        return pixels * (self.direction != "horizontal"), pixels * (self.direction != "vertical")

    def view(self, pictures: np.ndarray, origin: int, size: int) -> np.ndarray:
        """View B of pictures whose view A has its corner at (origin, origin): uint8 [b, side, side, 3] -> [b, S, S, 3].

        A resized view is cut from the picture at S / factor pixels about the centre of A and resized to S bicubically.
        """
        if self.kind == "resize":
            side, reach = pictures.shape[1], size / self.amount
            start = max(0.0, origin + (size - reach) / 2)
            end = min(float(side), start + reach)
            box = (start, start, end, end)
            images = (Image.fromarray(picture) for picture in pictures)
            return np.stack([np.asarray(i.resize((size, size), Image.Resampling.BICUBIC, box=box)) for i in images])
        top, left = (origin + pixels for pixels in self.offset)
        cut = pictures[:, top : top + size, left : left + size]
        return (cut[:, :, ::-1] if self.kind == "flip" else cut).copy()

    def pairs(self, grid: int, patch: int) -> tuple[Pairs, Pairs]:
        """Which tokens are compared, along the rows' axis and along the columns'.

        Raises:
            UserError: a shift that leaves none.
        """
        if self.kind == "resize":
            return resized(grid, self.amount), resized(grid, self.amount)
        if whole_tokens(max(self.offset), patch) >= grid:
            raise UserError(
                f"a shift of {max(self.offset)} pixels leaves nothing to compare in views of {grid * patch} pixels with tokens "
                f"of {patch}: shift by at most {(grid - 1) * patch}, or choose a larger --size"
            )
        rows, columns = (shifted(grid, whole_tokens(pixels, patch)) for pixels in self.offset)
        return rows, mirrored(grid) if self.kind == "flip" else columns


IDENTITY = Change(kind="shift", direction="horizontal")


def list_changes(shifts: Sequence[int], factors: Sequence[float]) -> list[Change]:
    """Every shift in the three directions, the mirror image, every resize."""
    moved = [Change(kind="shift", direction=d, amount=pixels) for d in DIRECTIONS for pixels in shifts]
    return [*moved, Change(kind="flip"), *(Change(kind="resize", amount=factor) for factor in factors)]


def compare(a: Tensor, b: Tensor, pairs: tuple[Pairs, Pairs]) -> Tensor:
    """Whether compared tokens of codes [b, g, g] are equal: bool [b, n, m]."""
    (rows_a, rows_b), (columns_a, columns_b) = pairs
    return a[:, rows_a][:, :, columns_a] == b[:, rows_b][:, :, columns_b]


def chance_level(codes: np.ndarray) -> float:
    """Share of equal tokens at the same place of two different images, over all pairs of images: codes [N, T], N > 1."""
    count = len(codes)
    equal = 0
    for column in codes.T:
        _, times = np.unique(column, return_counts=True)
        equal += int((times * (times - 1)).sum())
    return equal / (codes.shape[1] * count * (count - 1))


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where the views lie in a picture; all in pixels."""

    size: int
    """Side of a view."""
    origin: int
    """Of view A, from the top and from the left."""
    side: int
    """Of the picture."""

    @classmethod
    def around(cls, size: int, shifts: Sequence[int], factors: Sequence[float]) -> "Geometry":
        """The smallest picture that all views fit in."""
        least = min([1.0, *factors])
        origin = math.ceil(size * (1 / least - 1) / 2)
        return cls(size=size, origin=origin, side=origin + size + max(origin, *shifts, 0))


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What one tokenizer's tokens did."""

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

    def mean(self, chosen: Callable[[Change], bool]) -> tuple[float, float] | None:
        """Mean of some changes, and its standard error over the images; None if there is no such change."""
        wanted = [place for place, change in enumerate(self.changes) if chosen(change)]
        if not wanted:
            return None
        each = self.shares[:, wanted].mean(1)
        return float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each)))


def patch_of(tokenizer: Tokenizer, size: int) -> int:
    """Side in pixels of a token of images of `size` pixels; an error if they do not fit."""
    return size // tokenizer.grid(size)


@torch.no_grad()
def measure(
    tokenizers: Mapping[str, Tokenizer],
    pictures: Iterable[np.ndarray],
    changes: Sequence[Change],
    geometry: Geometry,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Agreement]:
    """Encode both views of every picture with every tokenizer; one batch of one view is in memory at once.

    Args:
        pictures: batches uint8 [b, side, side, 3].
        advance: told how many views are done.

    Raises:
        UserError: views that do not suit a tokenizer, a shift that leaves nothing to compare, or fewer than two pictures.
    """
    size, origin = geometry.size, geometry.origin
    patches = {name: patch_of(tokenizer, size) for name, tokenizer in tokenizers.items()}
    pairs = {name: [change.pairs(size // patch, patch) for change in changes] for name, patch in patches.items()}
    shares: dict[str, list[Tensor]] = {name: [] for name in tokenizers}
    codes: dict[str, list[Tensor]] = {name: [] for name in tokenizers}
    for batch in pictures:
        first = to_pixels(torch.from_numpy(IDENTITY.view(batch, origin, size)))
        at_first = {name: tokenizer.encode(first) for name, tokenizer in tokenizers.items()}
        found: dict[str, list[Tensor]] = {name: [] for name in tokenizers}
        for number, change in enumerate(changes):
            second = to_pixels(torch.from_numpy(change.view(batch, origin, size)))
            for name, tokenizer in tokenizers.items():
                equal = compare(at_first[name], tokenizer.encode(second), pairs[name][number])
                found[name].append(equal.double().mean((1, 2)))
            advance(len(batch) * len(tokenizers))
        for name in tokenizers:
            shares[name].append(torch.stack(found[name], 1))
            codes[name].append(at_first[name].flatten(1).int())
    if sum(map(len, shares[next(iter(tokenizers))])) < 2:
        raise UserError("fewer than 2 images can be used: agreement is a mean over images, give more of them")
    return {
        name: Agreement(
            patch=patches[name],
            changes=changes,
            shares=torch.cat(shares[name]).numpy(),
            codes=torch.cat(codes[name]).numpy(),
        )
        for name in tokenizers
    }


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
    require("matplotlib")
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
            "drawn": pictures.random,
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
    with atomic_folder(out) as folder:
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
        identified(result, ["images", "settings", "environment"]),
    ]
    about = result["images"]
    lead = f"The share of tokens that stay when the view of an image changes; {about['count']:,} images of {about['name']}."
    write_report(path, title="Token invariance", lead=lead, sections=sections)
