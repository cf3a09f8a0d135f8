"""What a measurement of token invariance is: every setting, with its help. Nothing here imports torch, so that help is quick."""

from dataclasses import dataclass

from st_ar.settings import require, require_types


@dataclass(frozen=True, kw_only=True)
class InvarianceSettings:
    """Which views of which images are compared; see `st_ar.evaluation.invariance`."""

    num: int = 200
    """Images to measure, drawn with --seed; of streams and files of images the first."""
    size: int | None = None
    """Side of a view in pixels; by default what suits the images. They are resized so that all views fit, enlarged if need be."""
    shifts: tuple[int, ...] = ()
    """Shifts in pixels, each horizontally, vertically and diagonally; by default from 0 to two tokens."""
    factors: tuple[float, ...] = (0.9, 0.95, 1.05, 1.1)
    """Factors by which the second view is enlarged about the centre."""
    shown: int = 4
    """Images whose two views are drawn."""
    shown_shift: int | None = None
    """Diagonal shift in pixels between the views that are drawn; by default half a token."""
    seed: int = 0
    """Seed that the images are drawn with."""
    batch_size: int = 32
    """Images encoded at once."""

    def __post_init__(self) -> None:
        require_types(self, "--")
        require(self.num >= 2, f"--num must be at least 2, not {self.num}: agreement is a mean over images")
        require(self.size is None or self.size >= 1, f"--size must be at least 1 pixel, not {self.size}")
        require(self.shown >= 0, f"--shown must be 0 or more, not {self.shown}")
        require(self.seed >= 0, f"--seed must be 0 or more, not {self.seed}")
        require(self.batch_size >= 1, f"--batch-size must be at least 1, not {self.batch_size}")
        for shift in (*self.shifts, *([] if self.shown_shift is None else [self.shown_shift])):
            require(shift >= 0, f"shifts (--shifts, --shown-shift) must be 0 pixels or more, not {shift}")
        for factor in self.factors:
            require(0.5 <= factor <= 2, f"--factors must lie between 0.5 and 2, not {factor:g}")
