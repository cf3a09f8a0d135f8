"""`st-ar probe`: several models, weights and layers in one call, what it keeps, and mistakes that cost nothing."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from st_ar.cli import main
from st_ar.data.store import TokenStore
from st_ar.evaluation.probe import ProbeMethod, probe_layers
from st_ar.evaluation.probe_classifiers import ProbeConfig
from st_ar.files import sha256
from st_ar.model import weights as subjects
from st_ar.model.weights import load_model
from tests.data.random_store import random_store
from tests.disk import contents
from tests.small_line import SmallLine, make_line
from tests.toys import TINY, random_model, save_export

Capture = pytest.CaptureFixture[str]
SHORT = ["--epochs", "2", "--steps", "1", "9"]
METHOD = ProbeMethod(config=ProbeConfig(epochs=2))


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallLine:
    monkeypatch.setenv("ST_AR_CACHE", str(tmp_path / "cache"))
    return make_line(tmp_path)


def command(line: SmallLine, *options: object) -> list[str]:
    stores = ["--tokens", line.tokens, "--test-tokens", line.tokens]
    return ["probe", *map(str, (*stores, "--model", line.model, *options))]


def refused(capsys: Capture, folder: Path, match: str, arguments: list[str]) -> None:
    """One line on stderr, status 2, and every file as it was."""
    before = contents(folder)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert len([line for line in err.splitlines() if "note: " not in line]) == 1
    assert re.search(match, err), err
    assert contents(folder) == before


def expected(line: SmallLine, *, ema: bool, layers: list[int], method: ProbeMethod = METHOD) -> list[dict[str, Any]]:
    store = TokenStore(line.tokens)
    model = load_model(line.model, ema=ema)
    results = probe_layers(model, store, store, layers=layers, steps=[1, 9], method=method)
    return [dataclasses.asdict(result) for result in results]


def test_both_weights_of_all_layers_come_in_one_call(line: SmallLine, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "probe.json"
    main(command(line, *SHORT, "--weights", "both", "--layers", "all", "--mean-over-steps", "--out", out))
    method = dataclasses.replace(METHOD, mean_over_steps=True)
    wanted = [each for ema in (False, True) for each in expected(line, ema=ema, layers=[1, 2, 3, 4], method=method)]
    saved = json.loads(out.read_text())
    assert len(saved["results"]) == 8
    for index, (result, values) in enumerate(zip(saved["results"], wanted, strict=True)):
        ema = index >= 4
        assert result["model"] == ("model (EMA)" if ema else "model")
        file = line.model / ("ema.safetensors" if ema else "model.safetensors")
        assert result["weights"] == {"file": str(file), "sha256": sha256(file), "ema": ema, "step": 7}
        for key in ("layer", "steps", "top1", "top5", "mean_top1", "mean_top5", "train_images", "test_images"):
            assert result[key] == values[key], key
    assert saved["method"] == "linear probe after MAE"
    assert saved["settings"] == {
        **dataclasses.asdict(ProbeConfig(epochs=2)),
        "mean_over_steps": True,
        "test_crop": "center",
        "train_crops": [0],
        "dtype": "float32",
        "cache_dtype": "float32",
    }
    assert saved["classes"] == 3
    assert saved["train"] == saved["test"] == json.loads(json.dumps(TokenStore(line.tokens).describe()))
    assert saved["environment"]["torch"] == torch.__version__
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert first == "linear probe after MAE, 8 training and 8 test images"
    assert header.split()[-4:] == ["layer", "1", "9", "mean"]
    cells = [f"{100 * share:.1f}" for share in (*wanted[7]["top1"], wanted[7]["mean_top1"])]
    assert rows[7].split() == ["model", "(EMA)", "4", "top-1", *cells]


def test_the_second_call_reads_the_cache_and_gets_the_same(line: SmallLine, tmp_path: Path, capsys: Capture) -> None:
    printed: list[str] = []
    for name, layers in (("first", "2"), ("second", "2"), ("third", "all")):
        main(command(line, *SHORT, "--layers", layers, "--out", tmp_path / f"{name}.json"))
        printed.append(capsys.readouterr().out)
    cache = tmp_path / "cache" / "features"
    last = [text.splitlines()[-1] for text in printed]
    assert last == [  # the store to train on is the one to test with: one file serves both
        f"model: 1 of 2 feature files read from it, 1 feature file kept in {cache}",
        f"model: all features read from {cache}",
        f"model: 5 of 8 feature files read from it, 3 feature files kept in {cache}",
    ]
    first, second, third = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("first", "second", "third"))
    assert first == second
    assert third["results"][1] == first["results"][0]


def test_models_are_drawn_beside_one_another(line: SmallLine, tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "other" / "model"
    info = json.loads((line.model / "config.json").read_text())
    save_export(other, random_model(TINY, 5), random_model(TINY, 6), {"tokenizer": info["tokenizer"]})
    main(command(line, other, *SHORT, "--figure", tmp_path / "curves.svg", "--out", tmp_path / "probe.json"))
    names = [str(line.model), str(other)]  # their last parts are one word
    results = json.loads((tmp_path / "probe.json").read_text())["results"]
    assert [result["model"] for result in results] == names
    drawn = json.loads((tmp_path / "curves.json").read_text())
    assert drawn["x"] == "step"
    assert drawn["y"] == "accuracy (%)\nlinear probe after MAE"
    assert drawn["series"] == {
        name: {"x": [1, 9], "y": [100 * share for share in result["top1"]]}
        for name, result in zip(names, results, strict=True)
    }
    assert (tmp_path / "curves.svg").read_text().startswith("<svg")
    main(command(line, other, *SHORT, "--names", "AR", "ST-AR", "--layers", "2", "3", "--figure", tmp_path / "2.png"))
    drawn = json.loads((tmp_path / "2.json").read_text())
    assert list(drawn["series"]) == ["AR, layer 2", "AR, layer 3", "ST-AR, layer 2", "ST-AR, layer 3"]


def test_a_sweep_of_more_lines_than_colours_is_drawn_over_the_layers(line: SmallLine, tmp_path: Path) -> None:
    files = ["--figure", tmp_path / "sweep.svg", "--out", tmp_path / "probe.json"]
    main(command(line, *SHORT, "--weights", "both", "--layers", "all", *files))
    results = json.loads((tmp_path / "probe.json").read_text())["results"]
    drawn = json.loads((tmp_path / "sweep.json").read_text())
    assert drawn["x"] == "layer"
    assert drawn["y"].endswith("\nat step 9")
    shares = [100 * result["top1"][1] for result in results]
    assert drawn["series"] == {
        "model": {"x": [1, 2, 3, 4], "y": shares[:4]},
        "model (EMA)": {"x": [1, 2, 3, 4], "y": shares[4:]},
    }


def test_any_number_of_models_of_one_layer_is_drawn_over_the_steps(line: SmallLine, tmp_path: Path) -> None:
    others = [tmp_path / f"m{number}" for number in range(7)]
    for other in others:
        shutil.copytree(line.model, other)
    main(command(line, *others, "--steps", "1", "9", "--method", "ridge", "--figure", tmp_path / "many.svg"))
    drawn = json.loads((tmp_path / "many.json").read_text())
    assert drawn["x"] == "step"
    assert list(drawn["series"]) == ["model", *(f"m{number}" for number in range(7))]
    assert all(len(curve["x"]) == 2 for curve in drawn["series"].values())


@pytest.mark.parametrize("method", ["ridge", "logistic"])
def test_other_methods_are_named_wherever_their_numbers_are(
    line: SmallLine, tmp_path: Path, capsys: Capture, method: str
) -> None:
    name = f"{method} regression, not the MAE protocol"
    files = ["--figure", tmp_path / "curves.svg", "--out", tmp_path / "probe.json"]
    main(command(line, "--steps", "1", "9", "--method", method, "--penalty", "2", *files))
    assert capsys.readouterr().out.startswith(f"{name}, 8 training")
    saved = json.loads((tmp_path / "probe.json").read_text())
    assert saved["method"] == name
    assert saved["settings"]["penalty"] == 2
    assert "epochs" not in saved["settings"]
    assert name in (tmp_path / "curves.svg").read_text()
    assert name in json.loads((tmp_path / "curves.json").read_text())["y"]


def test_a_limit_in_gigabytes_and_a_folder_for_the_features(line: SmallLine, tmp_path: Path, capsys: Capture) -> None:
    main(command(line, *SHORT, "--cache", tmp_path / "own", "--cache-limit", "2e-6", "--cache-dtype", "float16"))
    (entry,) = (tmp_path / "own").iterdir()
    features = np.load(entry / "features.npy")
    assert (features.dtype, features.shape) == (np.float16, (8, 2, 16))
    said = json.loads((entry / "entry.json").read_text())
    assert said["weights"] == sha256(line.model / "model.safetensors")
    assert said["store"] == TokenStore(line.tokens).fingerprint
    names = ("format_version", "layer", "steps", "crops", "dtype", "shape", "stored")
    assert [said[name] for name in names] == [1, 2, [1, 9], [0], "float32", [8, 2, 16], "float16"]
    capsys.readouterr()
    match = "features take 1.15e-06 GB, more than --cache-limit 1e-06 GB"
    refused(capsys, tmp_path, match, command(line, *SHORT, "--cache-limit", "1e-6"))


def export(line: SmallLine, folder: Path, **info: object) -> Path:
    """The line's model once more, with another description."""
    known = json.loads((line.model / "config.json").read_text())
    known = {key: known[key] for key in ("step", "class_names", "tokenizer")} | info
    save_export(folder, random_model(TINY, 0), random_model(TINY, 1), known)
    return folder


