"""Keep what `st-ar reproduce` has made: its tables and figures, and each run's settings, log and measurements. Small files, to commit.

    python benchmarks/collect.py reproduced --name reproduced table3 questions
    python benchmarks/collect.py cifar10 --name cifar10 evidence cheaper --runs
    python benchmarks/collect.py elsewhere/cifar10 --name cifar10 evidence --runs --no-tables

A table has the rows of one call of `reproduce` alone. Runs of several, made in folders of their own, are kept beside each other without
the tables; benchmarks/kept_runs.py makes one of them all.

In what is kept the folder has the name given, wherever it lay, and so have the images' files.
"""

import argparse
import json
import re
from pathlib import Path

from common import RESULTS

FIGURES = ("{}.json", "{}.csv", "{}-*.svg", "{}-*.json")
MEASURED = r"(-step\d+)?(-ema)?-(probe|likelihood|((un)?guided|guidance).*\.evaluation)\.json"


def keep(source: Path, target: Path, work: Path, name: str) -> None:
    """Copy a text, its paths shortened."""
    text = source.read_text(encoding="utf-8")
    for path in (work.resolve(), work):
        text = re.sub(rf"(?<![\w./-]){re.escape(str(path))}(?![\w.-])", name, text)  # not a part of another name
    text = re.sub(r"(?<=[\"' :(])/[\w./-]*/(?=[\w*.-]+)", "", text)  # of a path elsewhere the last part
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text if text.endswith("\n") else f"{text}\n", encoding="utf-8")
    print(target)


def main() -> None:
    """Copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the --out of reproduce")
    parser.add_argument("tables", nargs="+", help="table3, questions, ..")
    parser.add_argument("--name", required=True, help="folder below benchmarks/results")
    parser.add_argument("--runs", action="store_true", help="also each run's config.json, log.jsonl and measurements")
    parser.add_argument("--no-tables", dest="table", action="store_false", help="with --runs: the runs alone")
    given = parser.parse_args()
    if not given.runs and not given.table:
        parser.error("--no-tables leaves nothing to keep without --runs")
    out = RESULTS / given.name
    used: set[str] = set()
    for table in given.tables:
        for pattern in FIGURES if given.table else ():
            for source in sorted(given.work.glob(pattern.format(table))):
                keep(source, out / source.name, given.work, given.name)
        for command in json.loads((given.work / f"{table}.json").read_text(encoding="utf-8"))["commands"]:
            if command[0] == "train":
                used.add(Path(command[command.index("--out") + 1]).name)
    if given.runs:
        if (classifier := given.work / "classifier" / "config.json").exists():
            keep(classifier, out / "classifier.json", given.work, given.name)
        for run in sorted(used):
            folder = given.work / "runs"
            for file in ("config.json", "log.jsonl"):
                keep(folder / run / file, out / "runs" / run / file, given.work, given.name)
            for source in sorted(folder.glob(f"{run}*")):
                if re.fullmatch(MEASURED, source.name.removeprefix(run)):
                    keep(source, out / "runs" / source.name, given.work, given.name)
            for source in sorted(folder.glob(f"{run}*-attention/statistics.json")):
                keep(source, out / "runs" / f"{source.parent.name}.json", given.work, given.name)


if __name__ == "__main__":
    main()
