import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.model.transformer import Transformer
from st_ar.model.weights import EMA, LIVE, save_weights

FIXTURES = Path(__file__).parent / "fixtures"
NO_DROPOUT = {"token_dropout": 0.0, "residual_dropout": 0.0, "ffn_dropout": 0.0}
TINY = ModelConfig(dim=16, n_layers=4, n_heads=2, vocab_size=11, grid=3, num_classes=3, **NO_DROPOUT)
TINY_TEXT = replace(TINY, condition="text", num_classes=1000, text_tokens=5, text_dim=6)


def recorded(prefix: str) -> dict[str, Tensor]:
    """LlamaGen's recorded tensors whose names begin with `prefix`, without it."""
    with safe_open(FIXTURES / "llamagen_gpt_tiny.safetensors", framework="pt") as file:
        return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118


def recorded_model() -> Transformer:
    """The model that LlamaGen's outputs were recorded from, in evaluation mode."""
    with safe_open(FIXTURES / "llamagen_gpt_tiny.safetensors", framework="pt") as file:
        theirs = json.loads(file.metadata()["config"])
    config = ModelConfig(
        dim=theirs["dim"],
        n_layers=theirs["n_layer"],
        n_heads=theirs["n_head"],
        vocab_size=theirs["vocab_size"],
        grid=round(theirs["block_size"] ** 0.5),
        num_classes=theirs["num_classes"],
        **NO_DROPOUT,
    )
    model = Transformer(config)
    model.load_state_dict(recorded("weights/"))
    return model.eval()


def save_export(folder: Path, model: Transformer, ema: Transformer, info: dict[str, Any]) -> None:
    """Write an export folder: live and EMA weights, and config.json."""
    save_weights(folder, {LIVE: model.state_dict(), EMA: ema.state_dict()}, model.config, info)


def random_model(config: ModelConfig = TINY, seed: int = 0) -> Transformer:
    """A model whose every weight, the output head's too, is far enough from 0 for differences to show."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 if parameter.dim() > 1 else 1 + noise * 0.2)
        if config.condition == "text":
            model.cls_embedding.uncond_embedding.copy_(
                torch.randn(config.text_tokens, config.text_dim, generator=generator)
            )
    return model.eval()


def random_sequences(config: ModelConfig, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [count, T] and labels [count], the null class among the possible ones."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (count, config.sequence_length), generator=generator)
    return tokens, torch.randint(config.num_classes + 1, (count,), generator=generator)


def random_captions(config: ModelConfig, lengths: Sequence[int], seed: int = 0) -> Tensor:
    """Captions' features [B, N, width] of so many rows each, with zeros before them."""
    features = torch.randn(
        len(lengths), config.text_tokens, config.text_dim, generator=torch.Generator().manual_seed(seed)
    )
    for caption, length in zip(features, lengths, strict=True):
        caption[: config.text_tokens - length] = 0
    return features
