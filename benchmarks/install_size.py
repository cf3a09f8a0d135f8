"""What an installation takes on disk, core and each extra, and how long `st-ar --help` takes to start.

    python benchmarks/install_size.py --extras quickstart data hub metrics tracking

installs st-ar from this checkout into an empty environment with constraints.txt and measures there; --here measures the environment
that runs it instead. A package's size is that of the files it recorded, the compiled ones among them if pip compiled them. An extra's
size is what it adds to the core. torch comes in the build that pip finds: a CUDA build is many times as large as a CPU's. Start-ups
are measured by the clock and by the processor's time, which a busy machine stretches less.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START_UPS = {
    "python": ["-c", "pass"],
    "import st_ar": ["-c", "import st_ar"],
    "st-ar --help": ["-m", "st_ar", "--help"],
    "st-ar train st-ar-b --help": ["-m", "st_ar", "train", "st-ar-b", "--help"],
}
INSIDE = """
import json, sys
from importlib.metadata import distributions
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name as name_of

found = {name_of(d.name): d for d in distributions()}

def closure(name, extras=("",)):
    seen, waiting = set(), [(name, extras)]
    while waiting:
        one, wanted = waiting.pop()
        if (one, wanted) in seen:
            continue
        seen.add((one, wanted))
        for text in found[one].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in wanted):
                waiting.append((name_of(requirement.name), ("", *sorted(requirement.extras))))
    return {one for one, _ in seen}

def size(name):
    return sum(path.stat().st_size for file in found[name].files or () if (path := Path(file.locate())).is_file())

core = closure("st-ar")
sizes = {name: size(name) for name in sorted({*core, *(n for extra in sys.argv[1:] for n in closure("st-ar", ("", extra)))})}
versions = {name: found[name].version for name in sizes}
print(json.dumps({
    "core": sorted(core),
    "extras": {extra: sorted(closure("st-ar", ("", extra)) - core) for extra in sys.argv[1:]},
    "bytes": sizes, "versions": versions, "python": sys.version.split()[0],
}))
"""


def measure(folder: Path, extras: Sequence[str]) -> dict[str, Any]:
    """Install into `folder` and measure: packages of the core and of each extra, their bytes and versions, and start-up times."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    wanted = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    begun = time.perf_counter()
    command = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wanted]
    subprocess.run(command, check=True)
    installing = time.perf_counter() - begun
    return measure_environment(python, folder, extras) | {"seconds_to_install": installing}


def measure_environment(python: Path, folder: Path, extras: Sequence[str]) -> dict[str, Any]:
    """What is installed beside `python`: packages of the core and of each extra, their bytes and versions, and start-ups."""
    told = subprocess.run([python, "-c", INSIDE, *extras], check=True, capture_output=True, text=True, cwd=folder)
    clock, processor = start_ups(python, folder)
    return json.loads(told.stdout) | {"seconds_to_start": clock, "processor_seconds_to_start": processor}


def start_ups(python: Path, folder: Path, rounds: int = 5) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each start by the clock and of the processor, in turn, after one that does not count."""
    clock: dict[str, list[float]] = {name: [] for name in START_UPS}
    processor: dict[str, list[float]] = {name: [] for name in START_UPS}
    for round_number in range(rounds + 1):
        for name, arguments in START_UPS.items():
            begun, used = time.perf_counter(), children_time()
            subprocess.run([python, *arguments], check=True, capture_output=True, cwd=folder)
            if round_number:
                clock[name].append(time.perf_counter() - begun)
                processor[name].append(children_time() - used)
    return clock, processor


def children_time() -> float:
    """Processor seconds of all ended child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def sums(measured: Mapping[str, Any]) -> dict[str, float]:
    """MB of the core without torch, of torch, and of what each extra adds."""
    size = measured["bytes"]
    mega = {
        "core without torch": sum(size[name] for name in measured["core"] if name != "torch"),
        "torch": size["torch"],
    }
    mega |= {f"[{extra}]": sum(size[name] for name in names) for extra, names in measured["extras"].items()}
    return {name: total / 1e6 for name, total in mega.items()}


def main() -> None:
    """Install, measure, print, save."""
    from common import save, summarise

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", nargs="*", default=["quickstart", "data", "hub", "metrics", "tracking"])
    parser.add_argument("--name", default="install-cpu", help="name of the result")
    parser.add_argument("--here", action="store_true", help="measure the environment that runs this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.here:
            measured = measure_environment(Path(sys.executable), Path(folder), options.extras)
        else:
            measured = measure(Path(folder) / "venv", options.extras)
    kinds = ("seconds_to_start", "processor_seconds_to_start")
    times = {kind: {name: summarise(seconds) for name, seconds in measured[kind].items()} for kind in kinds}
    totals = sums(measured)
    for name, total in totals.items():
        print(f"{name:32}{total:10,.0f} MB")
    for name in START_UPS:
        clock, processor = (1000 * times[kind][name]["median"] for kind in kinds)
        print(f"{name:32}{clock:10,.0f} ms, of the processor {processor:,.0f}")
    save(options.name, measured | {"megabytes": totals, **times})


if __name__ == "__main__":
    main()
