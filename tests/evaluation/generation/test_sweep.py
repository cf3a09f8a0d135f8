"""The sweep: every setting sampled and evaluated once, what is there reused, the best one named."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from st_ar.cli import main
from st_ar.config import Metric
from st_ar.errors import UserError
from st_ar.evaluation.generation import evaluate as evaluate_module
from st_ar.evaluation.generation import sweep as sweep_module
from st_ar.evaluation.generation.features import Compute
from st_ar.evaluation.generation.image_sets import open_files
from st_ar.evaluation.generation.references import Reference, open_reference
from st_ar.evaluation.generation.sweep import SweptModel, list_settings, sweep
from st_ar.sampling import Sampler, sample_to
from tests.disk import contents, refused
from tests.evaluation.generation.test_evaluate import pictures, save_folder, toy
from tests.small_line import SmallLine, make_line

GRID = list_settings([1.0, 2.0], [1.0], [0, 2], seed=3)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> SmallLine:
    folder = tmp_path_factory.mktemp("line")
    np.savez(folder / "reference.npz", arr_0=pictures(20, size=6))
    return make_line(folder)


@pytest.fixture(scope="module")
def reference(line: SmallLine) -> Reference:
    return open_reference(str(line.model.parent / "reference.npz"), toy(), ["fid"], Compute())


def sampler(line: SmallLine, out: Path, **changed: int) -> SweptModel:
    return SweptModel(line.model, line.tokenizer, out / "samples", **({"num": 8, "seed": 3, "batch_size": 5} | changed))


@pytest.mark.parametrize(
    ("network", "metric", "fd", "score"), [("Inception", "fid", "FID", "IS"), ("toy", "fd", "FD-toy", "IS-toy")]
)
def test_every_setting_is_measured_and_the_least_distance_comes_first(
    line: SmallLine, tmp_path: Path, network: str, metric: Metric, fd: str, score: str
) -> None:
    out, extractor = tmp_path / "sweep", toy(network)
    reference = open_reference(str(line.model.parent / "reference.npz"), extractor, [metric], Compute())
    rows = sweep(sampler(line, out), GRID, reference, extractor, [metric, "is"], out, Compute())
    assert sorted((r["cfg_scale"], r["top_k"]) for r in rows) == [(1.0, 0), (1.0, 2), (2.0, 0), (2.0, 2)]
    distances = [row["metrics"][fd] for row in rows]
    assert distances == sorted(distances)
    assert len(set(distances)) == 4
    for row in rows:
        samples = open_files(row["samples"])
        assert samples.count == 8
        assert samples.metadata["settings"]["cfg_scale"] == row["cfg_scale"]
        assert json.loads((out / "results" / row["result"]).read_text())["metrics"] == row["metrics"]
    table = list(csv.reader((out / "sweep.csv").read_text().splitlines()))
    assert table[0] == ["cfg_scale", "temperature", "top_k", fd, score]
    assert [float(cells[3]) for cells in table[1:]] == distances
    assert json.loads((out / "sweep.json").read_text())["settings"] == rows
    for name in ("distance.svg", "is.svg"):
        svg = (out / name).read_text()
        assert svg.startswith("<svg")
        assert "top-k 2" in svg
        assert "all codes" in svg


def test_a_killed_sweep_goes_on_and_a_finished_one_does_nothing(
    line: SmallLine, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    def killed_at_the_third(path: Path, drawing: Sampler, *arguments: object, **settings: object) -> None:
        drawn.append(drawing.settings.cfg_scale)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        sample_to(path, drawing, *arguments, **settings)

    whole, out = tmp_path / "whole", tmp_path / "sweep"
    expected = sweep(sampler(line, whole), GRID, reference, toy(), ["fid"], whole, Compute())
    monkeypatch.setattr(sweep_module, "sample_to", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        sweep(sampler(line, out), GRID, reference, toy(), ["fid"], out, Compute())
    found = sweep(sampler(line, out), GRID, reference, toy(), ["fid"], out, Compute())
    assert len(drawn) == 3 + 2
    assert [row["metrics"] for row in found] == [row["metrics"] for row in expected]
    before = contents(out)
    sweep(sampler(line, out), GRID, reference, toy(), ["fid"], out, Compute())
    assert len(drawn) == 5
    assert contents(out) == before


def test_other_numbers_seeds_or_references_are_not_mixed_up(
    line: SmallLine, reference: Reference, tmp_path: Path
) -> None:
    keys = {sampler(line, tmp_path, **c).key(GRID[0]) for c in ({}, {"num": 9}, {"seed": 4}, {"ema": True})}
    assert len(keys) == 4
    assert sampler(line, tmp_path).key(GRID[0]) == sampler(line, tmp_path / "elsewhere").key(GRID[0])
    out = tmp_path / "sweep"
    one = sweep(sampler(line, out), GRID[:1], reference, toy(), ["fid"], out, Compute())
    np.savez(tmp_path / "other.npz", arr_0=pictures(20, 9, size=6))
    other = open_reference(str(tmp_path / "other.npz"), toy(), ["fid"], Compute())
    two = sweep(sampler(line, out), GRID[:1], other, toy(), ["fid"], out, Compute())
    assert one[0]["samples"] == two[0]["samples"]
    assert one[0]["metrics"] != two[0]["metrics"]


def test_images_that_the_reference_lacks_and_notes_are_passed_on(
    line: SmallLine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "SPLIT", 3)
    folder = save_folder(tmp_path / "f", pictures(9, size=6))
    (folder / "000001.png").write_bytes(b"")
    reference = open_reference(f"folder:{folder}", toy(), ["fid"], Compute(), size=6, max_skipped=0.2)
    out, skipped = tmp_path / "sweep", {"index": 1, "name": "000001.png", "reason": "empty"}
    sweep(sampler(line, out), GRID[:1], reference, toy(), ["fid", "is"], out, Compute())
    err = capsys.readouterr().err
    found = json.loads((out / "sweep.json").read_text())["reference"]
    assert (found["skipped"], found["skipped_images"]) == (1, [skipped])
    assert found["notes"] == [f"folder:{folder}: 1 of 9 images cannot be used and are left out: 000001.png (empty)"]
    assert f"note: {found['notes'][0]}\n" in err
    assert "note: the last of the 3 splits of IS has 2 of 3 images" in err
    command = ["sweep", "--model", line.model, "--tokenizer", line.tokenizer, "--reference", f"folder:{folder}"]
    command += [
        "--size",
        "6",
        "--cfg-scales",
        "1",
        "--num",
        "6",
        "--out",
        tmp_path / "o",
        "--extractor",
        "efficientnet",
    ]
    with pytest.raises(SystemExit):
        main([*map(str, command), "--device", "cpu"])
    assert "1 of 9 images cannot be used, more than --max-skipped 0.01" in capsys.readouterr().err


def test_what_cannot_be_swept_is_refused(line: SmallLine, reference: Reference, tmp_path: Path) -> None:
    for match, given in (
        (r"--cfg-scales must name at least one value, and each value once, not \[1.0, 1.0\]", ([1.0, 1.0], [1.0], [0])),
        (r"--cfg-scales must be at least 1 \(no guidance\), not 0.5", ([1.0, 0.5], [1.0], [0])),
        ("--temperatures must name", ([1.0], [], [0])),
    ):
        with pytest.raises(UserError, match=match):
            list_settings(*given)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("x")
    with refused(tmp_path, "is not empty and is not a sweep"):
        sweep(sampler(line, tmp_path / "taken"), GRID, reference, toy(), ["fid"], tmp_path / "taken", Compute())
    with refused(
        tmp_path, r"--top-k must lie in \[0, 11\], the size of the codebook, not 12"
    ):  # the last setting, before the first is drawn
        settings = list_settings([1.0], [1.0], [0, 12])
        sweep(sampler(line, tmp_path / "out"), settings, reference, toy(), ["fid"], tmp_path / "out", Compute())


def test_a_reference_of_another_size_is_refused_before_anything_is_drawn(
    line: SmallLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "r.npz", arr_0=pictures(8, size=7))
    command = ["sweep", "--model", line.model, "--tokenizer", line.tokenizer, "--reference", tmp_path / "r.npz"]
    command += ["--cfg-scales", "1", "--num", "6", "--out", tmp_path / "out", "--extractor", "efficientnet"]
    with pytest.raises(SystemExit):
        main([str(argument) for argument in [*command, "--device", "cpu"]])
    assert "samples have 6x6 pixels, the reference 7x7" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_samples_killed_while_their_parts_were_cleared_are_finished(
    line: SmallLine, reference: Reference, tmp_path: Path
) -> None:
    swept = sampler(line, tmp_path)
    path = swept.sample(GRID[0])
    before = contents(tmp_path)
    parts = path.with_name(f"{path.name}.parts")
    parts.mkdir()
    record = json.loads(path.with_suffix(".json").read_text())
    record.pop("environment")
    (parts / "job.json").write_text(json.dumps(record))
    assert swept.sample(GRID[0]) == path
    assert contents(tmp_path) == before


def test_the_sweep_by_command(line: SmallLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "r.npz", arr_0=pictures(8, size=6))
    command = ["sweep", "--model", line.model, "--tokenizer", line.tokenizer, "--reference", tmp_path / "r.npz"]
    command += ["--cfg-scales", "1", "1.5", "--num", "6", "--out", tmp_path / "out", "--extractor", "efficientnet"]
    command = [str(argument) for argument in [*command, "--device", "cpu"]]
    main(command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["guidance", "temperature", "top-k", "FD-EfficientNet-Lite0"]
    assert lines[-1].startswith(f"best FD-EfficientNet-Lite0 of 6 samples: --cfg-scale {lines[1].split()[0]} ")
    assert not (tmp_path / "out" / "is.svg").exists()
    main([*command, "--json", "-"])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "sweep.json").read_text())


@pytest.mark.parametrize(
    "metrics", [None, [], {"FID": "3"}, {"FID": float("nan")}, {"FD": 3.0}, {"FID": 3.0, "IS": 2.0}], ids=str
)
def test_kept_results_that_are_damaged_are_refused(
    line: SmallLine, reference: Reference, tmp_path: Path, metrics: object
) -> None:
    out = tmp_path / "sweep"
    rows = sweep(sampler(line, out), GRID[:2], reference, toy(), ["fid"], out, Compute())
    kept = next((out / "results").glob(f"{sampler(line, out).key(GRID[1])}-*"))
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"metrics": metrics}))
    with refused(out, rf"{kept.name} is damaged \(its metrics are not this sweep's\): remove it"):
        sweep(sampler(line, out), GRID[:2], reference, toy(), ["fid"], out, Compute())
    kept.unlink()
    again = sweep(sampler(line, out), GRID[:2], reference, toy(), ["fid"], out, Compute())
    assert [row["metrics"] for row in again] == [row["metrics"] for row in rows]
