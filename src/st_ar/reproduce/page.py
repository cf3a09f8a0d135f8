"""Results beside the paper's numbers: on the terminal, as an HTML report, JSON and CSV."""

import shlex
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from st_ar.config import ModelConfig
from st_ar.evaluation.attention_report import GLOSSARY
from st_ar.figures import line_chart
from st_ar.files import write_csv, write_json
from st_ar.hardware import choose_device, choose_dtype, describe, flops_per_token
from st_ar.model.transformer import Transformer
from st_ar.report import (
    Chart,
    Gallery,
    Section,
    Spread,
    Table,
    difference,
    is_noise,
    png_uri,
    print_table,
    write_report,
)
from st_ar.reproduce.paper import CONTROL, Recipe
from st_ar.reproduce.plan import ATTENTION, TIME, TOKENS, Plan, is_done, measurements, probe_curve
from st_ar.selfguided.losses import next_token_loss

PAPER = {
    "fid": "paper: FID",
    "sfid": "paper: sFID",
    "is": "paper: IS",
    "precision": "paper: precision",
    "recall": "paper: recall",
    "probe": "paper: probe, %",
}
ATTENTION_TITLE = "Attention of the layer at half depth"
SHOWN = ("layer-*-mean.png", "curve.png", "views.png")
"""Figures of `attention` and `invariance` that the report shows."""
DIGITS = {
    "class accuracy": 1,
    f"{ATTENTION}: on the": 3,
    "probe": 1,
    "precision": 3,
    "recall": 3,
    "validation": 3,
    TOKENS: 2,
    TIME: 2,
}


def show(name: str, plan: Plan) -> None:
    """Print the table, and write NAME.html, NAME.json and NAME.csv to the plan's folder."""
    experiment = plan.experiment
    measured = {label: measurements(files, experiment.metrics) for label, files in plan.files.items()}
    papers = {row.label: {PAPER[key]: Spread((value,)) for key, value in row.paper.items()} for row in experiment.rows}
    known = [label for label in PAPER.values() if any(label in paper for paper in papers.values())]
    columns = [*known, *dict.fromkeys(key for spreads in measured.values() for key in spreads)]
    cells = {label: papers[label] | spreads for label, spreads in measured.items()}
    attention = [column for column in columns if column.startswith(ATTENTION)]
    tables = [make_table([column for column in columns if column not in attention], cells)]
    if attention:
        tables.append(make_table(attention, cells, caption=f"{ATTENTION_TITLE}. {GLOSSARY}"))
    for title, table in zip((experiment.title, ATTENTION_TITLE), tables, strict=False):
        print(f"\n{title}\n")
        print_table(table.columns, table.rows)
    notes = _notes(plan, measured)
    print("\n" + "\n".join(notes))
    parts: list[Table | Chart | Gallery] = [*tables]
    out = plan.work / f"{name}.html"
    if experiment.figure == "length":
        parts += [Chart(svg=svg) for svg in _length_charts(plan, measured, out)]
    elif curves := _probe_curves(plan):
        drawing = line_chart(
            curves,
            name="probe accuracy by step",
            x="step",
            y="accuracy (%)",
            x_ticks=next(iter(curves.values()))[0],
            label_ends=True,
        )
        drawing.save(out.with_name(f"{name}-probe.svg"))
        parts.append(
            Chart(
                svg=drawing.svg(),
                caption="Probe accuracy by step: at step t the network has read the class and t - 1 tokens.",
            )
        )
    parts += [_picture(path) for folder in plan.figures for pattern in SHOWN for path in sorted(folder.glob(pattern))]
    record = {
        "preset": plan.scale.guided,
        "paper": {row.label: dict(row.paper) for row in experiment.rows},
        "measured": {label: {key: s.describe() for key, s in spreads.items()} for label, spreads in measured.items()},
        "commands": [list(stage.command) for stage in plan.stages],
        "date": datetime.now(UTC).date().isoformat(),
        "environment": describe(),
    }
    write_json(out.with_suffix(".json"), record)
    write_csv(out.with_suffix(".csv"), ["", *columns], make_table(columns, cells).rows)
    sections = [
        Section(title="Measured and published results" if known else "Measured", paragraphs=notes, parts=parts),
        Section(title="Commands", commands=[f"st-ar {shlex.join(stage.command)}" for stage in plan.stages]),
    ]
    lead = "The data and sizes are those of the commands below."
    lead += " The paper's numbers are for ImageNet at 256 pixels." if known else ""
    write_report(out, title=experiment.title, lead=lead, sections=sections)
    for path in [out, *plan.figures]:
        print(path)


