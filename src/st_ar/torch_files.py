"""Tensors from other people's files, without running anything that is in them."""

import argparse
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from st_ar.errors import UserError

WRAPPERS = ("model", "module", "state_dict")
"""Where LlamaGen's files keep their weights: DDP's, DeepSpeed's, and others'; FSDP's are bare."""
PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and DDP put before a parameter's name."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a .pt, .pth, .bin or .safetensors file, by plain parameter names.

    Pickles are loaded with `weights_only=True`; beside tensors and plain values only `argparse.Namespace` is let through,
    which some of LlamaGen's files hold.

    Raises:
        UserError: no such file, damaged, no weights in it, or a pickle that names anything else.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is damaged or incomplete ({error}): copy it again, or export it again from its run"
            ) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} was refused: it is no plain file of weights, and loading it could run code from it "
            f"({_cause(error)}). If you trust where it comes from, convert it to .safetensors with the tool that wrote it"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged or incomplete ({_cause(error)}): copy or download it again") from error
    return {plain_name(name): tensor for name, tensor in unwrap(loaded, path).items()}


def unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The dict of tensors inside what a file held."""
    for _ in range(len(WRAPPERS)):
        inner = [loaded[key] for key in WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)]
        if not inner:
            break
        loaded = inner[0]
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    if not tensors:
        raise UserError(f"{path} holds no weights, neither bare nor under {', '.join(WRAPPERS)}")
    return tensors


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers, in whatever order and number."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name.replace("._orig_mod.", ".")


def _cause(error: BaseException) -> str:
    """The telling line of torch's long messages."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return next((line.strip() for line in lines if "GLOBAL" in line or "nsupported" in line), lines[0])
