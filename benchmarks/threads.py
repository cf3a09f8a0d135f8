"""How threads should wait on a CPU: encoding with k-means, and a training step of the photos preset, alone and beside other programs.

    python benchmarks/threads.py

Each setting is a process of its own, because OpenMP reads its variables when torch is imported. They take turns. `st-ar` sets the
short spin: a thread looks 10,000 times whether the others are done, and then sleeps.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from common import ratio, save, summarise
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset
from st_ar.tokenizer.kmeans import KMeansTokenizer

SETTINGS = {
    "default": {},
    "short spin": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = "while True: pass"


def encode() -> Callable[[], object]:
    """32 images x 10 crops of 32 pixels, 512 codes of 4 x 4 pixels."""
    tokenizer = KMeansTokenizer(torch.rand(512, 48) * 2 - 1, 4)
    images = torch.rand(320, 3, 32, 32) * 2 - 1
    return lambda: tokenizer.encode(images)


def train() -> Callable[[], object]:
    """Forward and backward pass of 64 sequences."""
    model = Transformer(get_preset("st-ar-photos").model)
    tokens, labels = torch.zeros(64, 63, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    return lambda: model(tokens, labels).logits.sum().backward()


WORK = {"encode": encode, "train": train}


def measure(work: str, seconds: float) -> float:
    """Seconds of one call, over at least so many."""
    action = WORK[work]()
    action()
    begun, calls = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        action()
        calls += 1
    return (time.perf_counter() - begun) / calls


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument(
        "--work", choices=list(WORK), help="print one measurement, for a process that this script starts"
    )
    given = parser.parse_args()
    if given.work:
        print(json.dumps(measure(given.work, given.seconds)))
        return
    results = {}
    for others in (0, os.cpu_count() or 1):
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(others)]
        try:
            for work in WORK:
                times: dict[str, list[float]] = {name: [] for name in SETTINGS}
                for _ in range(given.rounds):
                    for name, variables in SETTINGS.items():
                        command = [sys.executable, __file__, "--work", work, "--seconds", str(given.seconds)]
                        unset = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
                        done = subprocess.run(command, env=unset | variables, stdout=subprocess.PIPE, check=True)
                        times[name].append(json.loads(done.stdout))
                place = f"{work}, beside {others} busy programs" if others else f"{work}, alone"
                results[place] = {name: summarise(each) for name, each in times.items()}
                results[place] |= {
                    f"{name} over default": ratio(times[name], times["default"]) for name in list(SETTINGS)[1:]
                }
                print(
                    place,
                    {
                        name: f"{1000 * row['median']:.1f} ms"
                        for name, row in results[place].items()
                        if "over" not in name
                    },
                )
        finally:
            for process in busy:
                process.kill()
    save("threads", results)


if __name__ == "__main__":
    main()
