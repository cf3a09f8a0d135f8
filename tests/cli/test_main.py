"""The command line: help that lists what there is, the whole line by hand, and mistakes that harm nothing."""

import ast
import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import st_ar
from st_ar import __version__
from st_ar.cli import COMMANDS, load_command, main
from st_ar.cli.train import Train
from st_ar.config import (
    ClassifierConfig,
    InvarianceSettings,
    PlanConfig,
    SampleSettings,
    TrainConfig,
    WatchConfig,
)
from st_ar.data.store import TokenStore
from st_ar.evaluation.probe import probe
from st_ar.evaluation.probe_classifiers import ProbeConfig
from st_ar.model.weights import load_model
from st_ar.presets import PRESETS
from st_ar.sampling import sample_images
from st_ar.tokenizer import load_tokenizer
from st_ar.tokenizer.kmeans import KMeansTokenizer
from tests.disk import contents

Capture = pytest.CaptureFixture[str]
ROOT = Path(st_ar.__file__).parent
CLASSES = {name: load_command(name) for name in COMMANDS if name not in ("train", "train-tokenizer")}


def test_a_place_that_may_not_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    real = Path.is_dir

    def is_dir(path: Path) -> bool:  # as for a user who may not enter the folder: root may always
        if path.name == "hidden":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    with pytest.raises(SystemExit) as stop:
        main(["tokenize", "--images", "folder:a/hidden", "--tokenizer", "t", "--out", "o"])
    message = "st-ar: a/hidden: Permission denied; give a path that you can read and write\n"
    assert (stop.value.code, *capsys.readouterr()) == (2, "", message)


