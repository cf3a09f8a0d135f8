"""What a model does as it reads one image: where each step looks, how sure it is of the next token, and what a probe guesses."""

import hashlib
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from st_ar.data.store import TokenStore
from st_ar.demo.inputs import whole
from st_ar.demo.shelf import Opened
from st_ar.errors import UserError
from st_ar.evaluation.attention import weights_by_layer
from st_ar.evaluation.hidden import uniform_steps
from st_ar.evaluation.shallow import ShallowClassifiers, require_sklearn
from st_ar.randomness import Purpose, numpy_generator

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

    def read(self, opened: Opened, tokens: Tensor, label: int) -> Reading:
        """Read an image's tokens int64 [T]; `label` is its class, or the null class. Call it in the models' thread."""
        key = opened.weights.name, hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), label
        found = self.kept.pop(key, None)
        self.kept[key] = _read(opened, tokens, label) if found is None else found
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return self.kept[key]


@torch.no_grad()
def _read(opened: Opened, tokens: Tensor, label: int) -> Reading:
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

    def __init__(self, opened: Opened, store: TokenStore, images: int) -> None:
        config = opened.weights.config
        require_sklearn()
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
        self.images = np.sort(numpy_generator(0, Purpose.PROBE).permutation(len(store))[:images])
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

    @torch.no_grad()
    def _features(self, tokens: Tensor) -> Tensor:
        """Tokens [n, T] -> float32 [n, S, D], on the host."""
        network = self.opened.network
        null = network.null_condition(len(tokens))
        states = network.features(tokens[:, :-1].to(network.output.weight.device), null, layers=[self.layer])
        return states[self.layer][:, torch.tensor(self.steps) - 1].float().cpu()
