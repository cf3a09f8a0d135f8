"""Which operators are run, forward and backward."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Counts them by name, within the block; those of communication are c10d's."""

    def __init__(self, namespace: str = "aten") -> None:
        super().__init__()
        self.namespace = namespace
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.namespace:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