@pytest.mark.parametrize(
    ("info", "match"),
    [
        ({"tokenizer": "f" * 64}, "was made by tokenizer .*, the model uses the codes of ffffffffffff"),
        ({"class_names": ["ant", "cow", "bee"]}, "tokens and .*model.safetensors have different class names"),
        ({"class_dropout": 0}, "was trained with --class-dropout 0 and has no null class"),
    ],
)
def test_a_model_that_the_stores_or_the_protocol_do_not_suit_is_refused(
    line: SmallLine, tmp_path: Path, capsys: Capture, info: dict[str, object], match: str
) -> None:
    other = export(line, tmp_path / "other", **info)
    refused(capsys, tmp_path, match, command(line, other, *SHORT))


@pytest.mark.parametrize("info", [{"class_dropout": 0.1}, {"class_names": []}, {"class_names": ["0", "1", "2"]}])
def test_a_model_that_says_less_or_the_right_thing_is_probed(
    line: SmallLine, tmp_path: Path, capsys: Capture, info: dict[str, object]
) -> None:
    main(command(line, export(line, tmp_path / "other", **info), *SHORT))
    assert "other" in capsys.readouterr().out


def test_stores_that_do_not_suit_are_refused(line: SmallLine, tmp_path: Path, capsys: Capture) -> None:
    five = random_store(tmp_path / "five", images=4, grid=3, vocab_size=11, num_classes=5)[0]
    one = random_store(tmp_path / "one", images=4, grid=3, vocab_size=11, num_classes=1)[0]
    for store, match in ((five, "5 classes, the model 3"), (one, "1 classes, the model 3")):
        refused(capsys, tmp_path, match, [*command(line, *SHORT), "--test-tokens", str(store)])


