"""Every command and every snippet of README.md and docs/ is run here, at a tiny size, or read by the command line's own parser."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import st_ar
from st_ar.cli import read_command, run_command
from tests.docs.blocks import ROOT, Block, blocks, name_of, pages
from tests.docs.stand_ins import PARSED, PARSED_PYTHON, SHELL_WORDS, TINY


def draw_pictures(folder: Path, classes: int, each: int, seed: int) -> None:
    """A sub-folder for each class of small pictures: stripes in the class's direction and colour, with noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:36, :36] / 36
    for label in range(classes):
        (folder / f"{label:02}").mkdir(parents=True)
        angle, colour = np.pi * label / classes, np.abs(np.sin(label + np.arange(3)))
        for number in range(each):
            wave = np.sin(14 * (rows * np.cos(angle) + columns * np.sin(angle)) + rng.uniform(0, 6))
            pixels = 128 + 90 * wave[..., None] * colour + rng.normal(0, 12, (36, 36, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{label:02}/{number:03}.png")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take as given, as the first page's commands make it."""
    folder = tmp_path_factory.mktemp("world")
    for split, each in (("train", 6), ("test", 3)):
        draw_pictures(folder / "photos" / split, 16, each, seed=each)
        draw_pictures(folder / "pictures" / split, 2, 10 * each, seed=each)
    [block] = [b for b in blocks(ROOT / "docs/index.md") if "train-tokenizer kmeans" in b.text]
    with contextlib.chdir(folder):
        for command in block.commands[:5]:
            run_here(command)
    return folder


def tiny(command: str) -> str:
    """The command as it is run here."""
    for pattern, replacement in TINY:
        command = re.sub(pattern, replacement, command).replace("ROOT/", f"{ROOT}/")
    return command


def run_here(command: str) -> None:
    """In this process, if it is one command of ours; in a shell, if it is more."""
    command = tiny(command)
    words = shlex.split(command)
    if words[0] == "st-ar" and not {"|", ">", "&&"} & set(words):
        with contextlib.redirect_stdout(io.StringIO()):
            run_command(words[1:])
        return
    shims = Path("shims").absolute()
    shims.mkdir(exist_ok=True)
    for name, arguments in (("st-ar", "-m st_ar "), ("python", "")):
        (shims / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments}"$@"\n')
        (shims / name).chmod(0o755)
    source = Path(st_ar.__file__).parents[1]
    environment = os.environ | {
        "PATH": f"{shims}:{os.environ['PATH']}",
        "HOME": str(Path.cwd()),
        "PYTHONPATH": f"{source}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def parse(command: str) -> None:
    """Let the parser of whoever would read it read the command.

    Raises:
        AssertionError, SystemExit, UserError: a word that it does not know.
    """
    words = shlex.split(command)
    words = words[: next((n for n, word in enumerate(words) if word in ("|", ">", "&&")), len(words))]
    program, rest = words[0], words[1:]
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(rest)
        assert (options.module, options.training_script) == (False, "$(which st-ar)"), command
        program, rest = "st-ar", options.training_script_args
    if program == "st-ar":
        assert callable(read_command(rest))
    elif program == "pip":
        parse_pip(rest)
    elif program == "make":
        subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True)
    elif program == "tensorboard":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a package inside it
            from tensorboard import program as tensorboard

            tensorboard.TensorBoard().configure(argv=words)
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], command, "exec")
    elif program == "python" and rest[0].startswith("examples/"):
        text = (ROOT / rest[0]).read_text()
        assert all(f'"{word}"' in text for word in rest[1:] if word.startswith("--")), command
    elif program == "curl":
        addresses = [word for word in rest if word != "-LO"]
        assert addresses
        assert all(re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+", address) for address in addresses), command
    else:
        assert re.match(r"python3? (-m venv|autoregressive/)|\. ", command), f"nothing here can read {command!r}"


def parse_pip(arguments: list[str]) -> None:
    """Files that it names are there, and so are the extras."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[0] == "install"
    rest = arguments[1:]
    while rest:
        word = rest.pop(0)
        if word == "-c":
            assert (ROOT / rest.pop(0)).is_file()
        elif found := re.fullmatch(r"(?:\.|st-ar)\[([\w,]+)\]", word):
            assert set(found[1].split(",")) <= set(extras), word
        else:
            assert word in (".", "-e") or re.fullmatch(r"vllm==[\d.]+", word), word


def why_parsed(command: str) -> str:
    """Why it is not run, or nothing."""
    return next((why for pattern, why in PARSED if re.search(pattern, command)), "")


SHELL = [block for page in pages() for block in blocks(page) if block.kind == "shell"]
RUN = {str(b): [c for c in b.commands if not why_parsed(c)] for b in SHELL}
PAGES = sorted(
    {b.page for b in SHELL if RUN[str(b)]}
    | {b.page for p in pages() for b in blocks(p) if b.kind in ("python", "bash")}
)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs_in_its_order(page: str, world: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    keep = ("photos", "pictures") if page in ("README.md", "index.md", "own-images.md") else None
    shutil.copytree(
        world, place, ignore=lambda at, names: [n for n in names if keep and at == str(world) and n not in keep]
    )
    [path] = [p for p in pages() if name_of(p) == page]
    names: dict[str, Any] = {"st_ar": st_ar, "torch": torch, "numpy": np} | given(page)
    with contextlib.chdir(place):
        if page == "imagenet.md":
            pack_imagenet()
        for block in blocks(path):
            if block.kind == "bash":
                subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True)
            if block.kind == "shell":
                for command in RUN[str(block)]:
                    run_here(command)
            elif block.kind == "python" and not any(text in block.text for text in PARSED_PYTHON):
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
        if page == "imagenet.md":
            check_imagenet()
        if page in ("README.md", "own-model.md"):  # the loop ran to its end
            assert (names["step"], bool(names["loss"].isfinite())) == (2, True)


WNIDS = {1: "n02119789", 2: "n02100735", 3: "n01440764"}
"""Three of ImageNet's classes: the development kit's numbers are not in the order of the names."""


def pack_imagenet() -> None:
    """ImageNet's three files as they are published, with three classes, two training and one validation image each."""
    scipy_io = pytest.importorskip("scipy.io")
    made = Path("imagenet-parts")
    data = made / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O")]
    synsets = np.array([(number, name, f"words of {name}") for number, name in WNIDS.items()], dtype=kinds)
    scipy_io.savemat(data / "meta.mat", {"synsets": synsets})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n1\n2\n")
    (made / "classes").mkdir()
    (made / "val").mkdir()
    with tarfile.open("ILSVRC2012_img_train.tar", "w") as train:
        for name in WNIDS.values():
            with tarfile.open(made / f"{name}.tar", "w") as tar:
                for number in range(2):
                    image = made / "classes" / f"{name}_{number}.JPEG"
                    Image.new("RGB", (40, 30)).save(image)
                    tar.add(image, image.name)
            train.add(made / f"{name}.tar", f"{name}.tar")
    with tarfile.open("ILSVRC2012_img_val.tar", "w") as val:
        for number in range(1, 4):
            image = made / "val" / f"ILSVRC2012_val_{number:08}.JPEG"
            Image.new("RGB", (40, 30)).save(image)
            val.add(image, image.name)
    with tarfile.open("ILSVRC2012_devkit_t12.tar.gz", "w:gz") as kit:
        kit.add(made / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")


def check_imagenet() -> None:
    """Every image lies in its class's folder, and the folders' order is the order of ImageNet's class numbers."""
    from st_ar.data.images import open_images

    for split, each in (("train", 2), ("val", 1)):
        source = open_images(f"folder:imagenet/{split}")
        assert list(source.class_names) == sorted(WNIDS.values())
        assert len(list(source.examples(0))) == 3 * each
    validation = {path.name: path.parent.name for path in Path("imagenet/val").glob("*/*.JPEG")}
    assert validation == {f"ILSVRC2012_val_{n:08}.JPEG": WNIDS[label] for n, label in ((1, 3), (2, 1), (3, 2))}
    assert not list(Path("imagenet/train").glob("*.tar"))


def given(page: str) -> dict[str, Any]:
    """What the page's Python takes as given, small."""
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "api.md": for_examples,
        "README.md": for_features,
        "own-model.md": for_a_llama,
    }
    return made[page]() if page in made else {}


def for_examples() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    reference, samples = rng.normal(size=(2, 60, 8))
    means = {"mu1": reference.mean(0), "mu2": samples.mean(0)}
    covariances = {"sigma1": np.cov(reference.T), "sigma2": np.cov(samples.T)}
    features = {"reference": reference, "samples": samples, "probs": np.full((10, 4), 0.25)}
    return means | covariances | features | {"others": torch.zeros(2, 3, 32, 32)}


def for_features() -> dict[str, Any]:
    """A loop around an embedding of 768 features."""
    model = torch.nn.Embedding(16, 768)

    def run(model: Any, tokens: Any, labels: Any, key_mask: Any = None) -> tuple[Any, dict[str, Any]]:
        features = model(tokens)
        return features.mean(), {"mid": features, "last": features}

    loader = [(torch.randint(16, (3, 2, 9)), torch.arange(3))] * 2
    return {"model": model, "run": run, "loader": loader, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}


def for_a_llama() -> dict[str, Any]:
    """The network that the page describes, narrow, and two batches."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16384 + 1001, **sizes))
    loader = [(torch.randint(256, (3, 2, 64)), torch.arange(3))] * 2
    optimizer = torch.optim.AdamW(model.parameters())
    return {"model": model, "tokens": loader[0][0][:2, 0], "loader": loader, "optimizer": optimizer}


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_every_command_is_one_that_its_parser_takes(block: Block) -> None:
    for command in block.commands:
        if why_parsed(command) or command.startswith("st-ar "):
            parse(command)


@pytest.mark.parametrize("block", [b for p in pages() for b in blocks(p) if b.kind in ("script", "yaml")], ids=str)
def test_the_commands_of_scripts_are_ones_that_their_parsers_take(block: Block) -> None:
    text = block.text if block.kind == "script" else yaml.safe_load(block.text)["run"]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    text = re.sub(r"\\\n\s*", "", text)
    for pattern, word in SHELL_WORDS:
        text = re.sub(pattern, word, text)
    commands = re.findall(r"torchrun .*", text)
    assert commands
    for command in commands:
        parse(command)


@pytest.mark.parametrize("block", [b for p in pages() for b in blocks(p) if b.kind == "python"], ids=str)
def test_every_name_that_a_snippet_imports_of_ours_is_there(block: Block) -> None:
    compile(block.text, str(block), "exec")
    for module, names in re.findall(r"from (st_ar[\w.]*) import (.*)", block.text):
        exec(f"from {module} import {names}", {})
    for name in re.findall(r"\bst_ar\.(\w+)\b(?! import)", block.text):
        assert hasattr(st_ar, name) or f"st_ar.{name}" in sys.modules or (ROOT / "src/st_ar" / name).is_dir(), name


def test_a_wrong_option_would_be_found() -> None:
    """The parsers refuse what they should."""
    for command in (
        "st-ar train st-ar-b --tokens a --out b --optim.rate 1",
        'torchrun --nproc-per-node 8 "$(which st-ar)" tokenize --images a --tokenizer b',
        "torchrun --processes 8 -m st_ar tokenize --images a --tokenizer b --out c",
    ):
        with (
            pytest.raises(SystemExit),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            parse(command)


def test_what_stands_in_is_used() -> None:
    """A pattern that finds nothing any more is taken out of the tables."""
    commands = [c for b in SHELL for c in b.commands]
    for pattern, why in PARSED:
        assert any(re.search(pattern, c) for c in commands), (pattern, why)
    run = [c for some in RUN.values() for c in some]
    for pattern, _ in TINY:
        assert any(re.search(pattern, c) for c in run), pattern
