"""The paper's rows as settings and commands."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

from st_ar.cli import spell_out
from st_ar.config import TrainConfig
from st_ar.errors import UserError
from st_ar.evaluation.attention import STATISTICS
from st_ar.files import write_json
from st_ar.hardware import parameters, training_flops, training_flops_per_token
from st_ar.presets import PRESETS, get_preset
from st_ar.reproduce.paper import CONTROL, EQUAL_TIME, EXPERIMENTS, SCALES, Recipe, Scale, ScaleName, options
from st_ar.reproduce.plan import Data, Files, Plan, measurements, run_name
from st_ar.settings import to_dict
from st_ar.training.run import append_log

PHOTOS = Data(images="photos:train", test_images="photos:test")
WORK = Path("work")


def config_of(name: str, row: str, scale: str = "imagenet") -> TrainConfig:
    recipe = next(found.recipe for found in EXPERIMENTS[name].rows if found.label == row)
    return SCALES[scale].config(recipe, 0)[1]


@pytest.mark.parametrize(
    ("name", "row", "preset"),
    [
        ("table3", "AR, 1 view", "llamagen-b-50"),
        ("table3", "+ MIM", "st-ar-b-50-mim"),
        ("table3", "+ MIM + step", "st-ar-b-50-mim-step"),
        ("table3", "+ MIM + view", "st-ar-b-50-mim-view"),
        ("table3", "+ MIM + step + view (ST-AR)", "st-ar-b-50"),
        ("table4", "r = 0.15", "st-ar-b-50-r15"),
        ("table4", "r = 0.25", "st-ar-b-50"),
        ("table4", "r = 0.35", "st-ar-b-50-r35"),
        ("table4", "r = 0.45", "st-ar-b-50-r45"),
        ("table5", "layer 3 of 12", "st-ar-b-50-layer3"),
        ("table5", "layer 6 of 12", "st-ar-b-50"),
        ("table5", "layer 9 of 12", "st-ar-b-50-layer9"),
        ("table5", "layer 12 of 12", "st-ar-b-50-layer12"),
        ("table6", "K = 2", "st-ar-b-50-k2"),
        ("table6", "K = 4", "st-ar-b-50"),
        ("table6", "K = 8", "st-ar-b-50-k8"),
        ("table6", "K = 16", "st-ar-b-50-k16"),
        ("table1", "LlamaGen-XL, 50 epochs", None),
        ("table1", "ST-AR-L, 300 epochs", "st-ar-l"),
        ("table2", "LlamaGen-L, 300 epochs", "llamagen-l"),
    ],
)
def test_a_row_at_full_size_is_its_preset(name: str, row: str, preset: str | None) -> None:
    if preset is None:
        assert config_of(name, row).epochs == 50
        assert config_of(name, row).model == get_preset("llamagen-xl").model
    else:
        assert config_of(name, row) == get_preset(preset)


def test_the_control_reads_the_same_views_without_guidance() -> None:
    control, guided = config_of("table3", "AR, 2 views (control)"), config_of("table4", "r = 0.25")
    assert (control.views, guided.views) == (2, 2)
    assert not control.selfguided.needs_teacher
    assert control.total_steps(1000) == guided.total_steps(1000)


RECIPES = {run_name(row.recipe): row.recipe for experiment in EXPERIMENTS.values() for row in experiment.rows}
"""Every recipe once."""


@pytest.mark.parametrize("scale", list(SCALES))
def test_the_options_reproduce_the_settings(scale: str) -> None:
    for recipe in RECIPES.values():
        preset, config = SCALES[scale].config(recipe, 3)
        default = replace(PRESETS[preset](), steps=config.steps, epochs=config.epochs)
        assert tyro.cli(TrainConfig, args=spell_out(options(PRESETS[preset](), config)), default=default) == config


def test_small_scales_count_epochs_in_steps_and_layers_by_depth() -> None:
    scale = SCALES["tiny"]
    assert scale.config(Recipe(), 0)[1].steps == 200
    assert scale.config(Recipe(epochs=300), 0)[1].steps == 1200
    assert scale.config(Recipe(epochs=300), 0, steps=10)[1].steps == 60
    layers = [config_of("table5", f"layer {n} of 12", "tiny").selfguided.layer(4) for n in (3, 6, 9, 12)]
    assert layers == [1, 2, 3, 4]
    model = scale.config(Recipe(), 0, fit={"num_classes": 7, "vocab_size": 99})[1].model
    assert (model.num_classes, model.vocab_size, model.dim) == (7, 99, 128)


def test_runs_that_tables_share_are_the_same_in_the_same_place() -> None:
    scale = SCALES["tiny"]
    plans = {name: Plan(EXPERIMENTS[name], scale, PHOTOS, WORK) for name in ("table3", "table4", "table6", "fig4")}
    commands: dict[Path, tuple[str, ...]] = {}
    for plan in plans.values():
        for stage in plan.stages:
            assert commands.setdefault(stage.makes, stage.command) == stage.command
    st_ar = [
        plans[name].files[row].runs for name, row in (("table4", "r = 0.25"), ("table6", "K = 4"), ("fig4", "ST-AR"))
    ]
    assert st_ar[0] == st_ar[1] == st_ar[2] == [WORK / "runs" / "st-ar-b-50-epochs-seed0"]


@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_other_images_than_the_scales_are_cropped_to_32_pixels(scale: ScaleName) -> None:
    own = Data(images="folder:train", test_images="folder:test")
    stages = {
        stage.makes.name: " ".join(stage.command)
        for stage in Plan(EXPERIMENTS["table3"], SCALES[scale], own, WORK).stages
    }
    assert "--size 32 --crop-range 1.125" in stages["tokens-training"]
    assert "--size 32 --crops center" in stages["tokens-test"]
    assert "folder:test --size 32" in stages["reference-efficientnet.npz"]
    assert ("--size 32" in stages["tokenizer"]) == (scale == "tiny")  # a VQ preset has its size
    photos = Plan(EXPERIMENTS["table3"], SCALES["tiny"], PHOTOS, WORK).stages
    assert not any("--size" in stage.command or "--crop-range" in stage.command for stage in photos)


def test_figure_4_has_the_papers_probe_numbers() -> None:
    assert {row.label: row.paper.get("probe") for row in EXPERIMENTS["fig4"].rows} == {
        "AR, 1 view": 18.68,
        "AR, 2 views (control)": None,
        "AR, 2 views, for the time of ST-AR": None,
        "ST-AR": 45.27,
    }


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_each_command_comes_after_what_it_reads(name: str) -> None:
    made: set[str] = set()
    stages = Plan(EXPERIMENTS[name], SCALES["tiny"], PHOTOS, WORK, seeds=(0, 1)).stages
    everything = {str(stage.makes) for stage in stages}
    for stage in stages:
        read = (set(stage.command) & everything) - {str(stage.makes)}
        assert read <= made, stage.name
        assert str(stage.makes) in stage.command
        made.add(str(stage.makes))
    assert len({stage.makes.name for stage in stages}) == len(stages)  # by which they are marked as done


def test_recipes_have_different_names() -> None:
    recipes = {str(row.recipe) for experiment in EXPERIMENTS.values() for row in experiment.rows}
    assert len(RECIPES) == len(recipes)


def test_each_seed_has_a_run() -> None:
    plan = Plan(EXPERIMENTS["table3"], SCALES["tiny"], PHOTOS, WORK, seeds=(0, 4))
    files = plan.files["AR, 1 view"]
    assert [run.name for run in files.runs] == ["ar-b-50-epochs-1-views-seed0", "ar-b-50-epochs-1-views-seed4"]
    assert len(files.results["evaluate", "live"]) == len(files.results["probe", "live"]) == 2
    train = next(stage for stage in plan.stages if stage.makes == files.runs[1])
    assert train.command[train.command.index("--seed") + 1] == "4"


def test_ema_weights_are_measured_too() -> None:
    plan = Plan(EXPERIMENTS["evidence"], SCALES["tiny"], PHOTOS, WORK, weights=("live", "ema"))
    live = Plan(EXPERIMENTS["evidence"], SCALES["tiny"], PHOTOS, WORK)
    files, commands = plan.files[CONTROL.label], {stage.makes: stage.command for stage in plan.stages}
    assert {stage.makes: stage.command for stage in live.stages}.items() <= commands.items()
    run = files.runs[0].name
    for command, option in (
        ("evaluate", ()),
        ("probe", ("--weights", "ema")),
        ("likelihood", ("--weights", "ema")),
        ("attention", ("--ema",)),
    ):
        live_result, ema_result = (files.results[command, weights][0] for weights in ("live", "ema"))
        assert live_result.name.startswith(f"{run}-")
        assert ema_result.name.startswith(f"{run}-ema-")
        assert set(option) <= set(commands[ema_result])
        assert not {"ema", "--ema"} & set(commands[live_result])
    sampled = [
        stage.command for stage in plan.stages if stage.command[0] == "sample" and str(files.runs[0]) in stage.command
    ]
    assert ["--ema" in command for command in sampled] == [False, True]


@pytest.mark.parametrize(
    ("name", "layers"), [("fig1", ["1", "2", "3", "4"]), ("fig2", ["1", "2", "3", "4"]), ("fig5", ["4"])]
)
def test_a_figures_maps_are_of_the_weights_and_layers_it_is_about(name: str, layers: list[str]) -> None:
    plan = Plan(EXPERIMENTS[name], SCALES["tiny"], PHOTOS, WORK, weights=("live", "ema"))
    live, averaged = [stage for stage in plan.stages if stage.command[0] == "attention"]
    assert plan.figures[:2] == [live.makes, averaged.makes]
    assert live.makes.name.replace("attention-", "attention-ema-") == averaged.makes.name
    assert ["--ema" in stage.command for stage in (live, averaged)] == [False, True]
    for command in (live.command, averaged.command):
        at = command.index("--layers") + 1
        assert list(command[at : at + len(layers) + 1]) == [*layers, "--tokens"]


def test_the_features_of_all_of_imagenets_crops_fit_into_their_cache() -> None:
    own = Data(images="folder:train", test_images="folder:val", tokenizer=Path("vq.pt"), reference="r.npz")
    plan = Plan(EXPERIMENTS["fig4"], SCALES["imagenet"], own, WORK)
    probes = [stage for stage in plan.stages if stage.command[0] == "probe"]
    limit = float(probes[0].command[probes[0].command.index("--cache-limit") + 1]) * 1e9
    images = 1_281_167 * 10 + 50_000
    stored = np.dtype(probes[0].command[probes[0].command.index("--cache-dtype") + 1]).itemsize
    assert images * 8 * get_preset("llamagen-xl").model.dim * stored < limit
    assert [stage.disk for stage in probes] == [limit] + [0] * (len(probes) - 1)


def test_the_quarters_of_a_long_run_are_measured_one_by_one() -> None:
    plan = Plan(EXPERIMENTS["length"], SCALES["small"], PHOTOS, WORK, steps=1202, weights=("ema",))
    train = [stage.command for stage in plan.stages if stage.command[0] == "train"]
    guided = [" ".join(word for word in command if "selfguided" in word) for command in train]
    unmasked = "--selfguided.alpha --selfguided.mask-ratio"
    assert guided == ["", "", unmasked, f"{unmasked} --selfguided.no-step-loss"]
    for command in train:
        assert command[command.index("--keep-every") + 1] == "300"
        assert command[command.index("--checkpoint-every") + 1] == "100"  # divides 300, as the preset's 500 does not
    run = WORK / "runs" / "ar-b-50-epochs-2-views-kept-seed0"
    for quarter, step in enumerate((300, 600, 900, 1200), start=1):
        files = plan.files[f"{CONTROL.label}, after {quarter}/4"]
        assert files.runs == [run]
        assert files.share == quarter / 4
        assert {weights for _, weights in files.results} == {"ema"}
        assert files.results["probe", "ema"] == [run.with_name(f"{run.name}-step{step}-ema-probe.json")]
        model = str(run / "kept" / f"step_{step:08d}")
        read = {stage.command[0] for stage in plan.stages if model in stage.command}
        assert read == {"sample", "probe", "likelihood"}


def test_a_run_too_short_for_quarters_is_refused() -> None:
    with pytest.raises(UserError, match="--steps must be at least 4"):
        Plan(EXPERIMENTS["length"], SCALES["small"], PHOTOS, WORK, steps=3)


def test_a_part_of_a_run_has_its_share_of_the_budgets(tmp_path: Path) -> None:
    config = get_preset("llamagen-photos")
    write_json(tmp_path / "config.json", {"config": to_dict(config)})
    append_log(tmp_path / "log.jsonl", {"step": 200, "tokens_per_second": 1000.0})
    whole, half = (measurements(Files(runs=[tmp_path], share=share), ()) for share in (1.0, 0.5))
    assert whole["tokens read (M)"].mean == 200 * config.batch_size * config.views * 64 / 1e6
    assert {name: spread.mean for name, spread in half.items()} == {
        name: spread.mean / 2 for name, spread in whole.items()
    }


def test_commands_that_read_images_get_the_size() -> None:
    plan = Plan(EXPERIMENTS["evidence"], SCALES["small"], PHOTOS, WORK)
    reading = [stage.command for stage in plan.stages if stage.command[0] in ("tokenize", "reference")]
    assert [command[0] for command in reading] == ["tokenize", "tokenize", "tokenize", "reference"]
    assert [command[command.index("--size") + 1] for command in reading] == ["32"] * 4


def test_two_rows_read_only_center_crops_with_one_view_per_step() -> None:
    plan = Plan(EXPERIMENTS["evidence"], SCALES["small"], PHOTOS, WORK)
    made = next(stage for stage in plan.stages if stage.makes.name == "tokens-centered")
    assert made.command[-6:-2] == ("--size", "32", "--crops", "center-mirror")
    trained = [stage for stage in plan.stages if stage.command[0] == "train" and str(made.makes) in stage.command]
    rows = ("AR, 1 view, centre crops and their mirror images", "+ step, 1 view, centre crops and their mirror images")
    assert [[stage.makes] for stage in trained] == [plan.files[row].runs for row in rows]
    assert [stage.command[stage.command.index("--views") + 1] for stage in trained] == ["1", "1"]


def test_equal_time_is_as_many_steps_as_self_guided_training_takes(tmp_path: Path) -> None:
    def steps_of_equal_time() -> int:
        plan = Plan(EXPERIMENTS["table3"], SCALES["tiny"], PHOTOS, tmp_path, seeds=(3,))
        stage = next(stage for stage in plan.stages if stage.name.startswith("train ") and "equal-time" in stage.name)
        return int(stage.command[stage.command.index("--steps") + 1])

    def trained(name: str, views: int, pace: list[float], *, done: bool = True) -> None:
        run = tmp_path / "runs" / f"{name}-seed3"
        run.mkdir(parents=True)
        write_json(run / "config.json", {"config": to_dict(replace(get_preset("llamagen-photos"), views=views))})
        for index, speed in enumerate(pace, start=1):
            append_log(run / "log.jsonl", {"step": 200 * index // len(pace), "tokens_per_second": speed})
        (tmp_path / "done").mkdir(exist_ok=True)
        write_json(tmp_path / "done" / f"{run.name}.json", {"command": ["train"], "seconds": 9.0 if done else None})

    guided, control = (SCALES["tiny"].config(recipe, 0)[1] for recipe in (Recipe(), CONTROL.recipe))
    by_flops = round(200 * training_flops(guided, 1) / training_flops(control, 1))
    assert 260 < by_flops < 270
    assert steps_of_equal_time() == by_flops
    trained("ar-b-50-epochs-2-views", 2, [1.0, 3000.0, 3100.0])
    trained("st-ar-b-50-epochs", 2, [2000.0], done=False)
    assert steps_of_equal_time() == by_flops  # one of the two is still under way
    write_json(tmp_path / "done" / "st-ar-b-50-epochs-seed3.json", {"command": ["train"], "seconds": 9.0})
    assert steps_of_equal_time() == 300
    begun = replace(get_preset("llamagen-photos"), views=2, steps=271)  # when it was not known how long the others take
    write_json(
        tmp_path / "runs" / "ar-b-50-epochs-2-views-equal-time-seed3" / "config.json", {"config": to_dict(begun)}
    )
    assert steps_of_equal_time() == 271


def test_a_rows_numbers_are_read_from_the_results_of_its_commands(tmp_path: Path) -> None:
    files = Files()
    for seed, (loss, top1) in enumerate([(2.5, 0.7), (2.25, 0.8)]):
        for name, content in (
            ("likelihood", {"results": [{"loss": loss}]}),
            ("probe", {"results": [{"steps": [8, 16], "top1": [0.1, top1]}]}),
            ("evaluate", {"metrics": {"FD-toy": 2 + seed, "precision": 0.5, "recall": 0.1}}),
        ):
            path = tmp_path / f"{name}{seed}.json"
            write_json(path, content)
            files.results[name, "live"].append(path)
        folder = tmp_path / f"attention{seed}"
        layers = {
            str(layer): {"over_heads": {"mean": dict.fromkeys(STATISTICS, float(layer + seed))}}
            for layer in range(1, 6)
        }
        write_json(folder / "statistics.json", {"models": {"run": {"layers": layers}}})
        files.results["attention", "ema"].append(folder)
    found = {name: spread.values for name, spread in measurements(files, ("fid", "precision")).items()}
    assert found == {
        "FD-toy": (2, 3),
        "precision": (0.5, 0.5),
        "probe, last step (%)": pytest.approx((70, 80)),
        "validation loss": (2.5, 2.25),
        **{
            f"attention at half depth: {name}, EMA": (2, 3)
            for name in ("on the class", "on the 3 x 3", "distance (tokens)", "entropy (nats)")
        },
    }


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_invalid_seeds_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="--seeds must be one or more different numbers of 0 or more"):
        Plan(EXPERIMENTS["table3"], SCALES["tiny"], PHOTOS, WORK, seeds=seeds)


def test_full_size_needs_a_tokenizer() -> None:
    with pytest.raises(UserError, match="give --tokenizer"):
        Plan(EXPERIMENTS["table3"], SCALES["imagenet"], PHOTOS, WORK)


@pytest.mark.parametrize(
    ("size", "millions"), [("b", 110.9), ("l", 342.9), ("xl", 774.7), ("xxl", 1411.0), ("3b", 3096.7)]
)
def test_parameters_are_counted_by_formula(size: str, millions: float) -> None:
    assert parameters(get_preset(f"llamagen-{size}").model) / 1e6 == pytest.approx(millions, abs=0.05)


def test_training_costs_three_passes_and_the_teachers() -> None:
    """The paper's models, MFLOP per token of body and head: B 174.6 / 25.2, XL 1486.4 / 41.9; ST-AR over AR 1.291 and 1.324."""
    for size, body, head, ratio in (("b", 174.6e6, 25.2e6, 1.291), ("xl", 1486.4e6, 41.9e6, 1.324)):
        plain, guided = get_preset(f"llamagen-{size}"), get_preset(f"st-ar-{size}")
        tokens = plain.total_steps(10_000) * 256 * 256
        assert training_flops(plain, 10_000) == pytest.approx(3 * (body + head) * tokens, rel=1e-3)
        assert training_flops(guided, 10_000) / training_flops(plain, 10_000) / 2 == pytest.approx(ratio, abs=1e-3)


