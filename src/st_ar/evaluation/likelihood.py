"""How well a model predicts images that it has not seen."""

from collections.abc import Callable

import numpy as np
import torch

from st_ar.data.store import TokenStore
from st_ar.evaluation.attention import NO_MASKS, ImageMasks
from st_ar.hardware import freed_memory_kept
from st_ar.model.transformer import Transformer
from st_ar.selfguided.losses import next_token_loss


@freed_memory_kept()
@torch.no_grad()
def validation_loss(
    model: Transformer,
    store: TokenStore,
    *,
    images: int | None = None,
    batch_size: int = 256,
    masks: ImageMasks = NO_MASKS,
    advance: Callable[[int], object] | None = None,
) -> float:
    """Mean of L_AR (Eq. 2) in nats per token over a store's images, the centre crop of each, with their labels, in float32.

    Args:
        images: how many, at equal distances in the store; by default all.
        masks: keys that are hidden from the model, as in training (Eq. 3); none by default.
        advance: is told how many images more are read.

    Raises:
        UserError: a store that is not the model's, or a text model: a token store has no captions.
    """
    model.config.require_classes("the validation loss")
    store.check_model(model.config)
    device = model.output.weight.device
    count = len(store) if images is None else min(images, len(store))
    chosen = np.linspace(0, len(store) - 1, count).round().astype(np.int64)
    total = 0.0
    for start in range(0, count, batch_size):
        here = chosen[start : start + batch_size]
        tokens = torch.from_numpy(store.center_codes(here).astype(np.int64)).to(device)
        mask = masks.draw(here.tolist(), tokens.shape[1])
        key_mask = None if mask is None else mask.to(device)
        logits = model(tokens[:, :-1], torch.from_numpy(store.labels[here]).to(device), key_mask=key_mask).logits
        total += next_token_loss(logits, tokens).item() * len(tokens)
        if advance:
            advance(len(tokens))
    return total / count
