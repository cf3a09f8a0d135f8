"""What a run's checkpoints hold: every tensor that the rest of the run depends on, by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class State:
    """All that the rest of a run depends on, but for the step."""

    modules: dict[str, nn.Module]
    """name -> module whose state belongs to the run."""
    student: nn.Module
    """The trained module."""
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
    """The student's, or several that share its parameters."""

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors, by name: saved from and loaded into."""
        return self._tensors(self._optimizer_state())

    def load(self, read: Callable[[dict[str, Tensor]], None]) -> None:
        """Let `read` fill the tensors, and take them over."""
        optimizer_state = self._optimizer_state()
        read(self._tensors(optimizer_state))
        set_optimizer_state_dict(self.student, self.optimizer, optimizer_state, options=OPTIONS)

    def _optimizer_state(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.student, self.optimizer, options=OPTIONS)

    def _tensors(self, optimizer_state: dict[str, Any]) -> dict[str, Tensor]:
        tensors = {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        moments = {f"optimizer.{key}": value for key, value in optimizer_state.items() if isinstance(value, Tensor)}
        return tensors | moments


class Copier:
    """Copies tensors into the host's memory, which it takes again for the next copy; pinned, if there is a GPU.

    Before torch 2.13 a stager closes itself after its first copy: there each copy has one of its own, and new memory.
    """

    _SERVES_ONCE = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)

    def __init__(self) -> None:
        self._stager: DefaultStager | None = None

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The tensors as they are now, by the same names."""
        if self._stager is None or self._SERVES_ONCE:
            self._stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))
        copied = self._stager.stage(tensors)
        assert isinstance(copied, dict)
        return copied


def whole_weights(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Of a state's tensors the modules' that are split among ranks, put together, on the CPU of the rank that is to keep them.

    All ranks must call this.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and not name.startswith("optimizer."):
            whole = tensor.full_tensor()  # one after another, to save a GPU's memory
            if keep:
                found[name] = whole.to("cpu", copy=True)
    return found
