"""Training batches: the global batch of a step is a pure function of (seed, step), so there is no loader state."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from st_ar.data.store import TokenStore
from st_ar.distributed import Ranks
from st_ar.errors import UserError
from st_ar.randomness import Purpose, numpy_generator


class Views:
    """M different crops of each of B images a step, every image once an epoch, in an order drawn for each epoch.

    Epochs follow one another without a gap: a batch may hold the end of one and the beginning of the next.

    batch_size: images of a step, over all ranks; this rank gets its share of them.
    conditions: gives images [B] a text model's labels [B, ..]; their classes if None.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        batch_size: int,
        views: int,
        seed: int,
        conditions: Callable[[np.ndarray], Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        crops = len(store.meta.crops)
        if views > crops:
            raise UserError(
                f"--views {views} asks for different crops of an image, {store.folder} has {crops} of each: "
                "tokenize with --crops ten, or train with fewer views"
            )
        self.store, self.batch_size, self.views, self.seed = store, batch_size, views, seed
        self.conditions = conditions or (lambda images: torch.from_numpy(store.labels[images]))
        self.mine = (ranks or Ranks()).share(batch_size)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> np.ndarray:
        return numpy_generator(self.seed, Purpose.ORDER, epoch).permutation(len(self.store))

    def images(self, step: int) -> np.ndarray:
        """Indices [B] of the images of step `step`, all ranks'."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, within = np.divmod(places, len(self.store))
        images = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            images[here] = self._order(int(epoch))[within[here]]
        return images

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """What is this rank's of step `step`: tokens int64 [B / ranks, M, T], and labels, classes int64 [B / ranks] or
        captions [B / ranks, N, width].
        """
        images = self.images(step)[self.mine]
        rng = numpy_generator(self.seed, Purpose.CROPS, step)
        crops = rng.random((self.batch_size, len(self.store.meta.crops))).argsort(axis=1)[:, : self.views]
        codes = self.store.codes(images, crops[self.mine]).astype(np.int64)
        return torch.from_numpy(codes), self.conditions(images)
