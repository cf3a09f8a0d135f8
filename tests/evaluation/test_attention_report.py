"""`st-ar attention`: the files, their numbers, and errors, which leave nothing behind."""

import csv
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from st_ar.data.source import Crops
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation import attention_report
from st_ar.evaluation.attention import STATISTICS, ImageMasks, LayerStatistics, average_statistics, store_maps
from st_ar.evaluation.attention_report import AttentionOptions, report_attention, statistics_table
from st_ar.figures import Drawing
from st_ar.files import sha256, write_json
from st_ar.model.weights import load_model
from st_ar.tokenizer import load_tokenizer
from st_ar.tokenizer.tokenize import tokenize
from tests.disk import contents, refused
from tests.small_line import SmallLine, make_line, random_source, random_tokenizer
from tests.test_report import Page
from tests.toys import TINY, random_model, save_export

CURVES = ("class-weight", "neighbour-weight", "distance", "entropy")
KINDS = ("svg", "png", "json")


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> SmallLine:
    return make_line(tmp_path_factory.mktemp("line"))


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write only the figures' numbers. `compared`, which is module-scoped, draws them."""

    def save(drawing: Drawing, path: Path) -> None:
        path.touch()
        write_json(path.with_suffix(".json"), drawing.data)

    monkeypatch.setattr(Drawing, "save", save)
    monkeypatch.setattr(Drawing, "svg", lambda _: "<svg></svg>")


def report(line: SmallLine, out: Path, *models: Path, names: Any = (), ema: bool = False, **chosen: Any) -> Any:
    paths = models or (line.model,)
    return report_attention(
        paths,
        line.tokens,
        line.tokenizer,
        out,
        AttentionOptions(**{"average": 4, **chosen}),
        names=names,
        ema=ema,
        device="cpu",
    )


def map_numbers(out: Path, file: str) -> Any:
    return json.loads((out / f"{file}.json").read_text())


