"""The quickstart: the whole pipeline once, and resuming it."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from st_ar import quickstart as module
from st_ar.cli import run_command
from st_ar.config import TrainConfig
from st_ar.data.images import open_images
from st_ar.data.source import ImageSource
from st_ar.data.store import TokenStore
from st_ar.demo.setup import quickstart_setup
from st_ar.errors import UserError
from st_ar.evaluation.generation.features import Extracted, Extractor
from st_ar.evaluation.likelihood import validation_loss
from st_ar.model.weights import load_model
from st_ar.presets import get_preset
from st_ar.quickstart import quickstart
from st_ar.training.run import read_log
from tests.conftest import Once
from tests.disk import contents, refused

IMAGES = 130
RUNS = {name: folder for name, (folder, _) in module.METHODS.items()}


def small_preset(name: str) -> TrainConfig:
    config = get_preset(name)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, dim=32, n_heads=2, n_layers=2), batch_size=16
    )


def few_images(spec: str) -> ImageSource:
    source = open_images(spec)
    return dataclasses.replace(
        source, count=IMAGES, examples=lambda start: islice(source.examples(start), IMAGES - start)
    )


@pytest.fixture(scope="module", autouse=True)
def small_quickstart() -> Iterator[None]:
    """A smaller model, and fewer images, probe epochs and samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "get_preset", small_preset)
        patch.setattr(module, "open_images", few_images)
        patch.setattr(module, "PROBE", dataclasses.replace(module.PROBE, epochs=2, warmup_epochs=1))
        patch.setattr(module, "SAMPLES", 60)
        yield


@pytest.fixture(scope="module")
def made(once: Once) -> Path:
    """A finished quickstart. Tests that change it take a copy: `copy`."""

    def make(out: Path) -> None:
        assert quickstart(out, images="digits", steps=3) == out / "report.html"

    return once("quickstart", make)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


def summary_of(out: Path) -> dict[str, Any]:
    """summary.json; NaN and Infinity are no JSON."""

    def no_constant(name: str) -> float:
        raise AssertionError(f"{name} in summary.json")

    return json.loads((out / "summary.json").read_text(), parse_constant=no_constant)


def exports_of(out: Path, runs: Sequence[str]) -> dict[str, bytes]:
    return {f"{run}/{name}": data for run in runs for name, data in contents(out / run / "export").items()}


def exports(out: Path) -> dict[str, bytes]:
    return exports_of(out, list(RUNS.values()))


def measures(out: Path) -> dict[str, Any]:
    """The summary without what depends on the clock."""
    summary = summary_of(out)
    for name in ("step_time_ratio", "step_time_ratio_contrast", "seconds_of_this_call"):
        del summary[name]
    for method in RUNS:
        del summary[method]["seconds_per_step"]
    return summary


def test_all_methods_are_measured_in_finite_numbers(made: Path) -> None:
    summary = summary_of(made)
    assert (summary["images"], summary["steps"], summary["seed"], summary["samples"]) == ("digits", 3, 0, 60)
    for method in RUNS:
        measured = summary[method]
        assert len(measured["probe"]["top1"]) == 8
        assert all(0 <= share <= 1 for share in measured["probe"]["top1"])
        assert measured["probe"]["steps"] == [8, 16, 24, 32, 40, 48, 56, 64]
        assert (measured["probe"]["train_images"], measured["probe"]["test_images"]) == (IMAGES, IMAGES)
        assert list(measured["attention"]) == ["1", "2"]
        numbers = [measured[name] for name in ("validation_loss", "validation_loss_ema", "frechet", "seconds_per_step")]
        numbers += [value for layer in measured["attention"].values() for value in layer.values()]
        assert all(math.isfinite(value) and value > 0 for value in numbers)
        assert measured["validation_loss"] == pytest.approx(math.log(256), abs=0.3)  # 3 steps from an even guess
    assert 0 < summary["frechet_of_decoded_training_images"] < min(summary[method]["frechet"] for method in RUNS)
    assert summary["step_time_ratio"] == pytest.approx(
        summary["ST-AR"]["seconds_per_step"] / summary["AR"]["seconds_per_step"]
    )


