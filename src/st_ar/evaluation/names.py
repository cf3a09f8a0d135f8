"""The words by which metrics and networks are asked for. Nothing here imports torch."""

from typing import Literal

Metric = Literal["fid", "fd", "sfid", "is", "precision", "recall", "kid", "density", "coverage"]
ExtractorName = Literal["inception", "efficientnet", "dinov2"]