def run_st_ar(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m st_ar`, as a user's shell would start it."""
    return subprocess.run([sys.executable, "-m", "st_ar", *arguments], capture_output=True, text=True, check=False)


def helped(capsys: Capture, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What is printed by a call that only explains; it may return or exit with 0."""
    monkeypatch.setenv("COLUMNS", "100")  # wider ones get two columns
    status: object = 0
    try:
        main(arguments)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


def refused(capsys: Capture, match: str, *arguments: str | Path) -> None:
    """A user's mistake: status 2, one line on stderr that says what is wrong, nothing else but notes."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("st-ar: note: ")]
    assert len(lines) == 1
    assert re.match(r"st-ar(, rank \d+)?: ", lines[0])
    assert re.search(match, lines[0]), err


def flags(cls: type, prefix: str = "") -> list[str]:
    """Every option that a dataclass of settings has on the command line."""
    found: list[str] = []
    for field in dataclasses.fields(cls):
        hint: Any = get_type_hints(cls)[field.name]
        name = prefix + field.name.replace("_", "-")
        if hint in (ClassifierConfig, InvarianceSettings, SampleSettings):
            found += flags(hint, prefix)
        else:
            found += flags(hint, f"{name}.") if dataclasses.is_dataclass(hint) else [f"--{name}"]
    return found


# Help


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_help_lists_every_verb_and_nothing_else(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    listed = re.findall(r"^  ([a-z-]+)  +\S", helped(capsys, monkeypatch, *arguments), flags=re.MULTILINE)
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("command", CLASSES)
def test_each_commands_help_explains_every_option(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    text = helped(capsys, monkeypatch, command, "--help")
    assert (CLASSES[command].__doc__ or "").splitlines()[0] in text
    options = [
        flag
        for flag in flags(CLASSES[command])
        if flag not in ("--preset", "--source", "--target", "--samples", "--what", "--shell")
    ]  # words without dashes
    assert options or command == "completion"
    for flag in options:
        assert re.search(rf"(?m)^\W*{flag}\b", text), flag


@pytest.mark.parametrize("path", [ROOT / "config.py", *sorted((ROOT / "cli").glob("*.py"))], ids=lambda path: path.name)
def test_helps_are_whole_paragraphs(path: Path) -> None:
    """tyro breaks a field's help before a line of its docstring that begins with no letter, as indented lines do."""
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    for one in classes:
        for field, after in pairwise(one.body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert "\n" not in ast.literal_eval(after.value), ast.unparse(field)
        paragraphs = (ast.get_docstring(one) or "").split("\n\n")
        assert not [line for part in paragraphs for line in part.splitlines()[1:] if not line[0].isalpha()], one.name


def test_trains_help_lists_every_preset(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    text = helped(capsys, monkeypatch, "train", "--help")
    for name, build in PRESETS.items():
        assert re.search(rf"(?m)^  {name} +{re.escape((build.__doc__ or '').splitlines()[0])}$", text)


@pytest.mark.parametrize("preset", ["llamagen-b", "st-ar-digits"])
def test_a_presets_help_explains_every_setting(capsys: Capture, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    text = helped(capsys, monkeypatch, "train", preset, "--help")
    own = [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(Train)
        if field.name not in ("preset", "config", "watching", "planning")
    ]
    for flag in [*own, *flags(PlanConfig), *flags(WatchConfig), *flags(TrainConfig)]:
        assert re.search(rf"(?m)^\W*{flag}\b", text), flag
    width = PRESETS[preset]().model.dim
    assert re.search(
        rf"--model\.dim INT[^(]*\(D\)[^(]*\(default: {width}\)", text
    )  # the preset's value, not the class's


def test_the_version_is_printed(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert helped(capsys, monkeypatch, "--version") == f"{__version__}\n"


def test_help_does_not_wait_for_torch() -> None:
    script = """
import sys
from st_ar.cli import main
for arguments in (["--help"], ["train", "--help"], ["train", "st-ar-b", "--help"], ["sample", "--help"], ["nonsense"],
                  ["train-tokenizer", "--help"], ["train-tokenizer", "vq-16", "--help"], ["train-tokenizer", "vq-61"]):
    try:
        main(arguments)
    except SystemExit:
        pass
import os
print(os.environ["GOMP_SPINCOUNT"])  # in time for torch, whose threads read it when it is imported
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("10000\n")
    assert "usage: st-ar train PRESET" in done.stdout
    assert "usage: st-ar train-tokenizer PRESET" in done.stdout


# Mistakes in the words themselves


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("tran",), "unknown command 'tran': give one of quickstart, .*attention"),
        (("train", "st-ar-digit"), r"unknown preset 'st-ar-digit': did you mean st-ar-digits\?"),
        (("train", "--tokens", "x"), "train has no preset: give one of llamagen-b.* before the options"),
        (("train",), "train has no preset"),
    ],
)
def test_an_unknown_word_is_answered_in_one_line(capsys: Capture, arguments: tuple[str, ...], match: str) -> None:
    refused(capsys, match, *arguments)


def test_the_shell_sees_status_2_and_no_traceback() -> None:
    done = run_st_ar("tran")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("st-ar: unknown command 'tran'")
    assert done.stderr.count("\n") == 1


ALONE = sorted(set(CLASSES) - {"tokenize", "sample", "reference", "evaluate", "reconstruct", "env", "completion"})


@pytest.mark.parametrize("command", [*([verb] for verb in ALONE), ["train-tokenizer", "kmeans"]], ids=" ".join)
def test_ranks_that_would_all_do_the_same_are_refused(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, f"st-ar {' '.join(command)} runs in one process, not in 2: start it without torchrun", *command)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["tran"], "unknown command 'tran'"),
        (["sample", "--model", "none", "--tokenizer", "t", "--out", "o.npz"], "none does not exist; give a run"),
    ],
)
def test_torchruns_report_ends_with_the_error(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    refused(capsys, message, *command)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    report = str(ChildFailedError("st-ar", {0: failure}))
    assert re.search(rf"traceback : {message}.*\n=+$", report), report
    assert abs(failure.timestamp - time.time()) < 100


def test_an_unknown_option_is_named_with_status_2() -> None:
    done = run_st_ar("train", "st-ar-digits", "--tokens", "x", "--out", "y", "--optim.learning-rate", "1")
    assert done.returncode == 2
    assert "--optim.learning-rate" in done.stderr
    assert "Traceback" not in done.stderr


def test_steps_and_epochs_exclude_each_other(capsys: Capture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "st-ar-digits", "--tokens", "x", "--out", str(tmp_path / "run"), "--steps", "3", "--epochs=1"])
    assert stop.value.code == 2
    assert "give --steps or --epochs, not both" in capsys.readouterr().err
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        (("--model.dim", "30"), "--model.dim 30 over --model.n-heads 4 must be a whole multiple of 4"),
        (("--views", "1"), "--selfguided.view-loss compares different views"),
        (("--steps", "0"), "--steps must be at least 1, not 0"),
    ],
)
def test_a_setting_out_of_range_is_named(capsys: Capture, tmp_path: Path, setting: tuple[str, str], match: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "st-ar-digits", "--tokens", "x", "--out", str(tmp_path / "run"), *setting])
    assert stop.value.code == 2
    err = re.sub(r"[│\s]+", " ", capsys.readouterr().err)  # tyro wraps what it boxes
    assert match in err
    assert "Traceback" not in err


# The whole line by hand

SMALL = [
    *("--model.vocab-size", "64", "--model.dim", "32", "--model.n-heads", "2", "--model.n-layers", "2"),
    *("--batch-size", "8", "--selfguided.projector-hidden", "16"),
]

TOKENIZER = ["train-tokenizer", "kmeans", "--images", "digits", "--vocab-size", "64"]


class Line:
    """The artefacts of one line of commands, and what each printed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.printed = folder, dict[str, str]()
        self.tokenizer, self.train, self.test, self.run = (folder / n for n in ("tokenizer", "train", "test", "run"))

    def do(self, name: str, *arguments: str | Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main([str(argument) for argument in arguments])
        self.printed[name] = out.getvalue()

    def train_command(self, out: Path, *more: str, preset: str = "st-ar-digits") -> list[str | Path]:
        return ["train", preset, "--tokens", self.train, "--out", out, *SMALL, *more]

    def sample_command(self, out: Path, *more: str | Path) -> list[str | Path]:
        return ["sample", "--model", self.run, "--tokenizer", self.tokenizer, "--out", out, "--num", "5", *more]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    line = Line(tmp_path_factory.mktemp("line"))
    line.do("tokenizer", *TOKENIZER, "--out", line.tokenizer)
    for name, crops, out in (("train", "ten", line.train), ("test", "center", line.test)):
        line.do(
            name,
            "tokenize",
            "--images",
            f"digits:{name}",
            "--tokenizer",
            line.tokenizer,
            "--crops",
            crops,
            "--out",
            out,
        )
    line.do("run", *line.train_command(line.run, "--steps", "3"))
    return line


def test_the_tokenizer_and_the_stores_are_what_they_say(line: Line) -> None:
    assert line.printed["tokenizer"] == f"{line.tokenizer}: 64 codes of 4 x 4 pixels\n"
    assert (
        line.printed["train"]
        == f"{line.train}: 1,297 images x 5 crops x 8 x 8 tokens; 10 classes of 128 to 132 images\n"
    )
    assert line.printed["test"] == f"{line.test}: 500 images x 1 crop x 8 x 8 tokens; 10 classes of 46 to 51 images\n"
    store = TokenStore(line.train)
    store.verify()
    assert (store.meta.source, store.meta.vocab_size) == ("digits:train", 64)
    assert store.meta.tokenizer == load_tokenizer(line.tokenizer).fingerprint
    assert TokenStore(line.test).meta.crops == ["center"]


def test_the_run_has_the_settings_given_and_the_presets_rest(line: Line) -> None:
    assert line.printed["run"] == f"{line.run}: trained; weights in {line.run / 'export'}\n"
    saved = json.loads((line.run / "config.json").read_text())
    assert saved["preset"] == "st-ar-digits"
    preset = dataclasses.asdict(PRESETS["st-ar-digits"]())
    preset["model"] |= {"vocab_size": 64, "dim": 32, "n_heads": 2, "n_layers": 2}
    preset["selfguided"]["projector_hidden"] = 16
    preset |= {"batch_size": 8, "steps": 3}
    assert saved["config"] == json.loads(json.dumps(preset))
    assert [json.loads(text)["step"] for text in (line.run / "log.jsonl").read_text().splitlines()] == [3]
    weights = load_file(line.run / "export" / "model.safetensors")
    assert weights["output.weight"].shape == (64, 32)
    assert weights["output.weight"].abs().max() > 0  # trained: it begins at 0


def test_a_run_that_is_validated_says_when_it_was_best(line: Line, tmp_path: Path) -> None:
    run = tmp_path / "run"
    getting_worse = ["--checkpoint-every", "1", "--optim.lr", "9", "--optim.warmup-steps", "0"]
    line.do("validated", *line.train_command(run, "--steps", "2", "--validation", line.test, *getting_worse))
    first, second = line.printed["validated"].splitlines()
    measured = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
    best, last = sorted((e for e in measured if "validation_loss" in e), key=lambda entry: entry["validation_loss"])
    assert (best["step"], last["step"]) == (1, 2)
    assert first == f"{run}: trained; weights in {run / 'export'}"
    assert second == f"{run / 'best'}: lowest validation loss, {best['validation_loss']:.4f}, at step {best['step']}"


def test_resuming_a_finished_run_leaves_its_weights(line: Line) -> None:
    before = contents(line.run / "export") | contents(line.run / "checkpoints")
    log = (line.run / "log.jsonl").read_text()
    line.do("resumed", *line.train_command(line.run, "--steps", "3", "--resume"))
    assert line.printed["resumed"] == line.printed["run"]
    assert contents(line.run / "export") | contents(line.run / "checkpoints") == before
    assert (line.run / "log.jsonl").read_text() == log


def test_samples_in_a_file_and_in_a_folder_are_the_same_images(line: Line, tmp_path: Path) -> None:
    more = ["--labels", "3", "7", "--seed", "5", "--top-k", "20", "--cfg-scale", "2", "--dtype", "float32"]
    line.do("npz", *line.sample_command(tmp_path / "samples.npz", *more))
    line.do("pngs", *line.sample_command(tmp_path / "samples", *more))
    assert line.printed["npz"] == f"{tmp_path / 'samples.npz'}: 5 images of 32 x 32 pixels\n"
    assert line.printed["pngs"] == f"{tmp_path / 'samples'}: 5 images of 32 x 32 pixels\n"
    with np.load(tmp_path / "samples.npz") as saved:
        images, labels = saved["arr_0"], saved["arr_1"].tolist()
    assert labels == [3, 7, 3, 7, 3]
    settings = SampleSettings(seed=5, top_k=20, cfg_scale=2.0)
    expected = sample_images(load_model(line.run), load_tokenizer(line.tokenizer), labels, settings)
    np.testing.assert_array_equal(images, expected)
    for index, image in enumerate(images):
        with Image.open(tmp_path / "samples" / f"{index:06d}.png") as opened:
            np.testing.assert_array_equal(np.asarray(opened), image)
    metadata = [json.loads((tmp_path / name).read_text()) for name in ("samples.json", "samples/metadata.json")]
    assert metadata[0] == metadata[1]
    assert metadata[0]["settings"] == dataclasses.asdict(settings)
    previews = [(tmp_path / f"{name}.preview.png").read_bytes() for name in ("samples.npz", "samples")]
    assert previews[0] == previews[1]


def test_so_many_of_each_class_are_drawn_in_batches_of_any_size(line: Line, tmp_path: Path) -> None:
    command = ["sample", "--model", line.run, "--tokenizer", line.tokenizer, "--per-class", "2", "--dtype", "float32"]
    for size in ("7", "20"):
        line.do("per class", *command, "--batch-size", size, "--out", tmp_path / f"{size}.npz")
    assert line.printed["per class"] == f"{tmp_path / '20.npz'}: 20 images of 32 x 32 pixels\n"
    assert (tmp_path / "7.npz").read_bytes() == (tmp_path / "20.npz").read_bytes()
    with np.load(tmp_path / "20.npz", allow_pickle=False) as saved:
        assert saved["arr_1"].tolist() == [*range(10)] * 2
    assert (
        json.loads((tmp_path / "20.json").read_text())["settings"]["cfg_scale"] == 1.0
    )  # no published one of this size


def test_the_help_of_sampling_names_the_published_guidance(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = re.sub(r"[│\s]+", " ", helped(capsys, monkeypatch, "sample", "--help"))
    assert "LlamaGen's for its class models (B, L 2.0; XL, XXL 1.75; 3B 1.65), else 1" in shown
    assert "--cfg-schedule {constant,linear,power-cosine}" in shown


def test_the_probe_prints_and_keeps_what_the_library_measures(line: Line, tmp_path: Path) -> None:
    out = tmp_path / "probe.json"
    stores = ["--tokens", line.train, "--test-tokens", line.test]
    settings = ["--epochs", "2", "--base-lr", "1", "--steps", "1", "64", "--train-crops", "4", "--seed", "3"]
    line.do("probe", "probe", "--model", line.run, *stores, *settings, "--layers", "2", "--out", out)
    expected = probe(
        load_model(line.run),
        TokenStore(line.train),
        TokenStore(line.test),
        layer=2,
        steps=[1, 64],
        train_crops=[4],
        config=ProbeConfig(epochs=2, base_lr=1.0, seed=3),
    )
    assert expected.top5 is not None
    (kept,) = json.loads(out.read_text())["results"]
    assert (kept["layer"], kept["steps"], kept["train_images"], kept["test_images"]) == (2, [1, 64], 1297, 500)
    assert (kept["top1"], kept["top5"]) == (expected.top1, expected.top5)
    first, header, *rows = line.printed["probe"].splitlines()[:4]
    assert first == "linear probe after MAE, 1,297 training and 500 test images"
    assert header.split()[-3:] == ["layer", "1", "64"]
    assert [row.split() for row in rows] == [
        ["run", "2", label, *(f"{100 * share:.1f}" for share in shares)]
        for label, shares in (("top-1", expected.top1), ("top-5", expected.top5))
    ]


def test_attention_draws_the_maps_and_prints_the_statistics_it_keeps(line: Line, tmp_path: Path) -> None:
    out = tmp_path / "maps"
    files = ["--tokens", line.test, "--tokenizer", line.tokenizer, "--out", out, "--device", "cpu"]
    models = ["--model", line.run, line.run / "export" / "ema.safetensors", "--names", "live", "EMA"]
    chosen = ["--layers", "1", "2", "--heads", "mean", "2", "--steps", "9", "40", "--images", "4", "--average", "6"]
    masks = ["--mask-ratio", "0.25", "--seed", "3", "--no-mask-own-position"]
    line.do("attention", "attention", *models, *files, *chosen, *masks)
    maps = [f"layer-{layer}-{head}.png" for layer in (1, 2) for head in ("head-2", "mean")]
    assert sorted(path.name for path in out.glob("layer-*.png")) == maps
    assert json.loads((out / "layer-1-mean.json").read_text())["tokens read"] == [9, 40]
    saved = json.loads((out / "statistics.json").read_text())
    assert saved["masks"] == {"ratio": 0.25, "seed": 3, "own_position": False}
    assert saved["images"] == 6
    header, *rows, empty, last = line.printed["attention"].splitlines()
    columns = ["layer, model", "on the class", "on the 3 x 3", "distance (tokens)", "entropy (nats)"]
    assert re.split("  +", header) == columns
    expected: list[list[str]] = []
    for layer in ("1", "2"):
        for name in ("live", "EMA"):
            mean, std = (saved["models"][name]["layers"][layer]["over_heads"][which] for which in ("mean", "std"))
            cells = [f"{mean[key]:.3f} ± {std[key]:.3f}" for key in ("class_weight", "neighbour_weight")]
            cells += [f"{mean[key]:.2f} ± {std[key]:.2f}" for key in ("distance", "entropy")]
            expected.append([f"{layer}, {name}", *cells])
    assert [re.split("  +", row) for row in rows] == expected
    assert (empty, last) == ("", f"page: {out / 'attention.html'}")


@pytest.mark.parametrize(
    ("preset", "flag", "value", "expected"),
    [
        ("st-ar-b", "--steps", "1", {"steps": 1, "epochs": None}),  # the preset has 300 epochs
        ("llamagen-digits", "--epochs=0.004", "", {"steps": None, "epochs": 0.004}),  # the preset has 200 steps
    ],
)
def test_the_users_budget_replaces_the_presets(
    line: Line, tmp_path: Path, preset: str, flag: str, value: str, expected: dict[str, Any]
) -> None:
    sizes = ["--model.grid", "8", "--model.num-classes", "10", "--selfguided.contrast-layer", "1"]
    budget = [flag, value] if value else [flag]
    line.do(preset, *line.train_command(tmp_path / "run", *sizes, *budget, preset=preset))
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert {name: config[name] for name in expected} == expected
    assert json.loads((tmp_path / "run" / "export" / "config.json").read_text())["step"] == 1  # 0.004 * 1297 / 8


# Mistakes that the disk must not suffer from


@pytest.fixture
def unharmed(line: Line) -> Any:
    """Every artefact of the line is the same after the test, and nothing was added."""
    before = contents(line.folder)
    yield
    assert contents(line.folder) == before


@pytest.mark.usefixtures("unharmed")
class TestMistakes:
    def test_a_class_that_the_model_does_not_know(self, capsys: Capture, line: Line) -> None:
        command = line.sample_command(line.folder / "new.npz", "--labels", "3", "10")
        refused(capsys, "--labels 10 is out of range: the model knows classes 0 to 9", *command)

    def test_a_batch_of_no_images(self, capsys: Capture, line: Line) -> None:
        refused(capsys, "batch-size", *line.sample_command(line.folder / "new.npz", "--batch-size", "0"))

    def test_a_number_of_images_beside_one_of_each_class(self, capsys: Capture, line: Line) -> None:
        command = line.sample_command(line.folder / "new.npz", "--per-class", "2")  # which has a --num
        refused(capsys, "give --num or --per-class, not both", *command)

    def test_more_likely_tokens_than_there_are(self, capsys: Capture, line: Line) -> None:
        command = line.sample_command(line.folder / "new.npz", "--top-k", "65")
        refused(capsys, r"--top-k must lie in \[0, 64\], the size of the codebook, not 65", *command)

    def test_samples_over_samples(self, capsys: Capture, line: Line) -> None:
        for taken in (line.tokenizer, line.run):
            refused(capsys, "exists already and is not empty", *line.sample_command(taken))

    def test_samples_with_another_tokenizer_of_the_same_size(self, capsys: Capture, line: Line, tmp_path: Path) -> None:
        other = KMeansTokenizer(torch.rand(64, 48, generator=torch.Generator().manual_seed(0)), 4)
        other.save(tmp_path / "other")
        command = ["sample", "--model", line.run, "--tokenizer", tmp_path / "other", "--out", line.folder / "new.npz"]
        refused(capsys, f"uses the codes of tokenizer .*{other.fingerprint[:12]}", *command)

    def test_a_run_over_a_run(self, capsys: Capture, line: Line) -> None:
        command = line.train_command(line.run, "--steps", "3")
        refused(capsys, "holds a run already, with a checkpoint of step 3: give --resume", *command)

    def test_a_run_over_something_else(self, capsys: Capture, line: Line) -> None:
        command = line.train_command(line.tokenizer, "--steps", "3")
        refused(capsys, "exists already and is not empty", *command)

    def test_resuming_with_other_settings(self, capsys: Capture, line: Line) -> None:
        command = line.train_command(line.run, "--steps", "5", "--resume", "--optim.lr", "0.5")
        refused(capsys, r"begun with other settings: optim\.lr was 0\.001, now 0\.5\. Give the old ones", *command)

    def test_resuming_what_is_not_there(self, capsys: Capture, line: Line) -> None:
        command = line.train_command(line.folder / "new", "--steps", "3", "--resume")
        refused(capsys, "new holds no run to resume", *command)

    def test_a_store_over_a_store(self, capsys: Capture, line: Line) -> None:
        command = ["tokenize", "--images", "digits", "--tokenizer", line.tokenizer, "--out", line.train]
        refused(capsys, "train is a finished token store already", *command)

    def test_a_tokenizer_over_a_tokenizer(self, capsys: Capture, line: Line) -> None:
        command = ["train-tokenizer", "kmeans", "--images", "digits", "--out", line.tokenizer]
        refused(capsys, "tokenizer exists already and is not empty", *command)

    @pytest.mark.parametrize("value", ["0", "-4", "100"])
    def test_a_patch_that_no_image_has(self, capsys: Capture, line: Line, value: str) -> None:
        refused(capsys, "--patch", *TOKENIZER, "--out", line.folder / "new", "--patch", value)

    @pytest.mark.parametrize("value", ["0", "-4"])
    def test_a_codebook_of_nothing(self, capsys: Capture, line: Line, value: str) -> None:
        refused(capsys, "--vocab-size", *TOKENIZER[:4], "--out", line.folder / "new", "--vocab-size", value)

    def test_a_seed_below_0(self, capsys: Capture, line: Line) -> None:
        stores = ["--tokens", line.train, "--test-tokens", line.test]
        for command in (
            [*TOKENIZER, "--out", line.folder / "new"],
            line.sample_command(line.folder / "new"),
            line.sample_command(line.folder / "new", "--label-mode", "random"),
            ["probe", "--model", line.run, *stores, "--epochs", "1", "--steps", "64"],
        ):
            refused(
                capsys,
                r"--seed must (lie in \[0, 18446744073709551615\]|be 0 or more), not -1",
                *command,
                "--seed",
                "-1",
            )

    def test_a_place_inside_a_file(self, capsys: Capture, line: Line) -> None:
        new = line.tokenizer / "tokenizer.json" / "new"
        stores = ["--tokens", line.train, "--test-tokens", line.test]
        for command in (
            [*TOKENIZER, "--out", new],
            ["tokenize", "--images", "digits", "--tokenizer", line.tokenizer, "--out", new],
            line.train_command(new, "--steps", "1"),
            line.sample_command(new),
            ["probe", "--model", line.run, *stores, "--epochs", "1", "--steps", "64", "--out", new],
            ["quickstart", "--images", "digits", "--steps", "1", "--out", new],
        ):
            refused(capsys, "tokenizer.json", *command)

    def test_images_that_nobody_has(self, capsys: Capture, line: Line) -> None:
        command = ["train-tokenizer", "kmeans", "--images", "digit", "--out", line.folder / "new"]
        refused(capsys, "unknown image source 'digit'", *command)

    def test_a_model_of_another_codebook(self, capsys: Capture, line: Line) -> None:
        command = ["train", "st-ar-digits", "--tokens", line.train, "--out", line.folder / "new"]
        refused(capsys, "has 64 tokens in the codebook, the model 256: train with --model.vocab-size 64", *command)

    def test_a_model_that_is_not_there(self, capsys: Capture, line: Line) -> None:
        stores = ["--tokens", line.train, "--test-tokens", line.test]
        command = ["probe", "--model", line.folder / "new", *stores, "--out", line.folder / "new.json"]
        refused(capsys, "new does not exist; give a run", *command)

    @pytest.mark.parametrize(
        ("option", "match"),
        [
            (["--layers", "3"], "no layer 3: this network has layers 1 to 2"),
            (["--layers", "1", "0"], "no layer 0: this network has layers 1 to 2"),
            (["--steps", "65"], "no step 65: this model's images have steps 1 to 64"),
            (["--train-crops", "5"], "no crop 5: .*train has crops 0 to 4"),
            (["--train-crops"], "--train-crops"),
            (["--epochs", "0"], "--epochs"),
            (["--base-lr", "nan"], "--base-lr"),
        ],
    )
    def test_a_probe_of_what_is_not_there(self, capsys: Capture, line: Line, option: list[str], match: str) -> None:
        stores = ["--tokens", line.train, "--test-tokens", line.test]
        command = ["probe", "--model", line.run, *stores, "--out", line.folder / "new.json", *option]
        refused(capsys, match, *command)

    @pytest.mark.parametrize(
        ("option", "match"),
        [
            (["--layers", "3"], "no layer 3: run has layers 1 to 2"),
            (["--heads", "3"], "no head 3: run has heads 1 to 2"),
            (["--steps", "64"], "no step 64: maps can be drawn after reading 1 to 63"),
            (["--images", "500"], "no image 500: .* has images 0 to 499"),
            (["--mask-ratio", "1"], "--mask-ratio must lie in"),
            (["--seed", "1"], "--seed and --no-mask-own-position need masked keys: give --mask-ratio too"),
            (["--no-mask-own-position"], "--seed and --no-mask-own-position need masked keys"),
        ],
    )
    def test_attention_to_what_is_not_there(self, capsys: Capture, line: Line, option: list[str], match: str) -> None:
        files = ["--model", line.run, "--tokens", line.test, "--tokenizer", line.tokenizer]
        refused(capsys, match, "attention", *files, "--out", line.folder / "new", *option)


def test_a_mistake_in_the_files_is_one_line_in_the_shell_too(line: Line) -> None:
    before = contents(line.folder)
    done = run_st_ar(*[str(a) for a in line.sample_command(line.folder / "none.npz", "--labels", "10")])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "st-ar: --labels 10 is out of range: the model knows classes 0 to 9\n"
    assert contents(line.folder) == before


def test_env_prints_what_a_bug_report_needs(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    main(["env"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    main(["env", "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    assert (lines["st-ar"], lines["torch"]) == (found["st_ar"], found["torch"]) == (__version__, torch.__version__)
    assert f"numpy {np.__version__}" in lines["packages"]
    assert found["packages"]["numpy"] == np.__version__
    assert "OMP_NUM_THREADS 1" in lines["variables"]
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert found["gpus"] == []
    assert found["cores"] >= found["threads"] >= 1
    assert found["memory"].endswith(" GiB")
