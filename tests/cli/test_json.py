"""--json and --page, the same for every command that reports numbers: with --json - standard output holds the result alone."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from st_ar.cli import COMMANDS, run_command
from st_ar.cli.completion import read_commands
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation.attention import ImageMasks
from st_ar.evaluation.likelihood import validation_loss
from st_ar.model.weights import load_model
from tests.small_line import SmallLine, make_line
from tests.test_report import Page

Capture = pytest.CaptureFixture[str]
REPORTING = {
    "attention",
    "evaluate",
    "invariance",
    "likelihood",
    "probe",
    "quickstart",
    "reconstruct",
    "reproduce",
    "sweep",
}
PAGED = {"evaluate", "invariance", "probe"}
"""Attention, quickstart and reproduce write a page in any case."""


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> SmallLine:
    return make_line(tmp_path_factory.mktemp("line"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of 12 pixels of noise, with blocks of one colour."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 3, 3, 3)).repeat(4, axis=1).repeat(4, axis=2)
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    np.savez(path, arr_0=pixels.astype(np.uint8))
    return path


def command(name: str, line: SmallLine, pictures: Path, out: Path) -> list[str]:
    """A call that reports numbers, in well under a second."""
    options: dict[str, tuple[object, ...]] = {
        "attention": (
            "--model",
            line.model,
            "--tokens",
            line.tokens,
            "--tokenizer",
            line.tokenizer,
            "--out",
            out / "a",
        ),
        "invariance": ("--tokenizer", line.tokenizer, "--images", pictures, "--size", 6, "--out", out / "i"),
        "likelihood": ("--model", line.model, "--tokens", line.tokens),
        "probe": ("--model", line.model, "--tokens", line.tokens, "--test-tokens", line.tokens, "--epochs", 2),
        "evaluate": (
            pictures,
            "--reference",
            pictures,
            "--extractor",
            "efficientnet",
            "--metrics",
            "precision",
            "recall",
        ),
    }
    return [name, *map(str, options[name])]


def test_the_verbs_that_have_it() -> None:
    options = {name: read_commands()[name].options for name in COMMANDS}
    assert {name for name in COMMANDS if "--json" in options[name]} == {*REPORTING, "env"}
    assert {name for name in COMMANDS if "--page" in options[name]} == PAGED


KEPT = {"attention": "a/statistics.json", "invariance": "i/invariance.json"}
"""command -> where the folder of its results has the same."""


@pytest.mark.parametrize("name", ["attention", "evaluate", "invariance", "likelihood", "probe"])
def test_standard_output_is_json_alone_and_the_file_has_the_same(
    name: str, line: SmallLine, pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    run_command([*command(name, line, pictures, first), "--json", "-"])
    told = json.loads(capsys.readouterr().out)
    run_command([*command(name, line, pictures, second), "--json", str(tmp_path / "result.json")])
    assert re.search(r"\d", capsys.readouterr().out)  # the table is still printed
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept == told
    if name in KEPT:
        assert kept == json.loads((second / KEPT[name]).read_text())
    wanted: dict[str, Any] = {"evaluate": "metrics", "likelihood": "results", "probe": "results"}
    assert kept.get(wanted.get(name, "environment"), kept)


def test_likelihoods_numbers_are_those_of_out(line: SmallLine, tmp_path: Path, capsys: Capture) -> None:
    options = ["--model", str(line.model), "--tokens", str(line.tokens)]
    run_command(["likelihood", *options, "--out", str(tmp_path / "out.json"), "--json", "-"])
    kept = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(capsys.readouterr().out) == kept
    assert "masks" not in kept
    run_command(["likelihood", *options, "--mask-ratio", "0.5", "--seed", "1", "--out", str(tmp_path / "masked.json")])
    assert "50% of the keys masked; a uniform guess" in capsys.readouterr().out
    masked = json.loads((tmp_path / "masked.json").read_text())
    assert masked["masks"] == {"ratio": 0.5, "seed": 1, "own_position": True}
    expected = validation_loss(load_model(line.model), TokenStore(line.tokens), masks=ImageMasks(ratio=0.5, seed=1))
    assert masked["results"][0]["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["evaluate", "likelihood", "probe", "attention", "invariance"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    name: str, line: SmallLine, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/result\.json"):
        run_command([*command(name, line, pictures, tmp_path), "--json", str(tmp_path / "file" / "result.json")])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("evaluate", ["Metrics", "To cite", "Samples", "Provenance"]),
        ("invariance", ["Equal tokens", "Provenance"]),
        ("probe", ["Accuracy", "Weights", "Provenance"]),
    ],
)
def test_the_page_has_the_numbers_that_are_printed(
    name: str, heads: list[str], line: SmallLine, pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    run_command([*command(name, line, pictures, tmp_path), "--page", str(tmp_path / "page.html")])
    printed = capsys.readouterr().out
    html = (tmp_path / "page.html").read_text()
    page = Page(html)
    assert page.within("h2") == heads
    assert f"\npage: {tmp_path / 'page.html'}\n" in printed
    numbers = [text for text in page.within("td") if re.fullmatch(r"[\d.]+( ± [\d.]+)?", text) and text in printed]
    assert len(numbers) >= 2
    assert "<style>svg{" not in html  # figures have the page's colours, not a file's own
    assert html.count("<svg") == {"evaluate": 0, "invariance": 2, "probe": 1}[name]
    assert sum(tag == "img" for tag, _ in page.tags) == (12 if name == "evaluate" else 0)


def test_another_kind_of_page_is_refused(line: SmallLine, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"page.pdf is not an HTML file: give a name that ends in .html"):
        run_command([*command("probe", line, pictures, tmp_path), "--page", str(tmp_path / "page.pdf")])


def test_a_dry_run_has_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--json has no effect with --dry-run"):
        run_command(["reproduce", "table3", "--out", str(tmp_path / "out"), "--dry-run", "--json", "-"])
    assert not (tmp_path / "out").exists()
