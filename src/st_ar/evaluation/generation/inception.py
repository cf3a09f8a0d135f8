"""The Inception-v3 network of 2015-12-05, whose features define FID, sFID, IS, precision and recall.

It is the graph of TensorFlow's first Inception-v3 release (arXiv 1512.00567), which FID (arXiv 1706.08500) and
openai/guided-diffusion's evaluator use. Parameter names follow its public PyTorch conversions. Unlike other Inception-v3
networks it resizes its input, its average pools exclude the padding, and its last block has a max pool.
"""

import hashlib
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.errors import UserError
from st_ar.files import atomic_write, cache_folder, read_tensors, sha256
from st_ar.progress import progress

SIDE = 299
"""Side in pixels to which the graph resizes every image."""
SPATIAL_CHANNELS = 7
"""Channels of Mixed_6d's first branch that sFID reads."""


def resize_bilinear(images: Tensor, side: int = SIDE) -> Tensor:
    """Resize float [B, C, H, W] to [B, C, side, side] as TensorFlow 1's ResizeBilinear: align_corners=False, no half-pixel centres.

    Output pixel i interpolates at i * (input size / output size) in the input, columns first, without antialiasing.
    """

    def coordinates(size: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = (torch.tensor(size, dtype=torch.float32) / side).item()  # float32 as in TensorFlow, computed on the CPU
        source = torch.arange(side, device=images.device, dtype=torch.float32) * scale
        low = source.floor().long().clamp(max=size - 1)
        return low, (low + 1).clamp(max=size - 1), (source - low).to(images.dtype)

    top, bottom, down = coordinates(images.shape[2])
    left, right, across = coordinates(images.shape[3])
    west, east = images[..., left], images[..., right]
    rows = west + (east - west) * across
    north, south = rows[:, :, top], rows[:, :, bottom]
    return north + (south - north) * down[:, None]


class FrozenBatchNorm(nn.Module):
    """Batch norm that uses its running statistics in train mode too."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU. `same` pads to the input's size."""

    def __init__(
        self, width_in: int, width_out: int, rows: int = 1, columns: int = 1, *, stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        padding = (rows // 2, columns // 2) if same else 0
        self.conv = nn.Conv2d(width_in, width_out, (rows, columns), stride, padding, bias=False)
        self.bn = FrozenBatchNorm(width_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def average_pool(x: Tensor) -> Tensor:
    """Mean over 3 x 3 pixels. Padding does not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35: Mixed_5b, 5c, 5d."""

    def __init__(self, width_in: int, pool_width: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(width_in, 64)
        self.branch5x5_1, self.branch5x5_2 = Conv(width_in, 48), Conv(48, 64, 5, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(width_in, 64), Conv(64, 96, 3, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 3)
        self.branch_pool = Conv(width_in, pool_width)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(average_pool(x))], 1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17: Mixed_6a."""

    def __init__(self, width_in: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(width_in, 384, 3, 3, stride=2, same=False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(width_in, 64), Conv(64, 96, 3, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17 x 17: Mixed_6b to 6e."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(768, 192)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, width), Conv(width, width, 1, 7)
        self.branch7x7_3 = Conv(width, 192, 7, 1)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, width), Conv(width, width, 7, 1)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(width, width, 1, 7), Conv(width, width, 7, 1)
        self.branch7x7dbl_5 = Conv(width, 192, 1, 7)
        self.branch_pool = Conv(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(average_pool(x))], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8: Mixed_7a."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192), Conv(192, 320, 3, 3, stride=2, same=False)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192), Conv(192, 192, 1, 7)
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, 7, 1), Conv(192, 192, 3, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8 x 8: Mixed_7b with an average pool, Mixed_7c with a max pool."""

    def __init__(self, width_in: int, *, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = Conv(width_in, 320)
        self.branch3x3_1 = Conv(width_in, 384)
        self.branch3x3_2a = Conv(384, 384, 1, 3)
        self.branch3x3_2b = Conv(384, 384, 3, 1)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(width_in, 448), Conv(448, 384, 3, 3)
        self.branch3x3dbl_3a = Conv(384, 384, 1, 3)
        self.branch3x3dbl_3b = Conv(384, 384, 3, 1)
        self.branch_pool = Conv(width_in, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else average_pool(x)
        return torch.cat([*parts, self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """Images uint8 [B, H, W, 3] of any size to features, the same in train and eval mode.

    The features are the layer pool_3 [B, 2048]. The spatial features [B, 2023] are flattened from [17, 17, 7] (channels last). The
    logits [B, 1008] are pool_3 times the classifier's weights without its bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 3, same=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(BlockC, (128, 160, 160, 192))
        self.Mixed_7a = BlockD()
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, max_pool=False), BlockE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images uint8 [B, H, W, 3] -> pool_3 [B, 2048], spatial features [B, 2023] and logits [B, 1008]."""
        x = (resize_bilinear(images.permute(0, 3, 1, 2).float()) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # branch1x1 comes first in the block's output
        pooled = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))).mean(dim=(2, 3))
        return pooled, spatial, pooled @ self.fc.weight.T


FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILES[0]}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the file; its name has the first 8 digits. FID is defined by these weights."""


def find_weights(path: Path | None = None, *, url: str = URL) -> Path:
    """Return the file of weights: `path` (the file or its folder), else the cached file, else a download into the cache.

    Raises:
        UserError: the file is missing and cannot be downloaded, or has another SHA-256.
    """
    if path is not None and not path.exists():
        raise UserError(f"--inception {path} does not exist: give the file {FILES[0]} or its folder")
    folder = path or cache_folder()
    candidates = [folder / name for name in FILES] if path is None or path.is_dir() else [path]
    file = next(filter(Path.is_file, candidates), None)
    if file is None and path is not None:
        raise UserError(f"--inception {path} holds neither {FILES[0]} nor {FILES[1]}: put one of them there")
    if file is None:
        return _download(url, folder / FILES[0])
    if (digest := sha256(file)) != SHA256:
        raise UserError(
            f"{file} is not Inception's file of weights: its SHA-256 begins with {digest[:8]}, not {SHA256[:8]}; "
            f"remove it, or get {FILES[0]} again from {URL}"
        )
    return file


def _download(url: str, target: Path) -> Path:
    remedy = f"get {FILES[0]} from {URL} on another machine and put it at {target}, or name it with --inception"
    data = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 -- https, ours
            size = answer.headers.get("Content-Length")
            total = int(size) if size and size.isdigit() else None
            with progress(f"download {target.name}", total, unit="bytes") as bar:
                while chunk := answer.read(1 << 20):
                    data += chunk
                    bar.advance(len(chunk))
    except (HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"Inception's weights are not at {target} and cannot be downloaded ({reason}): {remedy}"
        ) from error
    if (digest := hashlib.sha256(data).hexdigest()) != SHA256:
        expected = f" of {total:,}" if total is not None else ""
        raise UserError(
            f"the download from {url} is damaged or cut short ({len(data):,}{expected} bytes, SHA-256 "
            f"{digest[:8]}.., not {SHA256[:8]}..) and was deleted: try again, or {remedy}"
        )
    with atomic_write(target) as aside:
        aside.write_bytes(data)
    print(f"{target}: downloaded, its SHA-256 is right", file=sys.stderr)
    return target


def load_inception(path: Path | None = None, device: torch.device | str = "cpu") -> Inception:
    """Load the network with its public weights (Apache-2.0); `path` as for `find_weights`."""
    file = find_weights(path)
    tensors = {name: t for name, t in read_tensors(file).items() if not name.endswith(".num_batches_tracked")}
    with torch.device("meta"):
        network = Inception()
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file} does not hold the weights of the 2015-12-05 Inception-v3: {reason}") from error
    return network.requires_grad_(False).float().to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] -- torch documents it
