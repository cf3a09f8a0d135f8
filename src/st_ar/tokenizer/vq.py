"""LlamaGen's VQ-GAN as two networks: one reads images, one paints them. Parameter names and shapes are LlamaGen's.

B: images, C: channels, h, w: codes per side. Images are RGB in [-1, 1], channels first.
"""

import hashlib
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.config import VQConfig
from st_ar.errors import UserError, damaged
from st_ar.files import read_json, read_tensors, require_absent, save_tensors, write_json


def norm(channels: int) -> nn.GroupNorm:
    """32 groups, or fewer for few channels."""
    return nn.GroupNorm(min(32, channels), channels, eps=1e-6)


class Residual(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)
        self.same_width = width_in == width_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.same_width else self.nin_shortcut(x))


class SpatialAttention(nn.Module):
    """One head over all places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, h w, C)
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.proj_out(heads.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Half the resolution; pads right and bottom by one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: nearest, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each at the lowest, and the way to the next."""

    def __init__(self, widths: list[tuple[int, int]], attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(Residual(a, b) for a, b in widths)
        self.attn = nn.ModuleList(SpatialAttention(b) for _, b in widths if attention)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def middle(width: int) -> nn.ModuleList:
    """Residual, attention, residual at the lowest resolution."""
    return nn.ModuleList([Residual(width, width), SpatialAttention(width), Residual(width, width)])


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> [B, z_channels, h, w]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        width = config.channels
        for index, out in enumerate(widths):
            level = Level([(width, out)] + [(out, out)] * (config.residual_blocks - 1), attention=index == last)
            if index < last:
                level.downsample = Downsample(out)
            self.conv_blocks.append(level)
            width = out
        self.mid = middle(width)
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in [*self.conv_blocks, *self.mid]:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> images [B, 3, H, W]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        last = len(widths) - 1
        width = widths[0]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = middle(width)
        self.conv_blocks = nn.ModuleList()
        for index, out in enumerate(widths):
            level = Level([(width, out)] + [(out, out)] * config.residual_blocks, attention=index == 0)
            if index < last:
                level.upsample = Upsample(out)
            self.conv_blocks.append(level)
            width = out
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in [*self.mid, *self.conv_blocks]:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Reader(nn.Module):
    """The half that encodes: images -> unit features [B, codebook_dim, h, w]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.quant_conv(self.encoder(images)).float(), dim=1)


class Painter(nn.Module):
    """The half that decodes: unit features [B, codebook_dim, h, w] -> images."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def forward(self, features: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(features))


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
            raise damaged(folder, "its weights do not match its fingerprint", "copy or train the tokenizer again")
        return tokenizer

    @classmethod
    def from_file(cls, path: Path, *, ema: bool = False) -> "VQTokenizer":
        """A tokenizer from a file of weights: LlamaGen's vq_ds16_c2i.pt and vq_ds8_c2i.pt, or .safetensors.

        The network's shape is read off the weights; anything of another architecture is refused with the first difference.
        """
        tensors = read_tensors(path, ema=ema)
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
