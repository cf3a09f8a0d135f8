"""Token invariance (the paper's Fig. 1c): how many of an image's tokens stay when the view of it changes a little.

View A is a square of S pixels cut from a larger picture; view B shows the same picture shifted, mirrored or resized. Tokens at
corresponding places are compared, where there are any in both views. Agreement is the share of them that are equal.

b: images, S: side of a view in pixels, P: side of a token in pixels, g = S / P: tokens per side, T = g^2.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from st_ar.errors import UserError
from st_ar.tokenizer import Tokenizer, to_pixels

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
