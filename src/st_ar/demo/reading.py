"""How a model reads one image: attention, the distribution of each next token, and a probe's predictions, with their pictures."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from st_ar.data.store import TokenStore
from st_ar.demo.inputs import check_int
from st_ar.demo.models import LoadedModel
from st_ar.errors import UserError, require
from st_ar.evaluation.attention import weights_by_layer
from st_ar.evaluation.probe_classifiers import ShallowClassifiers
from st_ar.evaluation.probe_features import read_features, uniform_steps
from st_ar.randomness import RandomStream, numpy_generator

PROBE_STEPS = 8
"""Number of uniformly spaced steps at which a probe predicts, the last token included."""
BATCH_SIZE = 32

OWN_CLASS, NO_CLASS = -2, -1
"""Special choices of the class given to the model: the image's own class (none if it is unknown), and no class."""


def choose_label(choice: Any, own: int | None, null: int, *, has_null_class: bool) -> int:
    """Return the label for a choice, where `own` is the image's class and `null` the null class; UserError if there is none."""
    label = check_int(choice, "the class", OWN_CLASS, null - 1)
    if label == OWN_CLASS:
        label = NO_CLASS if own is None else own
    if label == NO_CLASS and not has_null_class:
        raise UserError(
            "this model was trained with --class-dropout 0 and has no null class: choose a class to read with"
        )
    return null if label == NO_CLASS else label


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One forward pass over an image of T tokens, given its class or the null class."""

    attention: np.ndarray
    """float16 [layers, heads, T, T]: row t predicts token t; key 0 is the class, key 1 + s is token s."""
    entropy: np.ndarray
    """float32 [T]: entropy of each token's distribution in nats."""
    probability: np.ndarray
    """float32 [T]: probability of each token of the image."""
    rank: np.ndarray
    """int64 [T]: number of tokens more likely than the image's own."""


@torch.no_grad()
def read_tokens(model: LoadedModel, tokens: Tensor, label: int) -> Reading:
    """Read an image's tokens int64 [T] with its class or the null class. Call it in the models' thread."""
    network, config = model.network, model.info.config
    if tokens.shape != (config.sequence_length,) or int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise UserError(
            f"{model.name} reads {config.sequence_length} tokens of {config.vocab_size} codes, and the image has others: "
            "choose an image of this model's tokenizer and size"
        )
    device = network.output.weight.device
    batch, labels = tokens[None].to(device), torch.tensor([label], device=device)
    network.cls_embedding.check(labels)
    layers = range(1, config.n_layers + 1)
    attention = [
        weights[0].half().cpu().numpy()
        for _, weights in weights_by_layer(network, batch[:, :-1], labels, layers=layers)
    ]
    log_probs = network(batch[:, :-1], labels).logits[0].float().log_softmax(-1)  # (T, V)
    own = log_probs.gather(1, batch[0, :, None])
    return Reading(
        attention=np.stack(attention),
        entropy=-(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1).cpu().numpy(),
        probability=own[:, 0].exp().cpu().numpy(),
        rank=(log_probs > own).sum(-1).cpu().numpy(),
    )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The progress of fitting a probe and, when it is fitted, the classes that it predicts."""

    fitted: int
    """Training images read so far."""
    total: int
    layer: int
    by_step: tuple[tuple[int, tuple[str, ...]], ...] = ()
    """(tokens read, names of the most likely classes, best first)."""


class ClassProbe:
    """A ridge regression (not the MAE protocol) on features of the middle layer at some steps, under the null condition.

    It is fitted on first use, since `st-ar probe` keeps accuracies but not classifiers.

    Args:
        store: training images. The probe uses up to `images` of their centre crops.

    Raises:
        UserError: scikit-learn is missing, the store has a single class, or the model has no null class.
    """

    def __init__(self, model: LoadedModel, store: TokenStore, images: int) -> None:
        config = model.info.config
        require("sklearn")
        if len(np.unique(store.labels)) < 2:
            raise UserError(f"{store.folder} has images of one class only: a probe needs two or more")
        if model.info.class_dropout == 0:
            raise UserError(
                f"{model.name} was trained with --class-dropout 0 and has no null class, which a probe needs"
            )
        self.model, self.store = model, store
        self.layer = max(1, config.n_layers // 2)
        self.steps = uniform_steps(config.sequence_length, min(PROBE_STEPS, config.sequence_length))
        self.images = np.sort(numpy_generator(0, RandomStream.PROBE).permutation(len(store))[:images])
        self.classify: ShallowClassifiers | None = None

    def predict(self, tokens: Tensor, count: int = 3) -> Generator[Prediction, None, None]:
        """Yield the progress of fitting, then the `count` best classes for an image's tokens [T] at each step."""
        if self.classify is None:
            yield from self._fit()
        assert self.classify is not None
        names = self.store.meta.class_names
        scores = self.classify(self._features(tokens[None]))[0]  # (S, C)
        best = scores.topk(min(count, scores.shape[1])).indices.tolist()
        by_step = tuple((step - 1, tuple(names[c] for c in row)) for step, row in zip(self.steps, best, strict=True))
        yield Prediction(fitted=len(self.images), total=len(self.images), layer=self.layer, by_step=by_step)

    def _fit(self) -> Generator[Prediction, None, None]:
        features: list[np.ndarray] = []
        for start in range(0, len(self.images), BATCH_SIZE):
            yield Prediction(fitted=start, total=len(self.images), layer=self.layer)
            codes = self.store.center_codes(self.images[start : start + BATCH_SIZE]).astype(np.int64)
            features.append(self._features(torch.from_numpy(codes)).numpy())
        labels, classes = torch.from_numpy(self.store.labels[self.images]), len(self.store.meta.class_names)
        stacked = np.concatenate(features)
        self.classify = ShallowClassifiers(stacked, labels, classes, "ridge", 1.0, mean_over_steps=False)

    def _features(self, tokens: Tensor) -> Tensor:
        """Tokens [n, T] -> float32 [n, S, D] on the CPU."""
        return read_features(self.model.network, tokens, [self.layer], self.steps)[self.layer]


