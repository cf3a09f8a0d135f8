"""What a model in training makes and knows: a grid of samples, and a quick probe. Each takes a copy of the weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.distributed.tensor import DTensor

from st_ar.config import TrainConfig
from st_ar.data.store import TokenStore
from st_ar.data.text import TextStore
from st_ar.errors import UserError
from st_ar.evaluation.probe import accuracies, require_classes
from st_ar.evaluation.shallow import ShallowClassifiers, require_sklearn
from st_ar.figures import strip
from st_ar.files import written_aside
from st_ar.model.transformer import Transformer
from st_ar.randomness import Purpose, numpy_generator
from st_ar.sample_config import SampleSettings
from st_ar.sampling import Sampler
from st_ar.tokenizer import load_tokenizer, place_tokenizer

IMAGES = 16
"""Samples, unless their labels are given."""
PROBED = 4000
"""Images that a quick probe is trained on at most, and tested on."""
AT_ONCE = 64
"""Images in the network at once."""


@torch.no_grad()
def whole_copy(model: Transformer) -> Transformer | None:
    """A copy in evaluation mode, on the host, for rank 0; every rank has to call it, for weights may lie in parts on all.

    Nothing of the model in training is touched, and no random number of its own is drawn.
    """
    copy = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        with torch.random.fork_rng(devices=[]):
            copy = Transformer(model.config).eval()
    places = {} if copy is None else copy.state_dict()
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value  # one at a time: memory
        if name in places:
            places[name].copy_(whole)
    return copy


class Samples:
    """A grid of images of the same labels, drawn with the same numbers each time.

    Raises:
        UserError: a label that the model does not know, or a tokenizer of other codes.
    """

    def __init__(
        self,
        tokenizer: Path,
        store: TokenStore,
        captions: TextStore | None,
        labels: Sequence[int],
        settings: SampleSettings,
        training: TrainConfig,
        device: torch.device,
    ) -> None:
        codes = load_tokenizer(tokenizer)
        store.check_model(training.model, codes.fingerprint if store.meta.tokenizer else None)
        if codes.vocab_size != store.meta.vocab_size:
            raise UserError(
                f"--sample-tokenizer {tokenizer} has {codes.vocab_size} codes, {store.folder} has {store.meta.vocab_size}: "
                "give the tokenizer that made the store"
            )
        known = training.model.num_classes if captions is None else len(captions)
        if wrong := [label for label in labels if not 0 <= label < known]:
            raise UserError(f"--sample-labels {wrong[0]} is out of range: give 0 to {known - 1}")
        self.tokenizer, self.captions, self.settings, self.device = tokenizer, captions, settings, device
        self.labels = labels or spread_labels(known, IMAGES)

    def draw(self, network: Transformer, path: Path) -> np.ndarray:
        """Write the grid as a PNG; returns it, uint8 [H, W, 3]."""
        tokenizer = place_tokenizer(self.tokenizer, self.device.type, "float32")  # no memory is held between two grids
        sampler = Sampler(network, tokenizer, self.settings, self.captions)
        starts = range(0, len(self.labels), AT_ONCE)
        numbers = [range(start, min(start + AT_ONCE, len(self.labels))) for start in starts]
        pictures = [sampler.pictures(sampler.tokens(some, self.labels)) for some in numbers]
        grid = strip(np.concatenate(pictures), columns=min(8, len(self.labels)))
        with written_aside(path) as aside:
            Image.fromarray(grid).save(aside, format="PNG")
        return grid


def spread_labels(known: int, count: int) -> list[int]:
    """`count` labels in ascending order, as evenly spread over 0 .. known - 1 as can be."""
    return [index * known // count for index in range(count)]


class QuickProbe:
    """Ridge regression on the last step's features of some images: not the MAE protocol, but seconds.

    Which images is drawn once, with the seed: of the centre crops of the training store, and of the test store.

    Raises:
        UserError: stores that do not belong together or have no classes, or scikit-learn is missing.
    """

    def __init__(self, train: TokenStore, test: TokenStore, training: TrainConfig) -> None:
        try:
            require_sklearn()
        except UserError as error:
            raise UserError(
                "--probe-every fits scikit-learn's ridge regression: pip install 'st-ar[quickstart]', or leave it out"
            ) from error
        test.check_model(training.model, train.meta.tokenizer or None)
        require_classes(train, test)
        self.stores = train, test
        self.layer = training.selfguided.layer(training.model.n_layers)
        rng = numpy_generator(training.seed, Purpose.PROBE)
        self.images = [np.sort(rng.permutation(len(store))[:PROBED]) for store in self.stores]

    def accuracy(self, network: Transformer) -> float:
        """Share of the test images whose class is guessed right."""
        (train, train_labels), (test, test_labels) = (
            (self._read(network, store, images), torch.from_numpy(store.labels[images]))
            for store, images in zip(self.stores, self.images, strict=True)
        )
        classes = len(self.stores[0].meta.class_names)
        classify = ShallowClassifiers(train, train_labels, classes, "ridge", 1.0, mean_over_steps=False)
        return accuracies(classify, test, test_labels, [1])[1][0]

    @torch.no_grad()
    def _read(self, network: Transformer, store: TokenStore, images: np.ndarray) -> np.ndarray:
        """The state at the last position without a condition, float32 [n, 1, D]."""
        rows: list[Tensor] = []
        for some in np.split(images, range(AT_ONCE, len(images), AT_ONCE)):
            codes = store.center_codes(some).astype(np.int64)
            tokens = torch.from_numpy(codes[:, :-1]).to(network.output.weight.device)
            states = network.features(tokens, network.null_condition(len(some)), layers=[self.layer])
            rows.append(states[self.layer][:, -1:].float().cpu())
        return torch.cat(rows).numpy()