@pytest.fixture(scope="module")
def compared(line: SmallLine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Live and EMA weights, two layers, the mean over heads and one head."""
    out = tmp_path_factory.mktemp("compared") / "maps"
    found = report(
        line,
        out,
        line.model,
        line.model / "ema.safetensors",
        layers=(4, 2),
        heads=("mean", "2"),
        steps=(8, 3),
        images=(5, 1),
    )
    return out, found


def test_it_writes_maps_curves_statistics_and_a_page(compared: tuple[Path, Any]) -> None:
    figures = [f"layer-{layer}-{head}" for layer in (2, 4) for head in ("mean", "head-2")]
    files = [f"{name}.{kind}" for name in (*figures, *CURVES) for kind in KINDS]
    assert sorted(contents(compared[0])) == sorted([*files, "statistics.json", "statistics.csv", "attention.html"])


@pytest.mark.parametrize("layer", [2, 4])
@pytest.mark.parametrize("head", ["mean", "head-2"])
def test_a_map_shows_the_models_weights(line: SmallLine, compared: tuple[Path, Any], layer: int, head: str) -> None:
    drawn = map_numbers(compared[0], f"layer-{layer}-{head}")
    assert drawn["tokens read"] == [3, 8]
    store = TokenStore(line.tokens)
    assert list(drawn["weights by image and step"]) == ["model", "model (EMA)"]
    for ema, name in ((False, "model"), (True, "model (EMA)")):
        weights = dict(store_maps(load_model(line.model, ema=ema), store, [5, 1], layers=[layer]))[layer]
        wanted = weights.mean(1) if head == "mean" else weights[:, 1]
        for image in range(2):
            for column, step in enumerate((3, 8)):
                shown = drawn["weights by image and step"][name][image][column]
                assert shown == pytest.approx(wanted[image, step, : step + 1].tolist(), abs=1e-6)


def test_a_map_is_drawn_as_svg_and_png_for_each_image_model_and_step(compared: tuple[Path, Any]) -> None:
    root = ElementTree.fromstring((compared[0] / "layer-2-head-2.svg").read_text())
    assert root.get("aria-label") == "attention at layer 2, head 2"
    assert sum(1 for _ in root.iter("{http://www.w3.org/2000/svg}image")) == 2 * 2 * (1 + 2)
    with Image.open(compared[0] / "layer-2-head-2.png") as picture:
        assert picture.width > 600


def test_statistics_are_of_every_layer_over_evenly_spaced_images(line: SmallLine, compared: tuple[Path, Any]) -> None:
    store = TokenStore(line.tokens)
    for ema, name in ((False, "model"), (True, "model (EMA)")):
        assert compared[1][name] == average_statistics(load_model(line.model, ema=ema), store, [0, 2, 4, 6])
    assert compared[1]["model"] != compared[1]["model (EMA)"]


def test_the_json_names_the_store_and_the_weights(line: SmallLine, compared: tuple[Path, Any]) -> None:
    out, found = compared
    saved = json.loads((out / "statistics.json").read_text())
    assert saved["images"] == 4
    assert saved["masks"] == {"ratio": 0.0, "seed": 0, "own_position": True}
    assert saved["tokens"] == TokenStore(line.tokens).describe()
    for name, file in (("model", "model.safetensors"), ("model (EMA)", "ema.safetensors")):
        path = line.model / file
        averaged = file == "ema.safetensors"
        weights = {"file": str(path), "sha256": sha256(path), "ema": averaged, "step": 7}
        assert saved["models"][name]["weights"] == weights
        assert saved["models"][name]["layers"] == {str(layer): asdict(value) for layer, value in found[name].items()}


def test_the_csv_has_a_row_for_each_model_layer_and_head(compared: tuple[Path, Any]) -> None:
    out, found = compared
    rows = list(csv.DictReader((out / "statistics.csv").read_text().splitlines()))
    keys = [(row["model"], row["layer"], row["head"]) for row in rows]
    models, heads = ("model", "model (EMA)"), ("mean", "1", "2")
    assert keys == [(model, str(layer), head) for model in models for layer in (1, 2, 3, 4) for head in heads]
    for row in rows:
        layer: LayerStatistics = found[row["model"]][int(row["layer"])]
        averaged = layer.over_heads if row["head"] == "mean" else layer.by_head[int(row["head"]) - 1]
        for name in STATISTICS:
            assert float(row[name]) == getattr(averaged.mean, name)
            assert float(row[f"{name}_std"]) == getattr(averaged.std, name)


def test_the_curves_are_the_means_with_their_spread(compared: tuple[Path, Any]) -> None:
    out, found = compared
    for curve, name in zip(CURVES, STATISTICS, strict=True):
        lines = map_numbers(out, curve)["series"]
        assert list(lines) == ["model", "model (EMA)"]
        for model, drawn in lines.items():
            averaged = [layer.over_heads for layer in found[model].values()]
            assert drawn["x"] == [1, 2, 3, 4]
            assert drawn["y"] == [getattr(each.mean, name) for each in averaged]
            assert drawn["spread"] == [getattr(each.std, name) for each in averaged]


def test_the_page_has_the_maps_the_table_and_the_curves(compared: tuple[Path, Any]) -> None:
    out, found = compared
    html = (out / "attention.html").read_text()
    page = Page(html)
    assert page.within("h1") == ["Attention of model and model (EMA)"]
    assert page.within("h2") == ["Layer 2", "Layer 4", "Statistics", "Statistics by layer", "Inputs"]
    header, rows = statistics_table(found)
    assert page.within("td", "th") == [*header, *(cell for row in rows for cell in row)]
    labels = re.findall('aria-label="([^"]*)"', html)
    maps = [f"attention at layer {layer}, {head}" for layer in (2, 4) for head in ("all heads averaged", "head 2")]
    assert labels[:4] == maps
    assert [label.endswith("over layers") for label in labels[4:]] == [True] * 4
    assert any("Images 5 (cow), 1 (bee) of the store" in text for text in page.within("figcaption"))


def test_the_table_sets_models_side_by_side_layer_by_layer(compared: tuple[Path, Any]) -> None:
    header, rows = statistics_table(compared[1])
    assert header == ("layer, model", "on the class", "on the 3 x 3", "distance (tokens)", "entropy (nats)")
    assert [row[0] for row in rows[:3]] == ["1, model", "1, model (EMA)", "2, model"]
    found = compared[1]["model (EMA)"][1].over_heads
    mean, std = found.mean, found.std
    assert rows[1][1:] == (
        f"{mean.class_weight:.3f} ± {std.class_weight:.3f}",
        f"{mean.neighbour_weight:.3f} ± {std.neighbour_weight:.3f}",
        f"{mean.distance:.2f} ± {std.distance:.2f}",
        f"{mean.entropy:.2f} ± {std.entropy:.2f}",
    )


def test_the_defaults_are_half_the_depth_the_mean_over_heads_and_fifths_of_the_image(
    line: SmallLine, tmp_path: Path
) -> None:
    found = report(line, tmp_path / "maps", average=100)
    assert [path.stem for path in (tmp_path / "maps").glob("layer-*.svg")] == ["layer-2-mean"]
    drawn = map_numbers(tmp_path / "maps", "layer-2-mean")
    assert drawn["tokens read"] == [2, 4, 5, 7, 8]
    assert len(drawn["weights by image and step"]["model"]) == 3
    assert found["model"] == average_statistics(load_model(line.model), TokenStore(line.tokens), range(8))
    header, rows = statistics_table(found)
    assert header[0] == "layer"
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]


def test_all_heads_are_each_drawn_and_a_single_image_has_no_spread(line: SmallLine, tmp_path: Path) -> None:
    found = report(line, tmp_path / "maps", heads=("all", "1"), layers=(1, 1), average=1)
    drawn = sorted(path.stem for path in (tmp_path / "maps").glob("layer-*.svg"))
    assert drawn == ["layer-1-head-1", "layer-1-head-2"]
    assert "±" not in (tmp_path / "maps" / "attention.html").read_text()
    assert not any("±" in cell for row in statistics_table(found)[1] for cell in row)
    row = next(csv.DictReader((tmp_path / "maps" / "statistics.csv").read_text().splitlines()))
    assert row["entropy_std"] == ""
    assert "spread" not in map_numbers(tmp_path / "maps", "entropy")["series"]["model"]


@pytest.mark.parametrize("own_position", [True, False])
def test_masked_keys_have_no_weight_in_the_maps_and_the_averages(
    line: SmallLine, tmp_path: Path, own_position: bool
) -> None:
    masks = ImageMasks(ratio=0.5, seed=2, own_position=own_position)
    found = report(line, tmp_path / "maps", masks=masks, images=(6, 0))
    store = TokenStore(line.tokens)
    assert found["model"] == average_statistics(load_model(line.model), store, [0, 2, 4, 6], masks=masks)
    drawn = map_numbers(tmp_path / "maps", "layer-2-mean")
    mask = masks.draw([6, 0], 9)
    assert mask is not None
    for image in range(2):
        for column, step in enumerate(drawn["tokens read"]):
            weights = np.array(drawn["weights by image and step"]["model"][image][column])
            hidden = (mask[image] if own_position else mask[image, step])[: step + 1].numpy()
            assert (weights[hidden] == 0).all()
            assert weights.sum() == pytest.approx(1, abs=1e-5)
    html = (tmp_path / "maps" / "attention.html").read_text()
    own = "" if own_position else ", but not from its own query"
    assert f"50 % of each image&#39;s token keys are masked at random{own} (seed 2)." in html
    assert json.loads((tmp_path / "maps" / "statistics.json").read_text())["masks"] == asdict(masks)


def test_ema_weights_of_all_models(line: SmallLine, tmp_path: Path) -> None:
    found = report(line, tmp_path / "maps", ema=True)
    expected = average_statistics(load_model(line.model, ema=True), TokenStore(line.tokens), [0, 2, 4, 6])
    assert found == {"model (EMA)": expected}


def test_models_of_different_depths_and_heads_share_a_table(line: SmallLine, tmp_path: Path) -> None:
    config = replace(TINY, n_layers=2, n_heads=1)
    info = {"tokenizer": random_tokenizer().fingerprint}
    save_export(tmp_path / "run" / "export", random_model(config), random_model(config, 1), info)
    found = report(line, tmp_path / "maps", line.model, tmp_path / "run" / "export", names=("deep", "flat"))
    assert [row[0] for row in statistics_table(found)[1]] == [
        "1, deep",
        "1, flat",
        "2, deep",
        "2, flat",
        "3, deep",
        "4, deep",
    ]
    assert map_numbers(tmp_path / "maps", "entropy")["series"]["flat"]["x"] == [1, 2]
    assert (tmp_path / "maps" / "layer-1-mean.svg").exists()  # half the least depth
    with refused(tmp_path, "no layer 3: run has layers 1 to 2"):
        report(line, tmp_path / "more", line.model, tmp_path / "run", layers=(3,))
    with refused(tmp_path, "no head 2: run has heads 1 to 1"):
        report(line, tmp_path / "more", line.model, tmp_path / "run" / "export" / "model.safetensors", heads=("all",))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"images": (0, 8)}, "no image 8: .*tokens has images 0 to 7"),
        ({"images": (-1,)}, "no image -1: .*tokens has images 0 to 7"),
        ({"images": ()}, "--images and --average must each ask for at least one"),
        ({"heads": ()}, "--heads, .* must each ask for at least one"),
        ({"average": 0}, "--average must each ask for at least one"),
        ({"layers": (2, 0)}, "no layer 0: model has layers 1 to 4"),
        ({"layers": (5,)}, "no layer 5: model has layers 1 to 4"),
        ({"heads": ("mean", "0")}, "no head 0: model has heads 1 to 2"),
        ({"heads": ("3",)}, "no head 3: model has heads 1 to 2"),
        ({"heads": ("-1",)}, "no head -1: model has heads 1 to 2"),
        ({"heads": ("first",)}, "--heads 'first' is not a head: give mean, numbers counted from 1, or all"),
        ({"steps": (3, 0)}, "no step 0: maps can be drawn after reading 1 to 8"),
        ({"steps": (9,)}, "no step 9: maps can be drawn after reading 1 to 8"),
    ],
)
def test_options_out_of_range_are_refused_and_nothing_is_written(
    line: SmallLine, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with refused(tmp_path, match):
        report(line, tmp_path / "maps", **changes)
    assert not (tmp_path / "maps").exists()


def test_existing_files_are_not_overwritten(line: SmallLine, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("maps", "file"):
        with refused(
            tmp_path, f"{name} exists already and is not empty: a folder of attention maps is never overwritten"
        ):
            report(line, tmp_path / name)


@pytest.mark.parametrize(
    ("stopped_by", "raised"),
    [
        (KeyboardInterrupt("stop"), pytest.raises(KeyboardInterrupt, match="stop")),
        (OSError(28, "No space left on device"), pytest.raises(UserError, match=r"device; nothing there was changed")),
    ],
)
def test_an_interrupted_report_leaves_nothing_and_can_run_again(
    line: SmallLine, tmp_path: Path, stopped_by: BaseException, raised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".maps.partial").mkdir()  # of one that was killed
    (tmp_path / ".maps.partial" / "left.png").write_text("")

    def stop(*_: object) -> None:
        raise stopped_by

    with monkeypatch.context() as patch, raised:
        patch.setattr(attention_report, "write_page", stop)
        report(line, tmp_path / "maps", images=(0,), steps=(3,))
    assert list(tmp_path.iterdir()) == []
    report(line, tmp_path / "maps", images=(0,), steps=(3,))
    assert (tmp_path / "maps" / "attention.html").exists()
    assert not (tmp_path / "maps" / "left.png").exists()


def test_the_centre_of_ten_crops_is_read_and_named(line: SmallLine, tmp_path: Path) -> None:
    crops = Crops(kind="ten", size=6, range=1.0)
    tokenizer = load_tokenizer(line.tokenizer)
    store = tokenize(random_source(), tokenizer, crops, tmp_path / "tokens")
    assert report(replace(line, tokens=store.folder), tmp_path / "maps") == report(line, tmp_path / "same")
    page = " ".join((tmp_path / "maps" / "attention.html").read_text().split())
    assert "the centre crop (center) of each" in page


def test_a_store_of_another_tokenizer_than_the_models_is_refused(line: SmallLine, tmp_path: Path) -> None:
    other = random_tokenizer(seed=1)
    other.save(tmp_path / "tokenizer")
    store = tokenize(random_source(), other, Crops(kind="center", size=6, range=1.0), tmp_path / "tokens")
    match = (
        f"model cannot read the images: .* was made by tokenizer {other.fingerprint[:12]}, the model uses the codes of"
    )
    with refused(tmp_path, match):
        report_attention([line.model], store.folder, tmp_path / "tokenizer", tmp_path / "maps")


def test_a_store_of_other_classes_than_the_models_is_refused(line: SmallLine, tmp_path: Path) -> None:
    others = replace(random_source(), class_names=["ant", "bee", "dog"])
    tokenizer = load_tokenizer(line.tokenizer)
    store = tokenize(others, tokenizer, Crops(kind="center", size=6, range=1.0), tmp_path / "tokens")
    with refused(tmp_path, "model cannot read the images: .*dog"):
        report(replace(line, tokens=store.folder), tmp_path / "maps")


def test_another_tokenizer_than_the_stores_is_refused(line: SmallLine, tmp_path: Path) -> None:
    other = random_tokenizer(seed=1)
    other.save(tmp_path / "other")
    match = f"was made by tokenizer .*, .*other is {other.fingerprint[:12]}: give the tokenizer that made the store"
    with refused(tmp_path, match):
        report_attention([line.model], line.tokens, tmp_path / "other", tmp_path / "maps")


def test_several_models_must_all_read_the_store(line: SmallLine, tmp_path: Path) -> None:
    larger = replace(TINY, grid=4)
    save_export(tmp_path / "larger", random_model(larger), random_model(larger), {})
    with refused(tmp_path, "larger cannot read the images: .* has 3 tokens a side, the model 4"):
        report(line, tmp_path / "maps", line.model, tmp_path / "larger")
    save_export(tmp_path / "foreign", random_model(), random_model(), {"tokenizer": "f" * 64})
    with refused(tmp_path, "foreign cannot read the images: .* the model uses the codes of ffffffffffff"):
        report(line, tmp_path / "maps", line.model, tmp_path / "foreign")


def test_names_must_be_unique(line: SmallLine, tmp_path: Path) -> None:
    shutil.copytree(line.model, tmp_path / "model")
    assert list(report(line, tmp_path / "both", line.model, tmp_path / "model", average=1)) == [
        str(line.model),
        str(tmp_path / "model"),
    ]
    with refused(tmp_path, "two models are called .*model: give different --names, and each model once"):
        report(line, tmp_path / "maps", line.model, line.model)
    with refused(tmp_path, "1 --names for 2 models"):
        report(line, tmp_path / "maps", line.model, tmp_path / "model", names=("one",))
    with refused(tmp_path, "give at least one --model"):
        report_attention([], line.tokens, line.tokenizer, tmp_path / "maps")


def test_a_gpu_that_is_not_there_is_refused(line: SmallLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused(tmp_path, "--device cuda: torch sees no GPU here"):
        report_attention([line.model], line.tokens, line.tokenizer, tmp_path / "maps", device="cuda")
