"""Helpers for self-guidance in other networks: features of inner layers, and attention with a key mask."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from st_ar.errors import UserError
from st_ar.model.transformer import attention_bias


@contextmanager
def capture(model: nn.Module, layers: Mapping[str, str | nn.Module]) -> Generator[dict[str, Tensor]]:
    """Collect the outputs of inner modules while the block runs, with gradients.

        with st_ar.capture(model, {"mid": "model.layers.5", "last": "model.layers.11"}) as features:
            loss = model(inputs).loss
        features["mid"]  # [B, T, D]

    Args:
        model: any module, also one that DDP, FSDP or torch.compile wraps.
        layers: name in the result -> a module, or its name in `model.named_modules()`. Of an output that is a tuple the first
            entry is taken, as of Hugging Face's decoder layers.

    Raises:
        UserError: there is no such module, or its output is not a tensor.
    """
    known, features = dict(model.named_modules()), dict[str, Tensor]()
    chosen = {name: known.get(layer) if isinstance(layer, str) else layer for name, layer in layers.items()}
    for name, module in chosen.items():
        if module is None:
            similar = [each for each in known if each.rpartition(".")[2].isdigit()][-1:] or list(known)[1:2]
            raise UserError(
                f"the model has no module {layers[name]!r}: give a name of named_modules(), such as {similar}"
            )

    def keep(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor):
            raise UserError(f"module {layers[name]!r} returns {type(first).__name__}: give one that returns a tensor")
        features[name] = first

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in chosen.items() if module is not None]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def attention_mask(key_mask: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the additive mask of Eq. 3, [B, 1, T, T]: -inf on the future and on masked keys, 0 elsewhere.

    Hugging Face's decoders take it as `attention_mask` (sdpa and eager), LlamaGen's `Transformer` as `mask`, and
    `scaled_dot_product_attention` as `attn_mask`.

    Args:
        key_mask: bool [B, T], or [B, T, T] with one mask per query; True where a key is masked. Flatten the views first.
        dtype: the dtype of queries and keys.
    """
    if key_mask.dim() not in (2, 3) or key_mask.dtype != torch.bool:
        raise UserError(
            f"a key mask is bool [B, T] or [B, T, T], not {key_mask.dtype} {list(key_mask.shape)}: flatten its views with flatten(0, 1)"
        )
    return attention_bias(key_mask, key_mask.shape[-1], dtype, key_mask.device)


@torch.no_grad()
def require_key_mask(features: Callable[[Tensor, Tensor], Tensor], tokens: Tensor) -> None:
    """Check once that a network honours its key mask: a masked token changes no other position's features.

    Args:
        features: (tokens int64 [B, T], key mask bool [B, T]) -> features [B, T, D] in evaluation mode, of inputs that begin with
            the condition: position t reads token t - 1, and the last token is not read.
        tokens: some tokens int64 [B, T], T of 3 or more.

    Raises:
        UserError: the mask is not honoured, or the features do not depend on the tokens.
    """
    position = tokens.shape[1] // 2
    changed = tokens.clone()
    changed[:, position - 1] = torch.where(tokens[:, position - 1] == 0, 1, 0)
    masked = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    unmasked = masked.clone()
    masked[:, position] = True
    others = torch.arange(tokens.shape[1], device=tokens.device) != position

    def differ(mask: Tensor) -> bool:
        first, second = (features(each, mask)[:, others].float() for each in (tokens, changed))
        return bool((first - second).abs().max() > 1e-3 * first.abs().max())

    if not differ(unmasked):
        raise UserError(
            "the features do not depend on the tokens: `features` must run the network on the tokens it is given"
        )
    if differ(masked):
        raise UserError(
            "the network does not honour the key mask: a masked token changes other positions. Pass st_ar.attention_mask(key_mask) to "
            "its attention in every layer, and call the network in evaluation mode here"
        )
