"""The VQ-GAN in training: the network with its codebook, the discriminator, and their losses.

After LlamaGen (arXiv 2406.06525) and VQGAN (arXiv 2012.09841). B: images, d: features of a code, h, w: codes per side,
V: codebook entries. Images are RGB in [-1, 1], channels first.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.tokenizer.vq import nearest_codes
from st_ar.tokenizer.vq_network import Painter, Reader
from st_ar.vq_config import AdversaryConfig, VQConfig


class Reconstruction(NamedTuple):
    """What the network makes of images."""

    images: Tensor
    """[B, 3, H, W], float32."""
    codebook_loss: Tensor
    """Mean squared distance of codes from features, whose gradient moves the codes."""
    commitment_loss: Tensor
    """The same distance, whose gradient moves the features."""
    codes: Tensor
    """int64 [B, h, w]."""
    features: Tensor
    """Unit features [B h w, d] that the codes stand for, without gradient."""


class VQGAN(nn.Module):
    """Reader, codebook and painter. Features and codes both have length one, so the nearest code has the largest cosine."""

    idle: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.reader = Reader(config)
        self.painter = Painter(config)
        self.codebook = nn.Parameter(F.normalize(torch.randn(config.codebook_size, config.codebook_dim), dim=-1))
        self.register_buffer("idle", torch.zeros(config.codebook_size))  # steps since a code was last used

    def forward(self, images: Tensor) -> Reconstruction:
        z = self.reader(images)
        flat = z.detach().permute(0, 2, 3, 1).flatten(0, 2)
        codebook = F.normalize(self.codebook.float(), dim=-1)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            codes = nearest_codes(flat, codebook).unflatten(0, (len(z), *z.shape[2:]))
        q = F.embedding(codes, codebook).permute(0, 3, 1, 2)
        straight_through = z + (q - z).detach()
        return Reconstruction(
            self.painter(straight_through).float(),
            (q - z.detach()).square().mean(),
            (q.detach() - z).square().mean(),
            codes,
            flat,
        )

    @property
    def last_layer(self) -> Tensor:
        """The weights that paint the pixels, where the two losses' gradients are weighed against each other."""
        return self.painter.decoder.conv_out.weight

    def tensors(self) -> dict[str, Tensor]:
        """The weights by LlamaGen's names."""
        halves = {**self.reader.state_dict(), **self.painter.state_dict()}
        return {name: t.detach().cpu() for name, t in {**halves, "quantize.embedding.weight": self.codebook}.items()}


class Discriminator(nn.Module):
    """Judges overlapping patches: images [B, 3, H, W] -> verdicts [B, 1, h, w], positive for a true one.

    PatchGAN (arXiv 1611.07004) with group norms, which know nothing of the rest of the batch.
    """

    def __init__(self, config: AdversaryConfig) -> None:
        super().__init__()
        widths = config.widths
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index, (a, b) in enumerate(pairwise(widths), start=1):
            stride = 2 if index < config.layers else 1
            layers += [nn.Conv2d(a, b, 4, stride=stride, padding=1, bias=False), nn.GroupNorm(min(32, b), b)]
            layers += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss from its verdicts: half of mean(max(0, 1 - real)) + mean(max(0, 1 + fake))."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


@torch.no_grad()
def revive(
    codebook: nn.Parameter,
    averaged: nn.Parameter,
    dead: Tensor,
    features: Tensor,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Put dead codes where features are, in the codebook [V, d] and its average, and forget their moments.

    Args:
        dead: bool [V].
        features: unit features [N, d] to draw from.
        generator: of the draws, on the CPU, so that every rank draws the same.

    Returns:
        How many there were.
    """
    rows = dead.nonzero().flatten()
    drawn = features[torch.randint(len(features), (len(rows),), generator=generator).to(features.device)]
    codebook[rows] = drawn
    averaged[rows] = drawn
    for moment in optimizer.state.get(codebook, {}).values():
        if moment.shape == codebook.shape:
            moment[rows] = 0
    return len(rows)
