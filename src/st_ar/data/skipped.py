"""Unusable images: which were left out, and how many may be."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from st_ar.distributed import all_gather_ragged, get_rank
from st_ar.errors import UserError, listed, note
from st_ar.settings import Checked


@dataclass(frozen=True, order=True)
class Skipped(Checked, prefix=""):
    """An unusable image."""

    index: int
    name: str
    reason: str


def require_share(max_skipped: float) -> None:
    """Refuse a --max-skipped outside [0, 1]."""
    if not 0 <= max_skipped <= 1:
        raise UserError(f"--max-skipped must lie in [0, 1], not {max_skipped}: it is a share of the images")


def too_many(skipped: Sequence[Skipped], images: int, most: float) -> str:
    """Return an error text if more than the fraction `most` of the images is unusable; empty otherwise."""
    if len(skipped) <= most * images + 1e-9:
        return ""
    why = f"{min(skipped).name}: {min(skipped).reason}"
    return f"{len(skipped)} of {images} images cannot be used, more than --max-skipped {most}; the first is {why}"


class SkippedImages:
    """The unusable images of a source, which a measurement leaves out: at most a share `max_skipped`."""

    def __init__(self, source: str = "", max_skipped: float = 0.01) -> None:
        require_share(max_skipped)
        self.source, self.max_skipped = source, max_skipped
        self.found: dict[int, Skipped] = {}

    def add(self, index: int, name: str, reason: str, images: int | None) -> None:
        """Add an image; refuse if they are too many of `images`, which is None if unknown."""
        self.found[index] = Skipped(index, name or f"image {index}", reason)
        if images is not None:
            self._check(images)

    def _check(self, images: int) -> None:
        if why := too_many([*self.found.values()], images, self.max_skipped):
            raise UserError(f"{self.source}: {why}. Repair or remove them, or raise --max-skipped")

    def finish(self, used: int) -> list[str]:
        """Combine the lists of all ranks, and `report` beside the `used` images of all. Every rank must call it."""
        lines = "".join(json.dumps(asdict(image)) + "\n" for image in self.found.values())
        gathered = all_gather_ragged(torch.tensor([*lines.encode()], dtype=torch.uint8)).numpy().tobytes()
        skipped = sorted(Skipped(**json.loads(line)) for line in gathered.splitlines())
        self.found = {image.index: image for image in skipped}
        return self.report(used)

    def report(self, used: int) -> list[str]:
        """Return a note, which rank 0 prints, on unusable images beside the `used` ones; refuse too many."""
        images = used + len(self.found)
        self._check(images)
        if not self.found:
            return []
        names = listed([f"{image.name} ({image.reason})" for image in self.found.values()])
        text = f"{self.source}: {len(self.found)} of {images} images cannot be used and are left out: {names}"
        if get_rank() == 0:
            note(text)
        return [text]

    def describe(self) -> dict[str, object]:
        """Their number and the list, for a result."""
        return {"skipped": len(self.found), "skipped_images": [asdict(image) for image in self.found.values()]}