def test_scales_name_presets_and_extractors_that_exist() -> None:
    scales: list[Scale] = list(SCALES.values())
    assert {scale.plain for scale in scales} | {scale.guided for scale in scales} <= PRESETS.keys()


def test_a_teacher_costs_what_it_runs() -> None:
    plain, guided = get_preset("llamagen-b"), get_preset("st-ar-b")

    def over_plain(**changes: Any) -> float:
        changed = replace(guided, selfguided=replace(guided.selfguided, **changes))
        return training_flops_per_token(changed) - training_flops_per_token(plain)

    whole = over_plain()
    assert over_plain(alpha=0.0) == pytest.approx(whole / 2)  # up to layer 6 of 12
    assert over_plain(alpha=0.0, contrast_layer=3) == pytest.approx(whole / 4)
    assert over_plain(every=4) == pytest.approx(whole / 4)
    assert over_plain(until=0.5) == pytest.approx(whole / 2)
    assert over_plain(alpha=0.0, beta=0.0) == 0


def test_an_equal_time_run_has_at_least_one_step() -> None:
    assert SCALES["tiny"].config(EQUAL_TIME.recipe, 0, steps=1, stretch=0.3)[1].steps == 1


def test_samples_of_each_guidance_scale_go_to_one_classifier() -> None:
    experiment = replace(EXPERIMENTS["classes"], rows=(CONTROL,))
    plan = Plan(experiment, SCALES["tiny"], replace(PHOTOS, mirror=False), WORK, weights=("live", "ema"))
    commands = [stage.command for stage in plan.stages]
    assert [command for command in commands if command[0] == "train-classifier"] == [
        (
            "train-classifier",
            *("--tokens", "work/tokens-training", "--test-tokens", "work/tokens-test"),
            *("--tokenizer", "work/tokenizer", "--out", "work/classifier"),
        )
    ]
    samples = [command for command in commands if command[0] == "sample"]
    assert [(c[c.index("--cfg-scale") + 1], "--ema" in c) for c in samples] == [
        (scale, ema) for ema in (False, True) for scale in ("1", "1.25", "1.5", "2")
    ]
    measured = [command for command in commands if command[0] == "evaluate"]
    assert [c[1] for c in measured] == [c[c.index("--out") + 1] for c in samples]
    assert all(c[2:4] == ("--classifier", "work/classifier") for c in measured)
    assert ["--no-mirror" in c for c in commands if c[0] == "tokenize"] == [True, False]


