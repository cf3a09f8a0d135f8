"""What a run keeps of itself: checkpoints, the newest weights in export/, the best by validation in best/, and those of every
so many steps in kept/.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from st_ar.config import TrainConfig
from st_ar.distributed import from_first, host_group, place
from st_ar.model.weights import EMA, LIVE, exported_step, save_weights
from st_ar.training.checkpoint import Checkpoints
from st_ar.training.state import State, whole_weights
from st_ar.training.validation import LOSS, Validation


class Keeper:
    """Saves and restores a run. All ranks call its methods together.

    Args:
        out: the run's folder.
        about: what the exports say of themselves besides the step and the model.
    """

    def __init__(
        self, out: Path, config: TrainConfig, state: State, validated: Validation, about: Mapping[str, Any]
    ) -> None:
        self.out, self.config, self.state, self.validated, self.about = out, config, state, validated, about
        self.checkpoints = Checkpoints(
            out / "checkpoints",
            keep=config.keep,
            keep_every=config.keep_every,
            keep_least=LOSS,
            group=host_group(config.rank_timeout),
        )

    def restore(self) -> int:
        """Load the newest whole checkpoint, and export it if the run was killed before that; its step, 0 if there is none."""
        step = from_first(self.checkpoints.newest)
        self.checkpoints.restore(step, self.state)
        measured = self.checkpoints.recorded(step, LOSS)
        late = [folder for folder in self._folders(step, measured) if exported_step(self.out / folder) != step]
        if late := from_first(lambda: late):
            tensors = self.state.tensors()
            weights = tensors | whole_weights(tensors, keep=place() == 0)
            if place() == 0:
                self._export(late, step, measured, weights)
        return step

    def save(self, step: int, measured: Mapping[str, float]) -> None:
        """Begin to write everything as it is now; `measured` on the validation store, if it was."""
        then = partial(self._export, self._folders(step, measured), step, measured)
        self.checkpoints.save(step, self.state, measured, then=then)

    def _folders(self, step: int, measured: Mapping[str, float]) -> list[str]:
        """Where the weights of a step belong."""
        if not step:
            return []
        kept = self.config.keep_every and step % self.config.keep_every == 0
        best = ["best"] if self.validated.improves(measured) else []
        return ["export", *best, *([f"kept/step_{step:08d}"] if kept else [])]

    def _export(
        self, folders: list[str], step: int, measured: Mapping[str, float], tensors: Mapping[str, Tensor]
    ) -> None:
        weights = {LIVE: under("student.model.", tensors), EMA: under("ema.", tensors)}
        for folder in folders:
            save_weights(self.out / folder, weights, self.config.model, {"step": step, **self.about, **measured})


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