def test_a_model_that_changes_while_it_waits_is_refused(
    line: SmallLine, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = iter(["one", "another"])
    monkeypatch.setattr(subjects, "sha256", lambda _: next(sums))
    refused(capsys, tmp_path, "has changed since this call began", command(line, *SHORT))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--layers", "5"], "no layer 5: this network has layers 1 to 4"),
        (["--layers", "2", "2"], "--layers 2 2 repeats a value"),
        (["--steps", "10"], "no step 10: this model's images have steps 1 to 9"),
        (["--names", "a", "b"], "2 --names for 1 models"),
        (["--penalty", "3"], "--penalty has no effect with --method mae"),
        (["--method", "ridge"], "--epochs has no effect with --method ridge"),
        (["--cache-limit", "0"], "--cache-limit must be above 0 GB, not 0"),
        (["--figure", "curves.pdf"], r"curves\.pdf is not a \.svg or \.png file: give a name"),
        (["--figure", "probe.svg", "--out", "probe.json"], "writes its numbers to probe.json, which is --out"),
    ],
)
def test_options_that_contradict_are_refused(
    line: SmallLine, tmp_path: Path, capsys: Capture, options: list[str], match: str
) -> None:
    refused(capsys, tmp_path, match, [*command(line, "--epochs", "2"), *options])


def test_one_model_twice_is_refused(line: SmallLine, tmp_path: Path, capsys: Capture) -> None:
    refused(capsys, tmp_path, "two models are called .*model", command(line, line.model, *SHORT))


def test_results_are_never_written_over(line: SmallLine, tmp_path: Path, capsys: Capture) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("{}")
    refused(capsys, tmp_path, "taken.json exists already.*another --out", command(line, *SHORT, "--out", taken))
    match = "taken.json exists already.*another --figure"
    refused(capsys, tmp_path, match, command(line, *SHORT, "--figure", tmp_path / "taken.svg"))
    for flag, name in (("--out", "new.json"), ("--figure", "new.svg")):
        refused(capsys, tmp_path, "taken.json is not a folder", command(line, *SHORT, flag, taken / name))
