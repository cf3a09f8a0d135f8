"""Where Inception's weights come from: a path, a cache folder, or the public conversion, checked against its SHA-256."""

import hashlib
import sys
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

import torch

from st_ar.errors import UserError
from st_ar.evaluation.inception import Inception
from st_ar.files import cache_folder, sha256, written_aside
from st_ar.progress import progress
from st_ar.torch_files import read_tensors

FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""Names under which the same file is published."""
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILES[0]}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of that file, whose name carries the first 8 digits: with other weights a distance is no FID."""


def find_weights(path: Path | None = None, *, url: str = URL) -> Path:
    """The file of weights: `path` (a file, or a folder that holds it), else in the cache, else downloaded into it.

    Raises:
        UserError: not there and not to be had, or not the file of that SHA-256.
    """
    folder = path if path is not None and path.is_dir() else cache_folder()
    there = [folder / name for name in FILES if (folder / name).is_file()]
    if path is not None and not path.is_dir():
        if not path.is_file():
            raise UserError(f"--inception {path} does not exist: give the file {FILES[0]}, or the folder that holds it")
        there = [path]
    if there:
        found = sha256(there[0])
        if found != SHA256:
            raise UserError(
                f"{there[0]} is not Inception's file of weights: its SHA-256 begins with {found[:8]}, not {SHA256[:8]}; "
                f"remove it, or get {FILES[0]} again from {URL}"
            )
        return there[0]
    if path is not None:
        raise UserError(f"--inception {path} holds neither {FILES[0]} nor {FILES[1]}: put one of them there")
    return _download(url, folder / FILES[0])


def _download(url: str, target: Path) -> Path:
    remedy = f"get {FILES[0]} from {URL} on another machine and put it at {target}, or name it with --inception"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer, written_aside(target) as aside:  # noqa: S310 -- https, ours
            size = answer.headers.get("Content-Length")
            total, digest = int(size) if size and size.isdigit() else None, hashlib.sha256()
            with open(aside, "wb") as file, progress(f"download {target.name}", total, unit="bytes") as bar:
                while chunk := _read(answer):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.advance(len(chunk))
                received = file.tell()
            if digest.hexdigest() != SHA256:
                of = f" of {total:,}" if total is not None else ""
                raise UserError(
                    f"what came from {url} is damaged or cut short ({received:,}{of} bytes, SHA-256 "
                    f"{digest.hexdigest()[:8]}.., not {SHA256[:8]}..) and was thrown away: try again, or {remedy}"
                )
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"Inception's weights are not at {target} and cannot be downloaded ({reason}): {remedy}"
        ) from error
    print(f"{target}: downloaded, its SHA-256 is right", file=sys.stderr)
    return target


def _read(answer: BinaryIO) -> bytes:
    """The next piece; a broken connection is no trouble with the file that is written."""
    try:
        return answer.read(1 << 20)
    except OSError as error:
        raise HTTPException(str(error)) from error


def load_inception(path: Path | None = None, device: torch.device | str = "cpu") -> Inception:
    """The network with its public weights (Apache-2.0); `path` as for `find_weights`.

    Raises:
        UserError: as `find_weights`; or the file has not exactly the network's weights.
    """
    place = find_weights(path)
    tensors = {name: t for name, t in read_tensors(place).items() if not name.endswith(".num_batches_tracked")}
    with torch.device("meta"):
        network = Inception()
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{place} does not hold the weights of the 2015-12-05 Inception-v3: {reason}") from error
    return network.requires_grad_(False).float().to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] -- torch documents it
