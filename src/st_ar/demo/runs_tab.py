"""The demo's tab of runs: their curves, while they train."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from st_ar.data.source import BrokenImageError, read_image
from st_ar.demo import html
from st_ar.demo.inputs import whole
from st_ar.demo.setup import Setup
from st_ar.demo.tabs import BESIDE, gr, told
from st_ar.errors import UserError, cause
from st_ar.figures import Drawing, line_chart
from st_ar.settings import matches_type
from st_ar.training.run import read_log

POINTS = 400
"""Of a line at most; a longer log is thinned evenly, its last point kept."""
CURVES = {
    "loss": ("next-token loss (nats per token)", {"loss_ar": "training", "validation_loss": "validation"}),
    "self-guidance": (
        "other terms of the loss",
        {"loss_mim": "MIM", "loss_step": "inter-step", "loss_view": "inter-view"},
    ),
    "probe": ("quick probe's accuracy (%)", {"ridge_probe_top1": "ridge regression, not the MAE protocol"}),
}
"""Charts: what the axis says, and the log's names of the lines."""
PERCENT = ("ridge_probe_top1",)


@dataclass(frozen=True, kw_only=True)
class History:
    """A run as it is now."""

    name: str
    step: int
    """The last that was logged."""
    speed: float | None
    """Tokens a second, of the last logged stretch."""
    age: float
    """Seconds since the log was written on."""
    charts: dict[str, Drawing]
    samples: tuple[int, ...]
    """Steps whose samples are there."""


def stamp(run: Path) -> tuple[float, int, int]:
    """What changes when there is something new: the log's time and size, and how many grids of samples there are."""
    try:
        known = (run / "log.jsonl").stat()
    except OSError:
        return 0.0, 0, len(sample_steps(run))
    return known.st_mtime, known.st_size, len(sample_steps(run))


def sample_steps(run: Path) -> tuple[int, ...]:
    """The steps of the grids of samples in a run's folder."""
    names = [path.stem.removeprefix("step_") for path in (run / "samples").glob("step_*.png")]
    return tuple(sorted(int(name) for name in names if name.isdecimal()))


def read_history(run: Path, name: str) -> History:
    """What there is.

    Raises:
        UserError: no log yet, a damaged one, or no matplotlib.
    """
    log = read_log(run / "log.jsonl")
    if not log:
        raise UserError(f"{run} has logged nothing yet: it appears here when it has")
    charts: dict[str, Drawing] = {}
    for title, (axis, lines) in CURVES.items():
        found = {words: _points(log, key) for key, words in lines.items()}
        series = {
            words: points for words, points in found.items() if any(points[1])
        }  # of plain training some are all 0
        if series:
            few = all(len(xs) <= 12 for xs, _ in series.values())
            charts[title] = line_chart(series, name=f"{title} of {name}", x="optimizer step", y=axis, markers=few)
    speeds = [entry["tokens_per_second"] for entry in log if matches_type(entry.get("tokens_per_second"), float)]
    return History(
        name=name,
        step=log[-1]["step"],
        speed=speeds[-1] if speeds else None,
        age=max(0.0, time.time() - stamp(run)[0]),
        charts=charts,
        samples=sample_steps(run),
    )


def _points(log: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of what was logged under a name."""
    factor = 100 if key in PERCENT else 1
    found = [(float(entry["step"]), factor * entry[key]) for entry in log if matches_type(entry.get(key), float)]
    stride = -(-len(found) // POINTS)
    kept = found[::-1][:: max(1, stride)][::-1]  # the last one stays
    return [x for x, _ in kept], [y for _, y in kept]


def read_sample(run: Path, step: int) -> Image.Image:
    """The grid of samples of a step.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if step not in sample_steps(run):
        raise UserError(f"{run} has no samples of step {step}")
    path = run / "samples" / f"step_{step:08d}.png"
    try:
        return read_image(path)
    except BrokenImageError as error:
        raise UserError(f"{path} cannot be read ({cause(error)}): it may be written just now") from error


EVERY = 2.0
"""Seconds between two looks at the run's folder, while the page is open."""
IDLE = 60
"""Seconds without a new line after which a run is no longer said to be training."""


def describe(history: History) -> str:
    """A run in one line."""
    state = "training" if history.age < IDLE else f"nothing new for {_duration(history.age)}"
    speed = f", {history.speed:,.0f} tokens a second" if history.speed else ""
    return f"{history.name}: step {history.step:,}{speed}; {state}."


def _duration(seconds: float) -> str:
    for length, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} seconds"


def runs_tab(setup: Setup) -> None:
    """Build the tab."""
    runs = setup.runs
    if not runs:
        gr.HTML(html.note("No run is given: start the page with --runs RUN, or with a run's folder as --model."))
        return
    names = list(runs)

    def look(name: Any, before: Any) -> tuple[Any, Any, Any]:
        run = _find(name)
        now = (name, *stamp(run))
        if now == before:
            return gr.skip(), gr.skip(), gr.skip()
        try:
            history = read_history(run, name)
        except UserError as error:
            return html.note(str(error)), now, gr.skip()
        charts = [html.chart(drawing.svg(), title.capitalize()) for title, drawing in history.charts.items()]
        steps = history.samples
        newest = len(steps) - 1
        slider: Any = gr.skip()  # stays where it is until there is a newer grid
        if before is None or (before[0], before[-1]) != (now[0], now[-1]):
            slider = gr.update(maximum=max(1, newest), value=max(0, newest), visible=newest > 0)
        return html.note(describe(history)) + html.row(charts), now, slider

    def show(name: Any, which: Any, _stamp: Any) -> Any:
        run = _find(name)
        steps = sample_steps(run)
        if not steps:
            return html.note("This run keeps no samples: train with --sample-every and --sample-tokenizer.")
        step = steps[min(whole(which, "the sample", 0, 1 << 30), len(steps) - 1)]
        uri = html.image_uri(read_sample(run, step))
        return html.picture(
            uri,
            f"samples of {name} at step {step}",
            f"Samples after step {step:,}, of the same classes and draws each time.",
        )

    def _find(name: Any) -> Any:
        if not isinstance(name, str) or name not in runs:
            raise UserError(f"no run is called {name!r}: choose one of {', '.join(runs)}")
        return runs[name]

    seen = gr.State(None)
    chosen = gr.Dropdown(names, value=names[0], label="Run", elem_id="runs-name")
    curves = gr.HTML("", elem_id="runs-curves")
    which = gr.Slider(
        0, 1, 0, step=1, label="Samples, from the first to the newest", visible=False, elem_id="runs-which"
    )
    samples = gr.HTML("", elem_id="runs-samples")
    for trigger in (gr.Timer(EVERY).tick, chosen.change):
        trigger(told(look), [chosen, seen], [curves, seen, which], **BESIDE)
    seen.change(told(show), [chosen, which, seen], [samples], **BESIDE)
    which.input(told(show), [chosen, which, seen], [samples], **BESIDE)
