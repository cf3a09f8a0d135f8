"""Attention and entropy drawn over pictures, as pixels that can be clicked on."""

import numpy as np
from PIL import Image

from st_ar.demo.understanding import Reading
from st_ar.figures import require_matplotlib

SIDE = 512
"""Pixels of a picture's side at least, so that tokens can be hit."""
TARGET, NEWEST = (0, 208, 255), (255, 255, 255)
"""Colours of frames: of the token that is predicted, and of the last that was read."""
RIM = 2
"""Pixels around a small map: a page may show it smaller."""
VEIL = 0.65
"""How much of the heat covers the picture."""


def enlarge(picture: np.ndarray, grid: int) -> np.ndarray:
    """A picture uint8 [S, S, 3] at a side of at least SIDE that is a multiple of the grid, its pixels kept sharp."""
    side = _side(grid)
    kind = Image.Resampling.NEAREST if picture.shape[0] <= side else Image.Resampling.BOX
    return np.asarray(Image.fromarray(picture).resize((side, side), kind))


def _side(grid: int) -> int:
    return -(-SIDE // grid) * grid


def token_at(x: int, y: int, grid: int) -> int:
    """Which token of the enlarged picture lies at this pixel; the nearest one, of a pixel outside."""
    cell = _side(grid) // grid
    column, row = (min(max(int(place) // cell, 0), grid - 1) for place in (x, y))
    return row * grid + column


def head_at(x: int, y: int, grid: int, heads: int) -> tuple[int, int]:
    """Which layer and head of `heads_overview`, counted from 1, lie at this pixel."""
    cell = _cell(grid, heads) + 2 * RIM
    return int(y) // cell + 1, int(x) // cell + 1


def marked(picture: np.ndarray, grid: int, token: int) -> np.ndarray:
    """The enlarged picture, a token framed."""
    return _framed(enlarge(picture, grid), grid, token, TARGET)


def attention_map(picture: np.ndarray, weights: np.ndarray, grid: int, token: int) -> np.ndarray:
    """What the step that predicts a token looks at: the past as heat over the grey picture, the future blank (transparent).

    Args:
        picture: uint8 [S, S, 3].
        weights: [T], key 0 is the class and key 1 + s token s; scaled to the largest weight on a token.

    Returns:
        uint8 [side, side, 4].
    """
    grey = np.repeat(enlarge(picture, grid).mean(-1, keepdims=True), 3, -1)
    past = weights[1 : token + 1].astype(np.float32)
    share = np.zeros(grid * grid, np.float32)
    share[:token] = past / max(float(past.max(initial=0.0)), 1e-12)
    heat = _over(grey, share, grid, "inferno")
    read = _blocks((np.arange(grid * grid) < token).astype(np.uint8) * 255, grid)
    if token > 0:
        heat = _framed(heat, grid, token - 1, NEWEST)
        newest = _blocks((np.arange(grid * grid) == token - 1).astype(np.uint8), grid)
        read = np.maximum(read, newest * 255)
    framed = _framed(heat, grid, token, TARGET)
    alpha = np.where((framed != heat).any(-1), 255, read)
    return np.dstack([framed, alpha.astype(np.uint8)])


def entropy_map(picture: np.ndarray, entropy: np.ndarray, grid: int, token: int) -> np.ndarray:
    """How unsure the model was of each token: entropy [T] over the grey picture, from its least to its most, a token framed."""
    grey = np.repeat(enlarge(picture, grid).mean(-1, keepdims=True), 3, -1)
    least, most = float(entropy.min()), float(entropy.max())
    share = (entropy - least) / max(most - least, 1e-12)
    return _framed(_over(grey, share.astype(np.float32), grid, "viridis"), grid, token, TARGET)


def heads_overview(reading: Reading, grid: int, token: int, chosen: tuple[int, int | None]) -> np.ndarray:
    """Small maps of all heads (columns) of all layers (rows) at one step, each on its own scale; the chosen are framed.

    chosen: layer and head, counted from 1; None for all heads.
    """
    layers, heads = reading.attention.shape[:2]
    cell, colours = _cell(grid, heads), _colours("inferno")
    pitch = cell + 2 * RIM
    canvas = np.full((layers * pitch, heads * pitch, 3), 128, np.uint8)
    for layer in range(layers):
        for head in range(heads):
            past = reading.attention[layer, head, token, 1 : token + 1].astype(np.float32)
            share = np.zeros(grid * grid, np.float32)
            share[:token] = past / max(float(past.max(initial=0.0)), 1e-12)
            small = np.repeat(np.repeat(share.reshape(grid, grid), cell // grid, 0), cell // grid, 1)
            top, left = layer * pitch, head * pitch
            if layer + 1 == chosen[0] and chosen[1] in (None, head + 1):
                canvas[top : top + pitch, left : left + pitch] = TARGET
            canvas[top + RIM : top + RIM + cell, left + RIM : left + RIM + cell] = colours[
                (small * 255).astype(np.uint8)
            ]
    return canvas


def _cell(grid: int, heads: int) -> int:
    """Pixels of a small map's side, so that all heads of a layer are about as wide as the picture."""
    return max(1, SIDE // (heads * grid), -(-32 // grid)) * grid


def _colours(name: str) -> np.ndarray:
    """A colour map as uint8 [256, 3]."""
    colours = require_matplotlib().colormaps[name](np.arange(256))
    return (np.asarray(colours)[:, :3] * 255).astype(np.uint8)


def _blocks(values: np.ndarray, grid: int) -> np.ndarray:
    """Values [T] of tokens at each pixel of the enlarged picture."""
    cell = _side(grid) // grid
    return values.reshape(grid, grid).repeat(cell, 0).repeat(cell, 1)


def _over(grey: np.ndarray, share: np.ndarray, grid: int, name: str) -> np.ndarray:
    heat = _colours(name)[(_blocks(share, grid).clip(0, 1) * 255).astype(np.uint8)]
    return (VEIL * heat + (1 - VEIL) * grey).astype(np.uint8)


def _framed(picture: np.ndarray, grid: int, token: int, colour: tuple[int, int, int]) -> np.ndarray:
    cell, out = _side(grid) // grid, picture.copy()
    row, column = divmod(token, grid)
    width = max(2, cell // 16)
    top, left = row * cell, column * cell
    inside = out[top + width : top + cell - width, left + width : left + cell - width].copy()
    out[top : top + cell, left : left + cell] = colour
    out[top + width : top + cell - width, left + width : left + cell - width] = inside
    return out
