"""The tab that follows runs: their losses, probes and samples, live while they train."""

from typing import Any

from st_ar.demo import html
from st_ar.demo.history import History, read_history, read_sample, sample_steps, stamp
from st_ar.demo.inputs import whole
from st_ar.demo.setup import Setup
from st_ar.demo.widgets import BESIDE, gr, told
from st_ar.errors import UserError

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