SIDE = 512
"""Smallest side of a displayed image in pixels, so that tokens can be clicked."""
TARGET, NEWEST = (0, 208, 255), (255, 255, 255)
"""Colours of the frames: around the predicted token, and around the last token read."""
MARGIN = 2
"""Pixels around a head's small map."""
OPACITY = 0.65
"""Opacity of a heat map over the image."""


def enlarge(image: np.ndarray, grid: int) -> np.ndarray:
    """Resize an image uint8 [S, S, 3] to a multiple of the grid of at least SIDE pixels, with sharp pixels."""
    side = _cell(grid) * grid
    method = Image.Resampling.NEAREST if image.shape[0] <= side else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((side, side), method))


def _cell(grid: int) -> int:
    """Side of a token in the enlarged image."""
    return -(-SIDE // grid)


def token_at(x: int, y: int, grid: int) -> int:
    """Return the token at a pixel of the enlarged image, the nearest one for a pixel outside."""
    column, row = (min(max(value // _cell(grid), 0), grid - 1) for value in (x, y))
    return row * grid + column


def head_at(x: int, y: int, grid: int, heads: int) -> tuple[int, int]:
    """Return the layer and head, counted from 1, at a pixel of `render_heads`."""
    pitch = _head_side(grid, heads) + 2 * MARGIN
    return y // pitch + 1, x // pitch + 1


def mark_token(image: np.ndarray, grid: int, token: int) -> np.ndarray:
    """Return the enlarged image with a frame around a token."""
    return _frame(enlarge(image, grid), grid, token, TARGET)


def render_attention(image: np.ndarray, weights: np.ndarray, grid: int, token: int) -> np.ndarray:
    """Return the attention [T] of the step that predicts a token: a heat map over the grey image, future tokens transparent.

    The weights are scaled to the largest weight on a token. The heat map is uint8 [side, side, 4].
    """
    heat = _heat_map(image, _past_weights(weights, grid, token), grid, "inferno")
    alpha = _pixels((np.arange(grid * grid) < token).astype(np.uint8) * 255, grid)
    shown = np.dstack([heat, alpha])
    if token > 0:
        shown = _frame(shown, grid, token - 1, (*NEWEST, 255))
    return _frame(shown, grid, token, (*TARGET, 255))


def render_entropy(image: np.ndarray, entropy: np.ndarray, grid: int, token: int) -> np.ndarray:
    """Return the entropy [T] of each token as a heat map over the grey image, scaled to its range, with a token framed."""
    low, high = float(entropy.min()), float(entropy.max())
    scaled = (entropy - low) / max(high - low, 1e-12)
    return _frame(_heat_map(image, scaled.astype(np.float32), grid, "viridis"), grid, token, TARGET)


def render_heads(reading: Reading, grid: int, token: int, chosen: tuple[int, int | None]) -> np.ndarray:
    """Return small attention maps of all heads (columns) and layers (rows) at one step, each on its own scale.

    chosen: layer and head to frame, counted from 1; None frames all heads.
    """
    layers, heads = reading.attention.shape[:2]
    side, colours = _head_side(grid, heads), _colours("inferno")
    pitch = side + 2 * MARGIN
    canvas = np.full((layers * pitch, heads * pitch, 3), 128, np.uint8)
    for layer in range(layers):
        for head in range(heads):
            weights = _past_weights(reading.attention[layer, head, token], grid, token).reshape(grid, grid)
            small = weights.repeat(side // grid, 0).repeat(side // grid, 1)
            top, left = layer * pitch, head * pitch
            if layer + 1 == chosen[0] and chosen[1] in (None, head + 1):
                canvas[top : top + pitch, left : left + pitch] = TARGET
            inside = canvas[top + MARGIN : top + MARGIN + side, left + MARGIN : left + MARGIN + side]
            inside[:] = colours[(small * 255).astype(np.uint8)]
    return canvas


def _head_side(grid: int, heads: int) -> int:
    """Side of a head's map in pixels. All heads of a layer are about as wide as the image."""
    return max(1, SIDE // (heads * grid), -(-32 // grid)) * grid


def _past_weights(weights: np.ndarray, grid: int, token: int) -> np.ndarray:
    """The weights on the tokens before `token`, scaled to at most 1; 0 for the others: float32 [T]."""
    past = weights[1 : token + 1].astype(np.float32)
    scaled = np.zeros(grid * grid, np.float32)
    scaled[:token] = past / max(float(past.max(initial=0.0)), 1e-12)
    return scaled


def _colours(name: str) -> np.ndarray:
    """A colour map as uint8 [256, 3]."""
    colours = require("matplotlib").colormaps[name](np.arange(256))
    return (np.asarray(colours)[:, :3] * 255).astype(np.uint8)


def _pixels(values: np.ndarray, grid: int) -> np.ndarray:
    """The values [T] of the tokens at each pixel of the enlarged image."""
    return values.reshape(grid, grid).repeat(_cell(grid), 0).repeat(_cell(grid), 1)


def _heat_map(image: np.ndarray, values: np.ndarray, grid: int, colours: str) -> np.ndarray:
    """The values [T], 0 to 1, as colours over the grey enlarged image."""
    grey = enlarge(image, grid).mean(-1, keepdims=True)
    heat = _colours(colours)[(_pixels(values, grid).clip(0, 1) * 255).astype(np.uint8)]
    return (OPACITY * heat + (1 - OPACITY) * grey).astype(np.uint8)


def _frame(image: np.ndarray, grid: int, token: int, colour: tuple[int, ...]) -> np.ndarray:
    cell, framed = _cell(grid), image.copy()
    row, column = divmod(token, grid)
    top, left, width = row * cell, column * cell, max(2, cell // 16)
    inside = slice(top + width, top + cell - width), slice(left + width, left + cell - width)
    framed[top : top + cell, left : left + cell] = colour
    framed[inside] = image[inside]
    return framed
