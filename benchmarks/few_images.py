"""Does self-guidance help where plain training overfits? CIFAR-10's presets on few images, longer than suits AR.

    python benchmarks/few_images.py --images 'cifar10/train*.parquet' --test-images 'cifar10/test*.parquet' --count 2000 --out few

The first --count images alone are trained on (k-means tokens, ten crops, a constant learning rate). The averaged weights of every
so many steps are measured on all test images: validation loss, probe, and samples against the decoded tokens of the test images.
The same command again goes on where one was stopped.
"""

import argparse
import glob
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from common import save
from st_ar.cli import run_command
from st_ar.errors import UserError
from st_ar.figures import line_chart
from st_ar.reproduce.plan import Stage, likelihood, probe_curve, run_stages

METHODS = {
    "control": ("llamagen-cifar10",),
    "ST-AR": ("st-ar-cifar10",),
    "contrast alone": ("st-ar-cifar10", "--selfguided.alpha", "0", "--selfguided.mask-ratio", "0"),
}
LABELS = {"control": "AR, 2 views (control)", "ST-AR": "ST-AR", "contrast alone": "contrast alone"}
CODES = 512
SAMPLES = 5000
LOSSES = "validation loss by step"
CHECKED = 50
"""Steps between two measurements of the validation loss."""


def first_images(pattern: str, count: int, out: Path) -> None:
    """The first rows of some parquet files as a file of their own."""
    paths = sorted(glob.glob(pattern))  # noqa: PTH207
    if not paths:
        sys.exit(f"--images {pattern} matches no file here")
    pyarrow.parquet.write_table(pyarrow.concat_tables(map(pyarrow.parquet.read_table, paths)).slice(0, count), out)


def data_stages(out: Path, train: str, few: Path, test: str) -> list[Stage]:
    """Tokens, and what samples are measured against."""
    tokenizer, decoded = str(out / "tokenizer"), str(out / "decoded")
    size = ("--size", "32")

    def stage(makes: str, *command: str) -> Stage:
        return Stage(name=makes, command=command, makes=out / makes)

    def tokens(name: str, images: str, *crops: str) -> Stage:
        how = ("--images", images, "--tokenizer", tokenizer, *size, *crops, "--workers", "0")
        return stage(name, "tokenize", *how, "--out", str(out / name))

    images = ("--images", train, *size, "--vocab-size", str(CODES))
    rebuilt = ("--images", test, "--tokenizer", tokenizer, *size, "--extractor", "none", "--save", decoded)
    reference = str(out / "reference.npz")
    return [
        stage("tokenizer", "train-tokenizer", "kmeans", *images, "--out", tokenizer),
        tokens("tokens-few", f"parquet:{few}", "--crop-range", "1.125"),
        tokens("tokens-test", test, "--crops", "center"),
        stage("decoded", "reconstruct", *rebuilt),
        stage("reference.npz", "reference", decoded, "--extractor", "efficientnet", "--out", reference),
    ]


class Measured:
    """Where the measurements of a run's averaged weights after some step lie."""

    def __init__(self, run: Path, step: int) -> None:
        def beside(what: str) -> Path:
            return run.with_name(f"{run.name}-step{step}-ema-{what}")

        self.samples, self.evaluation = beside("samples.npz"), beside("evaluation.json")
        self.probe, self.likelihood = beside("probe.json"), beside("likelihood.json")

    def read(self) -> dict[str, Any]:
        """The numbers."""
        return {
            **json.loads(self.evaluation.read_text(encoding="utf-8"))["metrics"],
            "validation loss": likelihood(self.likelihood),
            "probe, %": [100 * share for share in probe_curve(self.probe)[1]],
        }