def test_class_accuracy_is_the_share_of_images_that_are_taken_for_their_class() -> None:
    def run(images: torch.Tensor) -> Extracted:  # the first pixel is the class
        return Extracted(torch.zeros(len(images), 1), logits=torch.eye(10)[images[:, 0, 0, 0].long()])

    images = np.zeros((8, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = [0, 1, 2, 3, 4, 5, 6, 7]
    classifier = Extractor(name="first pixel", weights="", dim=1, run=run)
    assert module._class_accuracy(classifier, images, np.array([0, 1, 2, 3, 4, 5, 7, 6])) == 0.75


def test_the_classifier_is_trained_as_long_as_the_models_and_its_accuracy_is_reported(made: Path) -> None:
    record = json.loads((made / "classifier" / "config.json").read_text())
    assert summary_of(made)["class_accuracy_of_decoded_test_images"] == record["test_accuracy"]
    assert (record["config"]["steps"], record["test_images"]) == (3, IMAGES)


def test_the_demo_takes_a_finished_quickstart(made: Path) -> None:
    setup = quickstart_setup(made, device="cpu", dtype="float32", probe_images=50)
    try:
        assert setup.pool.names == ["AR", "ST-AR", "AR (EMA)", "ST-AR (EMA)"]
        assert {name: run.name for name, run in setup.runs.items()} == {"AR": "llamagen", "ST-AR": "st-ar"}
        assert [*setup.predict("ST-AR", setup.from_store(0))][-1].total == 50
    finally:
        setup.pool.close()


def test_the_validation_loss_is_that_of_the_exported_model_on_the_store(made: Path) -> None:
    store, method = TokenStore(made / "tokens-test"), "ST-AR"
    measured = summary_of(made)[method]
    for ema, name in ((False, "validation_loss"), (True, "validation_loss_ema")):
        loss = validation_loss(load_model(made / RUNS[method], ema=ema), store)
        assert measured[name] == pytest.approx(loss, rel=1e-5)


def test_the_runs_differ_only_in_the_method_and_use_equal_tokens(made: Path) -> None:
    configs = {m: json.loads((made / run / "config.json").read_text()) for m, run in RUNS.items()}
    plain, guided, contrast = (configs[m]["config"] for m in RUNS)
    for other in (guided, contrast):
        assert {name for name in plain if plain[name] != other[name]} == {"selfguided"}
    assert configs["AR"]["tokens"] == configs["ST-AR"]["tokens"] == configs["Contrast alone"]["tokens"]
    for method, run in RUNS.items():
        log = read_log(made / run / "log.jsonl")
        assert log[-1]["step"] == 3
        config = configs[method]["config"]
        seen = 3 * config["batch_size"] * config["views"] * config["model"]["grid"] ** 2
        assert seen == summary_of(made)["tokens_per_method"]
    assert guided["selfguided"]["alpha"] > 0
    assert plain["selfguided"]["alpha"] == plain["selfguided"]["beta"] == plain["selfguided"]["mask_ratio"] == 0
    changed = {name: value for name, value in contrast["selfguided"].items() if value != guided["selfguided"][name]}
    assert changed == {"mask_ratio": 0, "alpha": 0, "step_loss": False}


def test_the_report_names_all_methods_and_the_next_commands(made: Path) -> None:
    html = (made / "report.html").read_text()
    assert "AR and ST-AR on 130 images (digits)" in html
    labels = ("AR, 2 views (control)", "ST-AR", "Inter-view contrast alone")
    assert "".join(f'<th scope="col">{label}</th>' for label in labels) in html
    assert re.search(
        r"Inter-view contrast alone compared with the control: probe accuracy after the whole image [+-]", html
    )
    assert f"st-ar train st-ar-digits --tokens {made / 'tokens-train'} --out st-ar-long --steps 30" in html
    summary = summary_of(made)
    for method in RUNS:
        assert f"<td>{summary[method]['validation_loss']:.3f}</td>" in html
        assert f"<td>{100 * summary[method]['probe']['top1'][-1]:.1f} %</td>" in html
        assert f"<td>{summary[method]['frechet']:.4f}</td>" in html
        assert f"<td>{100 * summary[method]['class_accuracy']:.1f}</td>" in html
    assert "nan" not in html.split("<svg")[0].lower().split()


def test_every_artefact_is_complete(made: Path) -> None:
    for name, images, crops in (("tokens-train", IMAGES, 5), ("tokens-test", IMAGES, 1)):
        store = TokenStore(made / name)
        store.verify()
        assert (len(store), len(store.meta.crops)) == (images, crops)
    files = {Path(name).parts[0] for name in contents(made)}
    names = {"tokenizer", "tokens-train", "tokens-test", "classifier", *RUNS.values()}
    assert files == {*names, "quickstart.json", "summary.json", "report.html", "overview.svg", "overview.json"}


def test_a_second_call_measures_again_without_training_again(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = [path for run in RUNS.values() for path in (copy / run / "export").glob("*.safetensors")]
    assert len(weights) == 6
    before, times = exports(copy), [path.stat().st_mtime_ns for path in weights]
    stores = contents(copy / "tokens-train") | contents(copy / "tokenizer")
    first = measures(copy)
    (copy / "report.html").unlink()
    run_command(["quickstart", "--images", "digits", "--steps", "3", "--out", str(copy), "--json", "-"])
    assert json.loads(capsys.readouterr().out) == summary_of(copy)
    assert exports(copy) == before
    assert [path.stat().st_mtime_ns for path in weights] == times
    assert contents(copy / "tokens-train") | contents(copy / "tokenizer") == stores
    assert (copy / "report.html").exists()
    assert measures(copy) == first


@pytest.mark.parametrize("changes", [{"steps": 4}, {"seed": 1}, {"images": "photos"}, {"steps": None}])
def test_other_settings_are_refused(made: Path, changes: dict[str, Any]) -> None:
    with refused(made, "was begun with other settings: .*Give the old ones"):
        quickstart(made, **({"images": "digits", "steps": 3} | changes))


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with refused(tmp_path, "exists already and is not empty: a quickstart is never overwritten"):
        quickstart(tmp_path, images="digits", steps=3)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with refused(tmp_path, "exists already and is not empty: a quickstart is never overwritten"):
        quickstart(tmp_path / "out", images="digits", steps=3)


def test_settings_out_of_range_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--steps must be at least 1, not 0"):
        quickstart(tmp_path / "out", images="digits", steps=0)
    assert not (tmp_path / "out").exists()


def test_the_overview_shows_every_methods_curve_and_the_first_samples_of_each_class(made: Path) -> None:
    data = json.loads((made / "overview.json").read_text())
    summary = summary_of(made)
    assert data["attention"]["layer"] == 1
    for method in RUNS:
        assert data["probe accuracy (%)"][module.LABELS[method]]["y"] == [
            100 * share for share in summary[method]["probe"]["top1"]
        ]
    labels = np.array([3, 1, 3, 1, 2, 1])
    assert module._spread_over_classes(labels, 5).tolist() == [1, 4, 0, 3, 2]


def test_a_quickstart_of_an_earlier_version_gains_the_third_method(made: Path, copy: Path) -> None:
    shutil.rmtree(copy / "contrast")
    claim = json.loads((copy / "quickstart.json").read_text())
    del claim["Contrast alone"]
    (copy / "quickstart.json").write_text(json.dumps(claim))
    before = exports_of(copy, ("llamagen", "st-ar"))
    quickstart(copy, images="digits", steps=3)
    assert exports_of(copy, ("llamagen", "st-ar")) == before
    np.testing.assert_equal(measures(copy), measures(made))


# Stopped at any instant: what is left of each stage that was cut short


def killed_before_the_second_run_was_exported(out: Path) -> None:
    """The last checkpoint is there, the weights for other programs are not yet."""
    shutil.rmtree(out / "st-ar" / "export")


def killed_as_the_second_run_began(out: Path) -> None:
    """Its folder is there, its config.json is not yet."""
    shutil.rmtree(out / "st-ar")
    (out / "st-ar").mkdir()


def killed_as_the_tokenizer_was_saved(out: Path) -> None:
    """The codebook is there, tokenizer.json, which marks it complete, is not yet, and nothing comes after it."""
    (out / "tokenizer" / "tokenizer.json").unlink()
    for name in ("tokens-train", "tokens-test", *RUNS.values()):
        shutil.rmtree(out / name)


@pytest.mark.parametrize(
    "kill",
    [
        killed_before_the_second_run_was_exported,
        killed_as_the_second_run_began,
        killed_as_the_tokenizer_was_saved,
    ],
)
def test_a_stopped_quickstart_is_completed_with_the_same_result(made: Path, copy: Path, kill: Any) -> None:
    kill(copy)
    for name in ("report.html", "summary.json"):
        (copy / name).unlink()
    quickstart(copy, images="digits", steps=3)
    assert (copy / "report.html").exists()
    assert exports(copy) == exports(made)
    np.testing.assert_equal(measures(copy), measures(made))
