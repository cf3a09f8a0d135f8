"""The tab Runs: the curves and samples of runs while they train."""

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st_ar.data.source import BrokenImageError, read_image
from st_ar.demo import html
from st_ar.demo.inputs import check_int
from st_ar.demo.setup import Setup
from st_ar.demo.tabs import FILE_QUEUE, gr, handler
from st_ar.errors import UserError, cause
from st_ar.figures import Drawing, line_chart
from st_ar.files import read_json
from st_ar.report import png_uri
from st_ar.settings import matches_type
from st_ar.training.run import read_log, trained_config

MAX_POINTS = 400
"""Largest number of points of a curve. Longer logs are thinned evenly; the last point is kept."""
CURVES = {
    "loss": ("next-token loss (nats per token)", {"loss_ar": "training", "validation_loss": "validation"}),
    "self-guidance": (
        "self-guidance losses",
        {"loss_mim": "MIM", "loss_step": "inter-step", "loss_view": "inter-view"},
    ),
    "probe": ("probe accuracy (%)", {"ridge_probe_top1": "ridge regression, not the MAE protocol"}),
}
"""Charts: title -> (label of the axis, key in the log -> label of the curve)."""
INTERVAL = 2.0
"""Seconds between checks of the run's folder while the demo is open."""
IDLE_SECONDS = 60
"""Time without new log entries after which a run is not shown as training."""


def stamp(run: Path) -> tuple[float, int, int]:
    """Return the log's time and size and the number of sample grids. They change when a run has new results."""
    try:
        log = (run / "log.jsonl").stat()
    except OSError:
        return 0.0, 0, len(sample_steps(run))
    return log.st_mtime, log.st_size, len(sample_steps(run))


def sample_steps(run: Path) -> tuple[int, ...]:
    """Return the steps with a grid of samples in a run's folder."""
    names = [path.stem.removeprefix("step_") for path in (run / "samples").glob("step_*.png")]
    return tuple(sorted(int(name) for name in names if name.isdecimal()))


def read_history(run: Path, name: str) -> tuple[str, dict[str, Drawing]]:
    """Return a run's state in one line and its charts by title; UserError if its log is missing, empty or damaged."""
    log = read_log(run / "log.jsonl")
    if not log:
        raise UserError(f"{run} has no log yet: it appears here after its first logged step")
    charts: dict[str, Drawing] = {}
    for title, (axis, labels) in CURVES.items():
        curves = {label: _points(log, key) for key, label in labels.items()}
        curves = {label: curve for label, curve in curves.items() if any(curve[1])}  # unused losses are logged as 0
        if curves:
            few = all(len(xs) <= 12 for xs, _ in curves.values())
            charts[title] = line_chart(curves, name=f"{title} of {name}", x="optimizer step", y=axis, markers=few)
    speeds = [entry["tokens_per_second"] for entry in log if matches_type(entry.get("tokens_per_second"), float)]
    speed = f", {speeds[-1]:,.0f} tokens/s" if speeds else ""
    age, step, total = time.time() - stamp(run)[0], log[-1]["step"], _total_steps(run)
    state = "training" if age < IDLE_SECONDS else f"no new log entries for {_duration(age)}"
    of, state = (f" of {total:,}", "finished" if step == total else state) if total else ("", state)
    return f"{name}: step {step:,}{of}{speed}; {state}.", charts


def _total_steps(run: Path) -> int | None:
    """The steps that a run trains for; None if its config.json does not say so."""
    try:
        return trained_config(run).total_steps(read_json(run / "config.json", "a run")["tokens"]["images"])
    except (UserError, KeyError, TypeError):
        return None


def _points(log: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """The steps and values logged under a key."""
    factor = 100 if key == "ridge_probe_top1" else 1  # per cent
    points = [(float(entry["step"]), factor * entry[key]) for entry in log if matches_type(entry.get(key), float)]
    stride = max(1, -(-len(points) // MAX_POINTS))
    points = points[::-1][::stride][::-1]  # keeps the last one
    return [x for x, _ in points], [y for _, y in points]


def read_sample(run: Path, step: int) -> Image.Image:
    """Read the grid of samples of a step; UserError if it is missing or damaged."""
    if step not in sample_steps(run):
        raise UserError(f"{run} has no samples of step {step}")
    path = run / "samples" / f"step_{step:08d}.png"
    try:
        return read_image(path)
    except BrokenImageError as error:
        raise UserError(f"{path} cannot be read ({cause(error)}): it may still be being written") from error


def _duration(seconds: float) -> str:
    for length, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} seconds"


def runs_tab(setup: Setup) -> None:
    """Build the tab."""
    runs = setup.runs
    if not runs:
        gr.HTML(html.note("There are no runs to show: start the demo with --runs RUN, or with a run as --model."))
        return
    names = list(runs)

    def find(name: Any) -> Path:
        if not isinstance(name, str) or name not in runs:
            raise UserError(f"no run is called {name!r}: choose one of {', '.join(runs)}")
        return runs[name]

    def refresh(name: Any, before: Any) -> tuple[Any, Any, Any]:
        run = find(name)
        now = (name, *stamp(run))
        if now == before:
            return gr.skip(), gr.skip(), gr.skip()
        try:
            state, drawings = read_history(run, name)
        except UserError as error:
            return html.note(str(error)), now, gr.skip()
        charts = "".join(html.chart(drawing.svg(), title.capitalize()) for title, drawing in drawings.items())
        slider: Any = gr.skip()  # stays at an older grid until there is a newer one
        if before is None or (before[0], before[-1]) != (now[0], now[-1]):
            newest = now[-1] - 1
            slider = gr.update(maximum=max(1, newest), value=max(0, newest), visible=newest > 0)
        return f'{html.note(state)}<div class="charts">{charts}</div>', now, slider

    def show(name: Any, index: Any, _stamp: Any) -> Any:
        run = find(name)
        steps = sample_steps(run)
        if not steps:
            return html.note("This run has no samples: train with --sample-every and --sample-tokenizer.")
        step = steps[min(check_int(index, "the sample", 0, 1 << 30), len(steps) - 1)]
        uri, alt = png_uri(np.asarray(read_sample(run, step))), escape(f"samples of {name} at step {step}")
        caption = f"Samples after step {step:,}. Classes and random numbers are the same for every step."
        return f'<figure class="wide"><img src="{uri}" alt="{alt}"><figcaption>{caption}</figcaption></figure>'

    last = gr.State(None)
    chosen = gr.Dropdown(names, value=names[0], label="Run", elem_id="runs-name")
    curves = gr.HTML("", elem_id="runs-curves")
    index = gr.Slider(0, 1, 0, step=1, label="Samples, oldest to newest", visible=False, elem_id="runs-which")
    samples = gr.HTML("", elem_id="runs-samples")
    for trigger in (gr.Timer(INTERVAL).tick, chosen.change):
        trigger(handler(refresh), [chosen, last], [curves, last, index], **FILE_QUEUE)
    for trigger in (last.change, index.input):
        trigger(handler(show), [chosen, index, last], [samples], **FILE_QUEUE)