def method_stages(out: Path, method: str, seed: int, steps: int, every: int) -> list[Stage]:
    """A run, and the measurements of its averaged weights after every so many steps."""
    run = out / "runs" / f"{method.replace(' ', '-')}-seed{seed}"
    preset, *settings = METHODS[method]
    tokens = ("--tokens", str(out / "tokens-few"), "--validation", str(out / "tokens-test"))
    length = ("--steps", str(steps), "--checkpoint-every", str(CHECKED), "--keep-every", str(every))
    trained = ("--compile", "--model.vocab-size", str(CODES), "--optim.schedule", "constant", "--seed", str(seed))
    command = ("train", preset, *tokens, "--out", str(run), *length, *trained, *settings)
    stages = [Stage(name=run.name, command=command, makes=run)]
    for step in range(every, steps + 1, every):
        files = Measured(run, step)
        model = ("--model", str(run / "kept" / f"step_{step:08d}"))
        how = ("--num", str(SAMPLES), "--cfg-scale", "1", "--seed", str(seed), "--ema")
        drawn = ("--tokenizer", str(out / "tokenizer"), *how)
        judged = ("--reference", str(out / "reference.npz"), "--extractor", "efficientnet")
        probed = ("--tokens", str(out / "tokens-few"), "--test-tokens", str(out / "tokens-test"), "--weights", "ema")
        commands = {
            files.samples: ("sample", *model, *drawn, "--out"),
            files.evaluation: ("evaluate", str(files.samples), *judged, "--json"),
            files.probe: ("probe", *model, *probed, "--out"),
            files.likelihood: ("likelihood", *model, "--tokens", str(out / "tokens-test"), "--weights", "ema", "--out"),
        }
        stages += [
            Stage(name=makes.name, command=(*command, str(makes)), makes=makes) for makes, command in commands.items()
        ]
    return stages


def curve(run: Path) -> dict[int, float]:
    """The averaged weights' validation loss (of 1,024 images) by step, from the run's log."""
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def main() -> None:
    """Make what is missing, read, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="parquet files of the training images")
    parser.add_argument("--test-images", required=True)
    parser.add_argument("--count", type=int, default=2000, help="images to train on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--every", type=int, default=250, help=f"measure after every so many steps, a multiple of {CHECKED}"
    )
    parser.add_argument("--figure", type=Path, help="SVG of the validation losses from step 200 on")
    parser.add_argument("--name", default="few-images")
    given = parser.parse_args()
    if given.every % CHECKED:
        parser.error(f"--every {given.every} is no multiple of {CHECKED}")
    out: Path = given.out
    (out / "runs").mkdir(parents=True, exist_ok=True)
    few = out / f"first-{given.count}.parquet"
    first_images(given.images, given.count, few)
    stages = data_stages(out, f"parquet:{given.images}", few, f"parquet:{given.test_images}")
    results: dict[str, Any] = {}
    for method in given.methods:
        run, *measured = method_stages(out, method, given.seed, given.steps, given.every)
        try:
            run_stages([*stages, run, *measured], out, run_command)
        except UserError as error:
            sys.exit(str(error))
        steps = range(given.every, given.steps + 1, given.every)
        results[LABELS[method]] = {
            LOSSES: curve(run.makes),
            "measured after": {step: Measured(run.makes, step).read() for step in steps},
        }
    print(f"\n{'':22}{'steps':>6}{'FD':>8}{'recall':>8}{'loss':>8}{'probe':>7}")
    for method, found in results.items():
        for step, numbers in found["measured after"].items():
            distance, recall = (next(v for k, v in numbers.items() if k.startswith(start)) for start in ("F", "recall"))
            last = numbers["probe, %"][-1]
            print(f"{method:22}{step:6}{distance:8.2f}{recall:8.3f}{numbers['validation loss']:8.3f}{last:7.1f}")
    if given.figure:
        late = {
            method: ([step for step in found[LOSSES] if step >= 200], [v for s, v in found[LOSSES].items() if s >= 200])
            for method, found in results.items()
        }
        name = f"Validation loss of the EMA weights, trained on {given.count:,} images"
        line_chart(late, name=name, x="step", y="validation loss (nats per token)").save(given.figure)
    save(given.name, results)


if __name__ == "__main__":
    main()
