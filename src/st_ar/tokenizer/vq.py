"""LlamaGen's VQ-GAN as a tokenizer: images <-> codes. Its files load unchanged.

B: images, C: channels, h, w: codes per side, V: codebook entries. Images are RGB in [-1, 1], channels first.
"""

import hashlib
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from st_ar.errors import UserError
from st_ar.files import read_json, require_absent, write_json
from st_ar.tokenizer.vq_network import Painter, Reader
from st_ar.torch_files import read_tensors, save_tensors
from st_ar.vq_config import VQConfig

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "tokenizer.json", "vq.safetensors"


def nearest_codes(features: Tensor, codebook: Tensor, rows: int = 4096) -> Tensor:
    """The nearest of unit codes [V, d] to unit features [N, d]: int64 [N].

    Both sides have length one, so the nearest is the one with the largest cosine: one product, a few rows at a time.
    """
    return torch.cat([(chunk @ codebook.T).argmax(dim=1) for chunk in features.split(rows)])


Half = TypeVar("Half", Reader, Painter)


class VQTokenizer:
    """A trained VQ-GAN as a tokenizer. Each half of the network is built when it is first used, without gradients.

    Args:
        config: the network's shape.
        tensors: LlamaGen's parameter names -> weights.
    """

    kind: ClassVar[str] = "vq"

    def __init__(self, config: VQConfig, tensors: dict[str, Tensor]) -> None:
        self.config, self.tensors = config, tensors
        self.device, self.dtype, self.compiled = torch.device("cpu"), torch.float32, False
        self.codebook = F.normalize(tensors["quantize.embedding.weight"].float(), dim=-1)

    def to(self, device: torch.device, dtype: torch.dtype, *, compiled: bool = False) -> "VQTokenizer":
        """Compute on a device and in a type, perhaps compiled by torch.compile, which pays for many images alone.

        Codes are compared in float32 whatever the type is.
        """
        moved = VQTokenizer(self.config, self.tensors)
        moved.device, moved.dtype, moved.compiled, moved.codebook = device, dtype, compiled, self.codebook.to(device)
        return moved

    @cached_property
    def reader(self) -> Reader:
        """The encoding half."""
        return self._build(Reader(self.config))

    @cached_property
    def painter(self) -> Painter:
        """The decoding half."""
        return self._build(Painter(self.config))

    def _build(self, half: Half) -> Half:
        half.load_state_dict({name: self.tensors[name] for name in half.state_dict()})
        half.requires_grad_(False).eval()
        half.to(self.device, self.dtype)
        for parameter in half.parameters():
            if parameter.dim() == 4:  # convolutions are fastest with channels last
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        if self.compiled:
            half.compile()
        return half

    @property
    def vocab_size(self) -> int:
        return self.config.codebook_size

    @property
    def patch(self) -> int:
        return self.config.patch

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"vq {self.config}".encode())
        for name in sorted(self.tensors):
            if name.startswith(("encoder.", "quant_conv.", "quantize.")):
                digest.update(name.encode() + self.tensors[name].float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def grid(self, size: int) -> int:
        if size % self.patch:
            raise UserError(
                f"images of {size} pixels are no whole number of {self.patch}-pixel codes: choose another --size"
            )
        return size // self.patch

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        h, w = self.grid(images.shape[2]), self.grid(images.shape[3])
        images = images.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        features = self.reader(images).permute(0, 2, 3, 1).reshape(-1, self.config.codebook_dim)
        return nearest_codes(features, self.codebook).unflatten(0, (len(images), h, w)).cpu()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.vocab_size:
            raise UserError(
                f"codes must lie between 0 and {self.vocab_size - 1}, not {int(codes.min())} to {int(codes.max())}"
            )
        features = self.codebook[codes.to(self.device)].permute(0, 3, 1, 2).to(self.dtype)
        return self.painter(features.contiguous(memory_format=torch.channels_last)).float().cpu()

    def save(self, folder: Path) -> None:
        """Write the tokenizer's folder; tokenizer.json, written last, marks it complete."""
        require_absent(folder, "a tokenizer", besides=[WEIGHTS])
        self.write(folder)

    def write(self, folder: Path, **info: int | str) -> None:
        """Write the tokenizer's files over those that are there; without tokenizer.json they are no tokenizer yet."""
        (folder / CONFIG).unlink(missing_ok=True)
        save_tensors(folder / WEIGHTS, self.tensors)
        config = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            **asdict(self.config),
            "fingerprint": self.fingerprint,
            **info,
        }
        write_json(folder / CONFIG, config)

    @classmethod
    def load(cls, folder: Path) -> "VQTokenizer":
        """Read what `save` wrote, and check it against its fingerprint."""
        config = read_json(folder / CONFIG, "a tokenizer")
        if config.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{folder / CONFIG} has format {config.get('format_version')}; this st-ar reads {FORMAT_VERSION}"
            )
        tokenizer = cls.from_file(folder / WEIGHTS)
        if tokenizer.fingerprint != config.get("fingerprint"):
            raise UserError(
                f"{folder} is damaged: its weights do not match its fingerprint; copy or train the tokenizer again"
            )
        return tokenizer

    @classmethod
    def from_file(cls, path: Path) -> "VQTokenizer":
        """A tokenizer from a file of weights: LlamaGen's vq_ds16_c2i.pt and vq_ds8_c2i.pt, or .safetensors.

        The network's shape is read off the weights; anything of another architecture is refused with the first difference.
        """
        tensors = read_tensors(path)
        tensors.pop("quantize.codebook_used", None)  # bookkeeping of LlamaGen's training
        config = infer_config(tensors, path)
        with torch.device("meta"):
            expected = {
                name: list(t.shape)
                for half in (Reader(config), Painter(config))
                for name, t in half.state_dict().items()
            }
        expected["quantize.embedding.weight"] = [config.codebook_size, config.codebook_dim]
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            wrong = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise UserError(
                f"{path} is no VQ-GAN of LlamaGen's: {wrong} is {found.get(wrong, 'missing')}, expected {expected.get(wrong, 'nothing')}"
            )
        return cls(config, tensors)


def infer_config(tensors: dict[str, Tensor], path: Path) -> VQConfig:
    """The network's shape from its weights' shapes."""
    try:
        channels = len(tensors["encoder.conv_in.weight"])
        levels = [
            name for name in tensors if name.startswith("encoder.conv_blocks.") and name.endswith("res.0.conv1.weight")
        ]
        blocks = [
            name for name in tensors if name.startswith("encoder.conv_blocks.0.res.") and name.endswith("conv1.weight")
        ]
        codes, width = tensors["quantize.embedding.weight"].shape
        return VQConfig(
            channels=channels,
            multipliers=tuple(
                len(tensors[f"encoder.conv_blocks.{level}.res.0.conv1.weight"]) // channels
                for level in range(len(levels))
            ),
            z_channels=len(tensors["encoder.conv_out.weight"]),
            codebook_size=codes,
            codebook_dim=width,
            residual_blocks=len(blocks),
        )
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no VQ-GAN of LlamaGen's: {error} is missing or has another shape") from error
