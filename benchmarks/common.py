"""What the benchmarks share: timing in turn, the machine, and where results are saved."""

import json
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from st_ar.config import ModelConfig
from st_ar.hardware import describe, flops_per_token
from st_ar.tokenizer import Tokenizer, decode_to_images

RESULTS = Path(__file__).parent / "results"


Item = TypeVar("Item")


class Budget:
    """The seconds that a slice of on_gpu.py may take, from now on."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.left_out: list[str] = []
        """The cases that there was no time for."""

    def left(self) -> float:
        """Seconds left."""
        return self.end - time.perf_counter()

    def cases(self, items: Iterable[Item], *, named: Callable[[Item], str] = str) -> Iterator[Item]:
        """The items, without those that begin when less is left than the longest so far has taken."""
        longest = 0.0
        for item in items:
            begun = time.perf_counter()
            if self.left() <= longest:
                self.left_out.append(named(item))
                print(f"no time for {named(item)}: {self.left():.0f} s left", flush=True)
                continue
            yield item
            longest = max(longest, time.perf_counter() - begun)


def flop_limit(config: ModelConfig) -> float:
    """ST-AR's training FLOPs over AR's at equal tokens: one more forward pass of the blocks."""
    body, head = flops_per_token(config)
    return (3 * (body + head) + body) / (3 * (body + head))


def peak_rss() -> float:
    """GB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_in_turn(
    actions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    device: torch.device,
    before: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each action in each round; they take turns, so that a drifting machine is fair to all.

    `before` runs before each action; its time does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for round_number in range(warmup + rounds):
        for name, action in actions.items():
            if before:
                before()
            synchronise(device)
            begun = time.perf_counter()
            action()
            synchronise(device)
            if round_number >= warmup:
                times[name].append(time.perf_counter() - begun)
    return times


def summarise(times: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in seconds."""
    low, median, high = statistics.quantiles(times, n=4)
    return {"median": median, "quartile_low": low, "quartile_high": high, "runs": len(times)}


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Of a over b, round by round: the median and quartiles of the paired ratios."""
    return summarise([x / y for x, y in zip(a, b, strict=True)])


def time_by_operation(profiler: torch.profiler.profile, device: torch.device) -> list[tuple[str, float, int]]:
    """What time goes to, most first: names, seconds and calls of a GPU's kernels, or of a CPU's operations without those they call."""
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages():
        if device.type != "cuda":
            taken = event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            taken = event.self_device_time_total  # operations that start kernels are listed with the kernels' time too
        else:
            continue
        seconds[event.key] += taken / 1e6
        calls[event.key] += event.count
    return [(name, taken, calls[name]) for name, taken in seconds.most_common()]


def pictures(painter: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    """Tokens [images, tokens] as what the tokenizer shows: uint8 [images, H, W, 3]."""
    return np.concatenate(
        [decode_to_images(painter, part) for part in torch.from_numpy(tokens.astype(np.int64)).split(500)]
    )


def save(name: str, results: Any, folder: Path = RESULTS, *, quiet: bool = False) -> Path:
    """Write NAME.json with the machine, the versions, the date and the command."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    given = [
        Path(word).name if word.startswith("/") else word for word in sys.argv[1:]
    ]  # where things lie is nobody's business
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *given])
    record = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "environment": describe(),
        "results": results,
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        print(f"saved {path}")
    return path
