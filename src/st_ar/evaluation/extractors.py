"""The networks whose features are compared, behind one interface: images in, features out, with a name and their weights' hash.

Only Inception's distances are called FID and sFID; every other name of a number carries its network's.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from st_ar.errors import UserError
from st_ar.evaluation.names import ExtractorName
from st_ar.hardware import full_precision

DINOV2 = "facebook/dinov2-large"
"""ViT-L/14 on the Hugging Face hub."""


class Extracted(NamedTuple):
    """Of images uint8 [B, H, W, 3], float32."""

    features: Tensor
    """[B, D]."""
    spatial: Tensor | None = None
    """[B, S], for sFID."""
    logits: Tensor | None = None
    """[B, C], for IS."""


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network and what its numbers are called."""

    name: str
    """As it stands in tables."""
    weights: str
    """SHA-256 of its weights: features of others do not compare."""
    dim: int
    """D."""
    run: Callable[[Tensor], Extracted]
    """The network: takes images on its device; see `extract`."""
    spatial_dim: int = 0
    """S; 0 if there are none."""
    classes: int = 0
    """C; 0 if there are none."""

    def extract(self, images: Tensor) -> Extracted:
        """Features of images uint8 [B, H, W, 3], computed in float32 to the full."""
        with full_precision(), torch.autocast(images.device.type, enabled=False):
            return self.run(images)

    @property
    def is_inception(self) -> bool:
        """Whether its Frechet distance is the FID."""
        return self.name == "Inception"

    def label(self, metric: str) -> str:
        """What a metric is called with this network."""
        if self.is_inception:
            named = {"fd": "FID", "fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID", "kid std": "KID std"}
            return named.get(metric, metric)
        named = {"fd": f"FD-{self.name}", "kid": f"KD-{self.name}", "kid std": f"KD-{self.name} std"}
        return named.get(metric, f"{metric} ({self.name})")


def resize_bicubic(images: Tensor, side: int) -> Tensor:
    """Bicubic resize with Pillow's smoothing and rounding: uint8 [B, H, W, 3] -> float32 [B, 3, side, side], whole numbers."""
    pixels = images.permute(0, 3, 1, 2).float()
    if pixels.shape[2:] == (side, side):
        return pixels
    resized = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return resized.add_(0.5).floor_().clamp_(0, 255)


def load_extractor(name: ExtractorName, device: torch.device, *, inception: Path | None = None) -> Extractor:
    """A network with its weights on a device.

    Args:
        inception: Inception's file of weights or its folder; by default the cache, or a download.

    Raises:
        UserError: weights or a package are not there.
    """
    if inception is not None and name != "inception":
        raise UserError(f"--inception names Inception's weights, and --extractor is {name}: leave one of them out")
    return {"inception": _inception, "efficientnet": _efficientnet, "dinov2": _dinov2}[name](device, inception)


def _inception(device: torch.device, path: Path | None) -> Extractor:
    from st_ar.evaluation.inception_weights import SHA256, load_inception

    network = load_inception(path, device)

    def run(images: Tensor) -> Extracted:
        return Extracted(*network(images))

    return Extractor(name="Inception", weights=SHA256, dim=2048, spatial_dim=2023, classes=1008, run=run)


def _efficientnet(device: torch.device, _: Path | None) -> Extractor:
    from st_ar.evaluation.efficientnet import SHA256, load_efficientnet

    network = load_efficientnet(device)

    @torch.no_grad()
    def run(images: Tensor) -> Extracted:
        return Extracted(network(resize_bicubic(images, 224) / 127.5 - 1).pooled)

    return Extractor(name="EfficientNet-Lite0", weights=SHA256, dim=1280, run=run)


def _dinov2(device: torch.device, _: Path | None) -> Extractor:
    try:
        import transformers  # pyright: ignore[reportMissingImports] -- an extra
    except ModuleNotFoundError as error:
        raise UserError(f"DINOv2 is run by transformers ({error}): pip install 'st-ar[dinov2]'") from error
    library: Any = transformers
    try:  # weights as .safetensors, code from the library alone
        network = library.Dinov2Model.from_pretrained(DINOV2, use_safetensors=True).eval().to(device)
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{DINOV2} cannot be had ({reason}): download it where there is a network and copy the cache of the Hugging Face hub"
        ) from error
    digest = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(key.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    @torch.no_grad()
    def run(images: Tensor) -> Extracted:
        pixels = (resize_bicubic(images, 224) / 255 - mean) / std
        return Extracted(
            network(pixel_values=pixels).last_hidden_state[:, 0].float()
        )  # the class token, after the last norm

    return Extractor(name="DINOv2", weights=digest.hexdigest(), dim=int(network.config.hidden_size), run=run)
