"""Validation loss: how well a model predicts images of a test set."""

from collections.abc import Callable

import numpy as np
import torch

from st_ar.data.store import TokenStore
from st_ar.evaluation.attention import NO_MASKS, ImageMasks, center_crops
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
    """Return the mean of L_AR (Eq. 2) in nats per token over the centre crops of a store's images, in float32.

    Args:
        images: number of images, evenly spaced in the store; all by default.
        masks: masked keys, as in training (Eq. 3); none by default.
        advance: called with the number of images of each batch.

    Raises:
        UserError: a store that does not fit the model, or a text model.
    """
    model.config.require_classes("the validation loss")
    store.check_model(model.config)
    device = model.output.weight.device
    count = len(store) if images is None else min(images, len(store))
    chosen = np.linspace(0, len(store) - 1, count).round().astype(np.int64)
    total = 0.0
    for start in range(0, count, batch_size):
        batch = chosen[start : start + batch_size].tolist()
        tokens, labels = (tensor.to(device) for tensor in center_crops(store, batch))
        key_mask = masks.draw(batch, tokens.shape[1], device)
        logits = model(tokens[:, :-1], labels, key_mask=key_mask).logits
        total += next_token_loss(logits, tokens).item() * len(tokens)
        if advance:
            advance(len(tokens))
    return total / count
