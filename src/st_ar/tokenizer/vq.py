"""LlamaGen's VQ-GAN, with its parameter names. h, w: codes per side. Images are RGB in [-1, 1], channels first."""

import hashlib
import re
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.config import VQConfig
from st_ar.errors import UserError
from st_ar.files import read_tensors, require_absent, save_tensors, write_json


def norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with up to 32 groups."""
    return nn.GroupNorm(min(32, channels), channels, eps=1e-6)


class Residual(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.nin_shortcut(x)


class SpatialAttention(nn.Module):
    """Self-attention with one head over all positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, h w, C)
        if x.device.type == "cpu":
            heads = F.scaled_dot_product_attention(q, k, v)
        else:  # fused kernels need heads, (B, 1, h w, C), with features side by side
            heads = F.scaled_dot_product_attention(*(each[:, None].contiguous() for each in (q, k, v)))[:, 0]
        return x + self.proj_out(heads.transpose(1, 2).unflatten(2, x.shape[2:]))


class Resample(nn.Module):
    """Halves the resolution by a convolution with stride 2, or doubles it by nearest-neighbour interpolation and a convolution."""

    def __init__(self, width: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention at the lowest, and the step to the next resolution, if any."""

    def __init__(self, widths: list[int], step: str, *, attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(Residual(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(SpatialAttention(width) for width in widths[1:] if attention)
        self.step = step
        if step:
            self.add_module(step, Resample(widths[-1], down=step == "downsample"))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return self.get_submodule(self.step)(x) if self.step else x


def levels(width: int, widths: list[int], blocks: int, step: str) -> nn.ModuleList:
    """Levels of these widths, each with `blocks` residual blocks, with a step between two of them; `width` is the input's."""
    last, lowest = len(widths) - 1, len(widths) - 1 if step == "downsample" else 0
    return nn.ModuleList(
        Level([before, *[after] * blocks], step if index < last else "", attention=index == lowest)
        for index, (before, after) in enumerate(pairwise([width, *widths]))
    )


def middle(width: int) -> nn.ModuleList:
    """Residual block, attention and residual block of the lowest resolution."""
    return nn.ModuleList([Residual(width, width), SpatialAttention(width), Residual(width, width)])


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> [B, z_channels, h, w]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = levels(config.channels, widths, config.residual_blocks, "downsample")
        self.mid = middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.conv_in, *self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> images [B, 3, H, W]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = levels(widths[0], widths, config.residual_blocks + 1, "upsample")
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.conv_in, *self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQEncoder(nn.Module):
    """Images -> unit features [B, codebook_dim, h, w]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.quant_conv(self.encoder(images)).float(), dim=1)


class VQDecoder(nn.Module):
    """Unit features [B, codebook_dim, h, w] -> images."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def forward(self, features: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(features))


FORMAT_VERSION = 1
CONFIG, WEIGHTS = "tokenizer.json", "vq.safetensors"


def nearest_codes(features: Tensor, codebook: Tensor, rows: int = 4096) -> Tensor:
    """Indices int64 [N] of the unit codes [V, d] nearest to unit features [N, d]: those with the largest cosine."""
    return torch.cat([(chunk @ codebook.T).argmax(dim=1) for chunk in features.split(rows)])


def count_patches(size: int, patch: int) -> int:
    """Patches per side of an image of `size` pixels."""
    if size % patch:
        raise UserError(f"images of {size} pixels cannot be cut into {patch}-pixel patches: choose another --size")
    return size // patch


Half = TypeVar("Half", VQEncoder, VQDecoder)


class VQTokenizer:
    """A trained VQ-GAN as a tokenizer, from weights with LlamaGen's names. Encoder and decoder are built when first used, without
    gradients.
    """

    kind: ClassVar[str] = "vq"

    def __init__(self, config: VQConfig, tensors: dict[str, Tensor]) -> None:
        self.config, self.tensors = config, tensors
        self.device, self.dtype, self.compiled = torch.device("cpu"), torch.float32, False
        self.codebook = F.normalize(tensors["quantize.embedding.weight"].float(), dim=-1)

    def to(self, device: torch.device, dtype: torch.dtype, *, compiled: bool = False) -> "VQTokenizer":
        """A copy on a device, in a type, and compiled if wanted. Codes are compared in float32 in any case."""
        moved = VQTokenizer(self.config, self.tensors)
        moved.device, moved.dtype, moved.compiled, moved.codebook = device, dtype, compiled, self.codebook.to(device)
        return moved

    @cached_property
    def encoder(self) -> VQEncoder:
        return self._build(VQEncoder(self.config))

    @cached_property
    def decoder(self) -> VQDecoder:
        return self._build(VQDecoder(self.config))

    def _build(self, half: Half) -> Half:
        half.load_state_dict({name: self.tensors[name] for name in half.state_dict()})
        half.requires_grad_(False).eval()
        half.to(self.device, self.dtype)
        for parameter in half.parameters():
            if parameter.dim() == 4:  # convolutions are faster with channels last
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
        return count_patches(size, self.patch)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        h, w = self.grid(images.shape[2]), self.grid(images.shape[3])
        images = images.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        features = self.encoder(images).permute(0, 2, 3, 1).reshape(-1, self.config.codebook_dim)
        return nearest_codes(features, self.codebook).unflatten(0, (len(images), h, w)).cpu()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.vocab_size:
            raise UserError(
                f"codes must lie between 0 and {self.vocab_size - 1}, not {int(codes.min())} to {int(codes.max())}"
            )
        features = self.codebook[codes.to(self.device)].permute(0, 3, 1, 2).to(self.dtype)
        return self.decoder(features.contiguous(memory_format=torch.channels_last)).float().cpu()

    def save(self, folder: Path) -> None:
        """Write the tokenizer's folder; tokenizer.json, written last, completes it."""
        require_absent(folder, "a tokenizer", besides=[WEIGHTS])
        self.write(folder)

    def write(self, folder: Path, **info: int | str) -> None:
        """Overwrite the tokenizer's files, without tokenizer.json in between."""
        (folder / CONFIG).unlink(missing_ok=True)
        save_tensors(folder / WEIGHTS, self.tensors)
        config = {"format_version": FORMAT_VERSION, "kind": self.kind, **asdict(self.config)}
        write_json(folder / CONFIG, {**config, "fingerprint": self.fingerprint, **info})

    @classmethod
    def from_file(cls, path: Path, *, ema: bool = False) -> "VQTokenizer":
        """Load weights of this architecture: LlamaGen's vq_ds16_c2i.pt or vq_ds8_c2i.pt, or .safetensors."""
        tensors = read_tensors(path, ema=ema)
        tensors.pop("quantize.codebook_used", None)  # statistics of LlamaGen's training
        config = infer_config(tensors, path)
        with torch.device("meta"):
            parts = {**VQEncoder(config).state_dict(), **VQDecoder(config).state_dict()}
        expected = {name: list(tensor.shape) for name, tensor in parts.items()}
        expected["quantize.embedding.weight"] = [config.codebook_size, config.codebook_dim]
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            wrong = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise UserError(
                f"{path} is not a VQ-GAN of LlamaGen: {wrong} is {found.get(wrong, 'missing')}, expected "
                f"{expected.get(wrong, 'nothing')}; give another file"
            )
        return cls(config, tensors)


def infer_config(tensors: dict[str, Tensor], path: Path) -> VQConfig:
    """The network's config, from the shapes of its weights."""
    level = re.compile(r"encoder\.conv_blocks\.\d+\.res\.0\.conv1\.weight")
    block = re.compile(r"encoder\.conv_blocks\.0\.res\.\d+\.conv1\.weight")
    try:
        channels = len(tensors["encoder.conv_in.weight"])
        widths = [
            len(tensors[f"encoder.conv_blocks.{index}.res.0.conv1.weight"])
            for index in range(sum(1 for name in tensors if level.fullmatch(name)))
        ]
        codes, width = tensors["quantize.embedding.weight"].shape
        return VQConfig(
            channels=channels,
            multipliers=tuple(out // channels for out in widths),
            z_channels=len(tensors["encoder.conv_out.weight"]),
            codebook_size=codes,
            codebook_dim=width,
            residual_blocks=sum(1 for name in tensors if block.fullmatch(name)),
        )
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} is not a VQ-GAN of LlamaGen: {error} is missing or has another shape") from error
