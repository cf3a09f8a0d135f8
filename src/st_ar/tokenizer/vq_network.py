"""LlamaGen's VQ-GAN as two networks: one reads images, one paints them. Parameter names and shapes are LlamaGen's.

B: images, C: channels, h, w: codes per side. Images are RGB in [-1, 1], channels first.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.vq_config import VQConfig


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
