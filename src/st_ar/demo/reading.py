"""What a model does as it reads one image: where each step looks, how sure it is of the next token, and what a probe guesses."""

import hashlib
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from st_ar.data.store import TokenStore
from st_ar.demo.inputs import whole
from st_ar.demo.models import LoadedModel
from st_ar.errors import UserError, require
from st_ar.evaluation.attention import weights_by_layer
from st_ar.evaluation.probe_classifiers import ShallowClassifiers
from st_ar.evaluation.probe_features import read_features, uniform_steps
from st_ar.randomness import RandomStream, numpy_generator

KEPT = 4
"""Readings that are kept, so that clicks on one image are answered at once."""
STEPS = 8
"""At which a probe guesses, uniformly spaced, the last being the last token's."""
AT_ONCE = 32
"""Images in the network at once."""


OWN, NONE = -2, -1
"""Choices of the class that a model is given, beside the classes' numbers: the image's own (none, if it is not known), and none."""


def label_given(choice: Any, own: int | None, null: int, *, knows_none: bool) -> int:
    """The label that a choice stands for, `own` being the image's class and `null` the null class.

    Raises:
        UserError: no such class, or none of a model that has never been trained without one.
    """
    label = whole(choice, "the class", OWN, null - 1)
    if label == OWN:
        label = NONE if own is None else own
    if label == NONE and not knows_none:
        raise UserError(
            "this model was trained with --class-dropout 0 and knows no null class: choose a class to read with"
        )
    return null if label == NONE else label


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One pass of a network over an image of T tokens, given its class or none."""

    attention: np.ndarray
    """float16 [layers, heads, T, T]: row t predicts token t; key 0 is the class, key 1 + s token s."""
    entropy: np.ndarray
    """float32 [T]: of the distribution of each token, in nats."""
    chance: np.ndarray
    """float32 [T]: of the image's own tokens."""
    rank: np.ndarray
    """int64 [T]: how many tokens were likelier than the image's own."""


class Readings:
    """The last readings, by weights, image and class."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[str, str, int], Reading] = OrderedDict()

    def read(self, opened: LoadedModel, tokens: Tensor, label: int) -> Reading:
        """Read an image's tokens int64 [T]; `label` is its class, or the null class. Call it in the models' thread."""
        key = opened.weights.name, hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), label
        found = self.kept.pop(key, None)
        self.kept[key] = _read(opened, tokens, label) if found is None else found
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return self.kept[key]


@torch.no_grad()
def _read(opened: LoadedModel, tokens: Tensor, label: int) -> Reading:
    network, config = opened.network, opened.weights.config
    if tokens.shape != (config.sequence_length,) or int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise UserError(
            f"{opened.weights.name} reads {config.sequence_length} tokens of {config.vocab_size} codes, and the image is another: "
            "take an image of this model's tokenizer and size"
        )
    device = network.output.weight.device
    batch, labels = tokens[None].to(device), torch.tensor([label], device=device)
    network.cls_embedding.check(labels)
    layers = range(1, config.n_layers + 1)
    maps = [
        weights[0].half().cpu().numpy()
        for _, weights in weights_by_layer(network, batch[:, :-1], labels, layers=layers)
    ]
    likelihood = network(batch[:, :-1], labels).logits[0].float().log_softmax(-1)  # (T, V)
    own = likelihood.gather(1, batch[0, :, None])
    return Reading(
        attention=np.stack(maps),
        entropy=-(likelihood.exp() * likelihood).nan_to_num(0.0).sum(-1).cpu().numpy(),
        chance=own[:, 0].exp().cpu().numpy(),
        rank=(likelihood > own).sum(-1).cpu().numpy(),
    )


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """How far a probe is fitted; when it is, what it takes an image for as it is read."""

    read: int
    """Images that the probe has read to be fitted on."""
    total: int
    layer: int
    by_step: tuple[tuple[int, tuple[str, ...]], ...] = ()
    """(tokens read, the likeliest classes' names, the best first)."""


class Guesser:
    """The quick probe: ridge regression (closed form, not the MAE protocol) on half-depth features at some steps, no class given.

    `st-ar probe` keeps accuracies and no classifiers, so that this one is fitted when it is first asked.

    Args:
        store: of whose images, centre crops, up to `images` are what it is fitted on.

    Raises:
        UserError: scikit-learn is missing, a store of other tokens or without classes, or a model that knows no null class.
    """

    def __init__(self, opened: LoadedModel, store: TokenStore, images: int) -> None:
        config = opened.weights.config
        require("sklearn")
        store.check_model(config, opened.info.tokenizer)
        if len(np.unique(store.labels)) < 2:
            raise UserError(f"{store.folder} has images of one class alone: a probe has nothing to tell apart")
        if not opened.weights.knows_no_class:
            raise UserError(
                f"{opened.weights.name} was trained with --class-dropout 0 and knows no null class, which a probe reads with"
            )
        self.opened, self.store = opened, store
        self.layer = max(1, config.n_layers // 2)
        self.steps = uniform_steps(config.sequence_length, min(STEPS, config.sequence_length))
        self.images = np.sort(numpy_generator(0, RandomStream.PROBE).permutation(len(store))[:images])
        self.classify: ShallowClassifiers | None = None

    def guess(self, tokens: Tensor, count: int = 3) -> Generator[Guesses, None, None]:
        """What an image's tokens [T] are taken for, after the probe is fitted if it is not. To be used in the models' thread."""
        if self.classify is None:
            yield from self._fit()
        assert self.classify is not None
        names = self.store.meta.class_names
        scores = self.classify(self._features(tokens[None]))[0]  # (S, C)
        best = scores.topk(min(count, scores.shape[1])).indices.tolist()
        by_step = tuple((step - 1, tuple(names[c] for c in some)) for step, some in zip(self.steps, best, strict=True))
        yield self._sofar(len(self.images), by_step)

    def _sofar(self, read: int, by_step: tuple[tuple[int, tuple[str, ...]], ...] = ()) -> Guesses:
        return Guesses(read=read, total=len(self.images), layer=self.layer, by_step=by_step)

    def _fit(self) -> Generator[Guesses, None, None]:
        rows: list[np.ndarray] = []
        for start in range(0, len(self.images), AT_ONCE):
            yield self._sofar(start)
            some = self.images[start : start + AT_ONCE]
            codes = self.store.center_codes(some).astype(np.int64)
            rows.append(self._features(torch.from_numpy(codes)).numpy())
        labels, classes = torch.from_numpy(self.store.labels[self.images]), len(self.store.meta.class_names)
        self.classify = ShallowClassifiers(np.concatenate(rows), labels, classes, "ridge", 1.0, mean_over_steps=False)

    def _features(self, tokens: Tensor) -> Tensor:
        """Tokens [n, T] -> float32 [n, S, D], on the host."""
        return read_features(self.opened.network, tokens, [self.layer], self.steps)[self.layer]


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
    colours = require("matplotlib").colormaps[name](np.arange(256))
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
