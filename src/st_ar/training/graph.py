"""The forward and backward passes of a training step as a CUDA graph, for models so small that the host is slower than the GPU."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from st_ar.errors import UserError
from st_ar.hardware import to_device
from st_ar.selfguided.guidance import GuidanceSample
from st_ar.selfguided.objective import Losses

Passes = Callable[[Tensor, Tensor, GuidanceSample], Losses]
"""(tokens, labels, sample) -> losses; adds to the gradients."""
WARM_UP = 3
"""Steps of each kind before it is recorded: libraries choose their kernels, and compiled blocks are compiled."""


def require_graph(device: torch.device, world: int) -> None:
    """Refuse --cuda-graph where there is no GPU, or where ranks exchange gradients."""
    if device.type != "cuda" or world > 1:
        found = f"there are {world} ranks" if world > 1 else "this one has none"
        raise UserError(f"--cuda-graph is for a single process with a GPU, and {found}: leave it out")


class GraphedPasses:
    """Runs `passes` as a CUDA graph. The gradients must keep their memory from step to step.

    Plain and guided steps have a graph each. A replay runs no hook of a module, so steps in which `hooked` is true are not replayed.
    """

    def __init__(self, passes: Passes, device: torch.device, hooked: Callable[[], bool]) -> None:
        self.passes, self.device, self.hooked = passes, device, hooked
        self.calls: Counter[tuple[bool, ...]] = Counter()
        self.graphs: dict[tuple[bool, ...], tuple[list[Tensor | None], Callable[[], None], Losses]] = {}

    def __call__(self, tokens: Tensor, labels: Tensor, sample: GuidanceSample) -> Losses:
        inputs = [None if each is None else to_device(each, self.device) for each in (tokens, labels, *sample)]
        kind = tuple(each is not None for each in inputs)
        self.calls[kind] += 1
        if self.hooked() or self.calls[kind] <= WARM_UP:
            return self._run(inputs)
        if kind not in self.graphs:
            static = [None if each is None else each.clone() for each in inputs]
            self.graphs[kind] = (static, *record(lambda: self._run(static)))
        static, replay, losses = self.graphs[kind]
        for kept, new in zip(static, inputs, strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)
        replay()
        return losses

    def _run(self, inputs: list[Tensor | None]) -> Losses:
        tokens, labels, key_mask, positions = inputs
        assert tokens is not None
        assert labels is not None
        return self.passes(tokens, labels, GuidanceSample(key_mask, positions))


def record(run: Callable[[], Losses]) -> tuple[Callable[[], None], Losses]:
    """Record a function as a CUDA graph. Returns a function that replays it, and the losses that each replay overwrites."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads copy checkpoints meanwhile
        losses = run()
    return graph.replay, losses
