import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.model.transformer import Transformer

FIXTURES = Path(__file__).parent / "fixtures"
NO_DROPOUT = {"token_dropout": 0.0, "residual_dropout": 0.0, "ffn_dropout": 0.0}
TINY = ModelConfig(dim=16, n_layers=4, n_heads=2, vocab_size=11, grid=3, num_classes=3, **NO_DROPOUT)


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


def random_model(config: ModelConfig = TINY, seed: int = 0) -> Transformer:
    """A model whose every weight, the output head's too, is far enough from 0 for differences to show."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 if parameter.dim() > 1 else 1 + noise * 0.2)
    return model.eval()


def random_sequences(config: ModelConfig, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [count, T] and labels [count], the null class among the possible ones."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (count, config.sequence_length), generator=generator)
    return tokens, torch.randint(config.num_classes + 1, (count,), generator=generator)
