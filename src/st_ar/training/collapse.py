"""Whether self-guided training's features collapse: how widely they spread, and over how many directions.

Both are read off the passes that a step makes anyway; nothing is computed twice, and nothing is changed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.distributed import everyone
from st_ar.selfguided.objective import Draws, SelfGuided, Targets

IMAGES = 256
"""The indicators are of at most so many of a batch's images, and of their first views."""


def spread(features: Tensor) -> float:
    """Standard deviation over images of L2-normalised features [n, P, D], mean over P places and D features.

    0 if all images have the same features; 1 / sqrt(D) if they point everywhere alike (SimSiam, arXiv 2011.10566, Fig. 2).
    """
    return F.normalize(features.float(), dim=-1).std(dim=0, correction=0).mean().item()


def effective_rank(features: Tensor) -> float:
    """The exponential of the entropy of the normalised singular values of L2-normalised features [n, P, D], mean over P.

    1 if all images lie on one line, at most min(n, D) (RankMe, arXiv 2210.02885, Eq. 2, which takes them as they are; here
    they have length 1, which is all that cosine similarities see).
    """
    x = F.normalize(features.double(), dim=-1).transpose(0, 1)  # (P, n, D)
    small = x @ x.mT if x.shape[1] < x.shape[2] else x.mT @ x
    values = torch.linalg.eigvalsh(small).clamp(min=0).sqrt()
    shares = values / values.sum(dim=-1, keepdim=True)
    return torch.special.entr(shares).sum(dim=-1).exp().mean().item()


class Features:
    """Sees the student's and the teacher's features pass by, by hooks on the student, in the steps that are asked for.

    What it sees, at the positions of Eq. 5: the student's and the teacher's features at the contrast layer and the student's
    projected ones; without contrast, the teacher's last layer.
    """

    def __init__(self, student: SelfGuided) -> None:
        self.wanted = False
        self.seen: dict[str, list[Tensor]] = {}
        self.hooks = [student.register_forward_pre_hook(self._see_teacher, with_kwargs=True)]
        if student.projector is not None:
            self.hooks.append(student.projector.register_forward_hook(self._see_student))

    def begin(self, wanted: bool) -> None:
        """Before a step: forget the last one's, and look or look away."""
        self.wanted, self.seen = wanted, {}

    def measure(self) -> dict[str, float]:
        """std_NAME and rank_NAME of the features that this step has shown; every rank calls it, and gets the same."""
        found: dict[str, float] = {}
        for name, parts in self.seen.items():
            features = everyone(torch.cat(parts)[:IMAGES])[:IMAGES]
            found |= {f"std_{name}": spread(features), f"rank_{name}": effective_rank(features)}
        self.seen = {}
        return found

    def close(self) -> None:
        """Look no more."""
        for hook in self.hooks:
            hook.remove()

    def _add(self, name: str, features: Tensor) -> None:
        self.seen.setdefault(name, []).append(features.detach()[:, 0])

    def _see_teacher(self, _student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.wanted:
            return
        given = [*args, *kwargs.values()]
        targets = next(each for each in given if isinstance(each, Targets))
        draws = next(each for each in given if isinstance(each, Draws))
        if targets.mid is not None:
            self._add("teacher", targets.mid)
        elif targets.last is not None and draws.positions is not None:
            self._add("teacher_last", targets.last[:, :, draws.positions])

    def _see_student(self, _projector: nn.Module, args: tuple[Tensor, ...], projected: Tensor) -> None:
        if self.wanted:
            self._add("student", args[0])
            self._add("projected", projected)
