"""How well a model predicts images that it has not seen."""

import torch

from st_ar.data.store import TokenStore
from st_ar.evaluation.hidden import batches
from st_ar.model.transformer import Transformer
from st_ar.selfguided.losses import next_token_loss


@torch.no_grad()
def validation_loss(model: Transformer, store: TokenStore, *, batch_size: int = 256) -> float:
    """Mean of L_AR (Eq. 2) in nats per token over a store's images, last crop each, with their labels, in float32.

    A store of centre crops has one crop; in a ten-crop store the last is a mirrored centre.

    Raises:
        UserError: a store that is not the model's, or a text model: a token store has no captions.
    """
    model.config.require_classes("the validation loss")
    store.check_model(model.config)
    crop = len(store.meta.crops) - 1
    total, device = 0.0, next(model.parameters()).device
    for tokens, labels in batches(store, [crop], batch_size):
        tokens, labels = tokens.to(device), labels.to(device)
        logits = model(tokens[:, :-1], labels).logits
        total += next_token_loss(logits, tokens).item() * len(tokens)
    return total / len(store)
