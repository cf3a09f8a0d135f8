"""Wall-clock time and peak memory of the quickstart, as a user runs it, and what it found for several seeds.

python benchmarks/quickstart.py --seeds 0 1 2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import save
from st_ar.quickstart import LABELS
from st_ar.report import Spread


def run(images: str, seed: int) -> dict[str, Any]:
    """One quickstart in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quickstart"
        begun = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "st_ar",
            "quickstart",
            "--out",
            str(out),
            "--images",
            images,
            "--seed",
            str(seed),
        ]
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"the quickstart failed with status {status}")
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        page = (out / "report.html").stat().st_size
    found = {
        label: {
            "probe_top1": summary[method]["probe"]["top1"],
            "class_accuracy": summary[method]["class_accuracy"],
            "validation_loss": summary[method]["validation_loss"],
            "frechet_regions": summary[method]["frechet"],
            "seconds_per_step": summary[method]["seconds_per_step"],
        }
        for method, label in LABELS.items()
    }
    return {
        "seconds": time.perf_counter() - begun,
        "peak_mib": usage.ru_maxrss / 1024,
        "page_bytes": page,
        "steps": summary["steps"],
        "class_accuracy_of_decoded_test_images": summary["class_accuracy_of_decoded_test_images"],
        "step_time_ratio": summary["step_time_ratio"],
        "step_time_ratio_contrast": summary["step_time_ratio_contrast"],
        **found,
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", choices=["photos", "digits"], default="photos")
    parser.add_argument("--name", help="of the result; quickstart-IMAGES by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    runs = {seed: run(given.images, seed) for seed in given.seeds}
    print(f"{'seed':6}{'seconds':>9}{'peak MiB':>10}")
    for seed, r in runs.items():
        print(f"{seed:<6}{r['seconds']:9.0f}{r['peak_mib']:10.0f}")
    summary: dict[str, Any] = {"seconds_median": statistics.median(r["seconds"] for r in runs.values())}
    for method in LABELS.values():
        for name, pick in (
            ("probe_last_step", lambda m: m["probe_top1"][-1]),
            ("class_accuracy", lambda m: m["class_accuracy"]),
            ("validation_loss", lambda m: m["validation_loss"]),
            ("frechet_regions", lambda m: m["frechet_regions"]),
        ):
            values = [pick(r[method]) for r in runs.values()]
            summary[f"{method} {name}"] = Spread(tuple(values)).describe()
            print(f"{method:26} {name:18} " + " ".join(f"{value:.4f}" for value in values))
    save(given.name or f"quickstart-{given.images}", {"runs": runs, "summary": summary})


if __name__ == "__main__":
    main()