def make_table(columns: Sequence[str], cells: Mapping[str, Mapping[str, Spread]], caption: str = "") -> Table:
    """Return a table with a row per method; a dash for a missing measurement."""
    digits = [next((d for start, d in DIGITS.items() if column.startswith(start)), 2) for column in columns]
    rows = [
        [label, *(s.text(d) if (s := spreads.get(c)) else "-" for c, d in zip(columns, digits, strict=True))]
        for label, spreads in cells.items()
    ]
    header = [column.removeprefix(f"{ATTENTION}: ") for column in columns]
    return Table(columns=["", *header], rows=rows, caption=caption)


def _picture(path: Path) -> Gallery:
    with Image.open(path) as picture:
        uri = png_uri(np.asarray(picture.convert("RGB")))
    return Gallery(columns=[""], rows=[("", [uri])], caption=f"{path.parent.name}/{path.name}")


def _notes(plan: Plan, measured: Mapping[str, Mapping[str, Spread]]) -> list[str]:
    """Return notes on seeds, budgets, and differences within noise."""
    seeds = len(next(iter(plan.files.values())).runs)
    notes = [
        f"{seeds} seeds: mean ± standard deviation." if seeds > 1 else "One seed: differences have no error bars.",
        "Rows train for equal steps of equal batches unless stated. With two views a step reads twice the tokens.",
    ]
    base = CONTROL.label if CONTROL.label in measured else next(iter(measured))
    for label, spreads in measured.items():
        for key, spread in spreads.items():
            compared = label != base and key not in (TOKENS, TIME) and key in measured[base]
            if compared and is_noise(difference(spread, measured[base][key])):
                notes.append(f"{label}, {key}: the difference from {base} is within noise.")
    return notes


def _length_charts(plan: Plan, measured: Mapping[str, Mapping[str, Spread]], page: Path) -> list[str]:
    """Draw each measurement over the tokens read, a curve per method and weights."""
    charts: list[str] = []
    for prefix, short in (("F", "distance"), ("probe", "probe"), ("validation", "loss")):
        curves: dict[str, tuple[list[float], list[float]]] = {}
        label = ""
        for row in plan.experiment.rows:
            for key, spread in measured[row.label].items():
                if key.startswith(prefix):
                    label, ema, _ = key.partition(", EMA")
                    xs, ys = curves.setdefault(row.method + ema, ([], []))
                    xs.append(measured[row.label][TOKENS].mean)
                    ys.append(spread.mean)
        if curves:
            drawing = line_chart(curves, name=f"{label} by tokens read", x=TOKENS, y=label, label_ends=True)
            drawing.save(page.with_name(f"{page.stem}-{short}.svg"))
            charts.append(drawing.svg())
    return charts


def _probe_curves(plan: Plan) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """Return probe accuracies in % over the steps, averaged over seeds, a curve per row and weights."""
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for label, files in plan.files.items():
        for (command, weights), paths in files.results.items():
            if command == "probe":
                steps, top1 = zip(*map(probe_curve, paths), strict=True)
                mean = [100 * statistics.fmean(values) for values in zip(*top1, strict=True)]
                curves[label + (", EMA" if weights == "ema" else "")] = steps[0], mean
    return curves


def print_plan(plan: Plan, work: Path) -> None:
    """Print the remaining commands, their training time on this machine, and their disk space."""
    remaining = [stage for stage in plan.stages if not is_done(stage.makes, work)]
    print("\n".join(f"st-ar {shlex.join(stage.command)}" for stage in remaining))
    done = len(plan.stages) - len(remaining)
    flops, disk = sum(stage.flops for stage in remaining), sum(stage.disk for stage in remaining)
    rate = training_rate(plan.scale.config(Recipe(guided=False), 0)[1].model)
    machine = describe()
    device = machine.get("gpu", f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}")
    print(f"\n{len(remaining)} commands" + (f" ({done} more are done)" if done else ""))
    print(
        f"training: {flops:.3g} FLOPs; at {rate:.3g} FLOP/s, measured with the smallest model on this machine ({device}), "
        f"{flops / rate / 3600:,.1f} device-hours, without tokenizing, sampling and measuring"
    )
    unknown = "" if plan.scale.image_count else ", without the tokens"
    folder = next(path for path in (work, *work.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    print(f"disk: {disk / 1e9:,.1f} GB at most{unknown}; {free / 1e9:,.1f} GB are free at {folder}")


def training_rate(config: ModelConfig, *, seconds: float = 3.0) -> float:
    """Measure the FLOP/s of forward and backward on this machine, in training's dtype."""
    device = choose_device("auto")
    flops = 3 * sum(flops_per_token(config))
    count = 64
    if device.type == "cpu":  # one sequence of size B takes seconds
        count = min(count, max(1, int(3e11 / (flops * config.sequence_length))))
    model = Transformer(config).to(device)
    tokens = torch.randint(config.vocab_size, (count, config.sequence_length), device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    dtype = choose_dtype("auto", device)

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(tokens[:, :-1], labels).logits
        next_token_loss(logits, tokens).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    steps, start = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - start < seconds:
        step()
        steps += 1
    return steps * tokens.numel() * flops / (time.perf_counter() - start)
