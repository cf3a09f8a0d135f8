"""st-ar: self-guided training for autoregressive image generation (ST-AR, arXiv 2509.15185) with LlamaGen's transformer.

The names below import torch on first use, so that `import st_ar` and `st-ar --help` are fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_ar.config import ModelConfig, SelfGuidedConfig
    from st_ar.errors import UserError
    from st_ar.evaluation import metrics
    from st_ar.evaluation.probe import probe
    from st_ar.hub import from_pretrained, push_to_hub
    from st_ar.model.generate import generate
    from st_ar.model.transformer import Transformer
    from st_ar.model.weights import load_model
    from st_ar.selfguided import losses
    from st_ar.selfguided.adapt import attention_mask, capture, require_key_mask
    from st_ar.selfguided.guidance import EMATeacher, SelfGuidance
    from st_ar.tokenizer import load_tokenizer


__version__ = "0.1.0"

_MODULES = {
    "EMATeacher": "st_ar.selfguided.guidance",
    "ModelConfig": "st_ar.config",
    "SelfGuidance": "st_ar.selfguided.guidance",
    "SelfGuidedConfig": "st_ar.config",
    "Transformer": "st_ar.model.transformer",
    "UserError": "st_ar.errors",
    "attention_mask": "st_ar.selfguided.adapt",
    "capture": "st_ar.selfguided.adapt",
    "from_pretrained": "st_ar.hub",
    "generate": "st_ar.model.generate",
    "load_model": "st_ar.model.weights",
    "load_tokenizer": "st_ar.tokenizer",
    "losses": "st_ar.selfguided",
    "metrics": "st_ar.evaluation",
    "probe": "st_ar.evaluation.probe",
    "push_to_hub": "st_ar.hub",
    "require_key_mask": "st_ar.selfguided.adapt",
}

__all__ = [
    "EMATeacher",
    "ModelConfig",
    "SelfGuidance",
    "SelfGuidedConfig",
    "Transformer",
    "UserError",
    "attention_mask",
    "capture",
    "from_pretrained",
    "generate",
    "load_model",
    "load_tokenizer",
    "losses",
    "metrics",
    "probe",
    "push_to_hub",
    "require_key_mask",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'st_ar' has no attribute {name!r}")
    if name in ("losses", "metrics"):
        return import_module(f"{_MODULES[name]}.{name}")
    return getattr(import_module(_MODULES[name]), name)