def test_the_control_may_have_the_time_of_weaker_forms() -> None:
    plan = Plan(EXPERIMENTS["classes"], SCALES["tiny"], PHOTOS, WORK)
    runs = {stage.makes.name: stage.command for stage in plan.stages if stage.command[0] == "train"}
    steps = get_preset("llamagen-photos").steps
    contrast, every_second, guided = (
        int(command[command.index("--steps") + 1]) / steps  # pyright: ignore[reportOptionalOperand]
        for name, command in runs.items()
        if "equal-time" in name
    )
    assert 1 < contrast < guided
    assert every_second == pytest.approx((1 + contrast) / 2, abs=0.005)
    assert run_name(EQUAL_TIME.recipe) == "ar-b-50-epochs-2-views-equal-time"
    assert "ar-b-50-epochs-2-views-equal-time-contrast-every-2-seed0" in runs


def test_class_accuracy_is_read_by_guidance_scale(tmp_path: Path) -> None:
    files = Files()
    for scale, accuracy in (("1", 0.5), ("1.5", 0.75)):
        path = tmp_path / f"run-seed0-guidance-{scale}.evaluation.json"
        numbers = {"class accuracy (classifier)": accuracy, "FD-classifier": 2.0, "IS-classifier": 7.0}
        write_json(path, {"metrics": numbers | {"recall (classifier)": 0.25}})
        files.results["classes", "live"].append(path)
    assert {name: spread.values for name, spread in measurements(files, ("classes",)).items()} == {
        "class accuracy (%)": (50.0,),
        "FD-classifier": (2.0,),
        "IS-classifier": (7.0,),
        "recall": (0.25,),
        "class accuracy (%), guidance 1.5": (75.0,),
        "FD-classifier, guidance 1.5": (2.0,),
    }
    write_json(path, {"metrics": {"FD-toy": 2.0}})
    with pytest.raises(UserError, match="it has no class accuracy and FD"):
        measurements(files, ("classes",))
