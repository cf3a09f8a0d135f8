"""All statistics of an evaluation on synthetic features: wall time and memory of 50,000 samples against 10,000 reference images.

Features stand for Inception's: 2048 numbers (pool_3), 2023 (spatial) and 1008 logits an image, non-negative and correlated, from
one random map for the samples and one a little apart for the reference. They come in batches, as from the network; making them is
not timed. At the end the Frechet distance beside the formula with scipy's sqrtm, on the same covariances.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from common import peak_rss, save, summarise
from st_ar.evaluation.metrics import (
    FeatureStatistics,
    Gaussian,
    InceptionScore,
    compare,
    frechet_distance,
    kernel_distance,
)

DIM, SPATIAL, CLASSES, FACTORS = 2048, 2023, 1008, 256


def batches(count: int, dim: int, shift: float, seed: int, batch: int) -> Iterator[Tensor]:
    """Features float32 [b, dim] of so many images."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(FACTORS, dim, generator=torch.Generator().manual_seed(dim)) * (0.25 / FACTORS**0.5)
    for start in range(0, count, batch):
        factors = torch.randn(min(batch, count - start), FACTORS, generator=generator)
        yield (factors @ mixing + 0.05 * torch.randn(len(factors), dim, generator=generator) + 0.3 + shift).relu()


class Stages:
    """Seconds of each stage by the clock and of all cores together, and the highest memory until its end."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    def add(self, name: str, seconds: float, cores: float) -> None:
        self.found[name] = {"seconds": seconds, "cpu_seconds": cores, "peak_rss_gb": peak_rss()}
        print(f"{name:58}{seconds:9.2f} s {cores:9.2f} s of all cores   peak {peak_rss():.2f} GB", flush=True)

    def total(self, what: str) -> float:
        return sum(stage[what] for stage in self.found.values())

    def time(self, name: str, action: Callable[[], Any]) -> Any:
        begun, used = time.perf_counter(), time.process_time()
        result = action()
        self.add(name, time.perf_counter() - begun, time.process_time() - used)
        return result

    def stream(self, name: str, features: Iterator[Tensor], take: Callable[[Tensor], None]) -> None:
        """The time of `take` alone."""
        seconds = cores = 0.0
        for batch in features:
            begun, used = time.perf_counter(), time.process_time()
            take(batch)
            seconds, cores = seconds + time.perf_counter() - begun, cores + time.process_time() - used
        self.add(name, seconds, cores)


def measure(samples: int, reference: int, batch: int) -> tuple[dict[str, Any], tuple[Gaussian, Gaussian]]:
    """Every stage once; results and the pooled features' statistics."""
    stages, values = Stages(), dict[str, float]()
    kept = {"samples": torch.empty(samples, DIM), "reference": torch.empty(reference, DIM)}
    gaussians: dict[str, Gaussian] = {}
    for who, count, shift in (("reference", reference, 0.0), ("samples", samples, 0.01)):
        for what, dim in (("pool_3", DIM), ("spatial", SPATIAL)):
            statistics, done = FeatureStatistics(dim), 0
            seen = batches(count, dim, shift, 1 if who == "samples" else 2, batch)
            if what == "pool_3":  # as an evaluation keeps them
                features = list(seen)
                for part in features:
                    kept[who][done : done + len(part)] = part
                    done += len(part)
                del features
                seen = iter(kept[who].split(batch))
            stages.stream(f"mean and covariance, {what}, {count:,} {who}", seen, statistics.update)
            gaussians[f"{who} {what}"] = statistics.result()
    for name, what in (("FID", "pool_3"), ("sFID", "spatial")):
        pair = gaussians[f"reference {what}"], gaussians[f"samples {what}"]
        values[name] = stages.time(f"Frechet distance, {what}", lambda pair=pair: frechet_distance(*pair[0], *pair[1]))
    score, place = InceptionScore(samples, CLASSES), 0
    classifier = torch.randn(DIM, CLASSES, generator=torch.Generator().manual_seed(5)) * 0.2
    probabilities = [(part @ classifier).softmax(1) for part in kept["samples"].split(batch)]

    def take(part: Tensor) -> None:
        nonlocal place
        score.update(part, torch.arange(place, place + len(part)))
        place += len(part)

    stages.stream(f"IS, {samples:,} samples", iter(probabilities), take)
    values["IS"] = score.result()
    del probabilities
    both = kept["reference"], kept["samples"]
    found = stages.time("precision and recall", lambda: compare(*both, density_k=None)).precision_recall
    suite, cores = stages.total("seconds"), stages.total("cpu_seconds")
    print(f"{'ADM suite (FID, sFID, IS, precision, recall)':58}{suite:9.2f} s {cores:9.2f} s of all cores")
    values |= found._asdict()
    results: dict[str, Any] = {
        "adm_suite_seconds": suite,
        "adm_suite_cpu_seconds": cores,
        "adm_suite_peak_rss_gb": peak_rss(),
    }
    dense = stages.time("density and coverage, alone", lambda: compare(*both, k=None)).density_coverage
    values |= dense._asdict()
    values["KID"] = stages.time("KID, 100 subsets of 1,000", lambda: kernel_distance(*both)).mean
    results |= {"stages": stages.found, "values": values}
    return results, (gaussians["reference pool_3"], gaussians["samples pool_3"])


def against_sqrtm(first: Gaussian, second: Gaussian, rounds: int) -> dict[str, Any]:
    """Our Frechet distance and the formula with scipy's sqrtm, in turn."""
    times: dict[str, list[float]] = {"ours": [], "sqrtm": []}
    values: dict[str, float] = {}
    for _ in range(rounds):
        for name in times:
            begun = time.perf_counter()
            if name == "ours":
                values[name] = frechet_distance(*first, *second)
            else:
                trace = np.trace(sqrtm(first.covariance @ second.covariance)).real
                difference = first.mean - second.mean
                traces = np.trace(first.covariance) + np.trace(second.covariance) - 2 * trace
                values[name] = float(difference @ difference + traces)
            times[name].append(time.perf_counter() - begun)
    found = {name: summarise(taken) if rounds > 1 else {"median": taken[0], "runs": 1} for name, taken in times.items()}
    apart = abs(values["ours"] / values["sqrtm"] - 1)
    print(
        f"Frechet distance: {found['ours']['median']:.2f} s, with sqrtm {found['sqrtm']['median']:.2f} s, {apart:.1e} apart"
    )
    return {**found, "values": values, "relative_difference": apart}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="of the comparison with sqrtm")
    parser.add_argument("--name", default="evaluation-cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    load = os.getloadavg()[0]
    results, (first, second) = measure(given.samples, given.reference, given.batch)
    results["sqrtm"] = against_sqrtm(first, second, given.rounds)
    results["load_average_before"] = load
    results["load_average_after"] = os.getloadavg()[0]
    save(given.name, {"samples": given.samples, "reference": given.reference, "batch": given.batch, **results})


if __name__ == "__main__":
    main()
