"""Models go to a hub and come back: the real client against a hub in miniature on localhost."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from st_ar.errors import UserError
from st_ar.files import write_json
from st_ar.hub import model_card
from st_ar.model.weights import download
from tests.disk import contents, refused
from tests.toys import TINY_TEXT, random_model, save_export

ROOT = Path(__file__).parent.parent
INFO = {"step": 1234, "preset": "st-ar-toy", "class_names": ["a", "b", "c"], "tokenizer": "abc123"}
# huggingface_hub reads its address when it is imported, so each address needs a process of its own.
PUSH_AND_PULL = """
import sys, torch
from st_ar import UserError, load_model, push_to_hub
from safetensors.torch import load_file
print(push_to_hub(sys.argv[1], "somebody/toy", metrics={"probe": 0.625}))
for ema, file in ((False, "model.safetensors"), (True, "ema.safetensors")):
    found, expected = load_model("hub:somebody/toy", ema=ema).state_dict(), load_file(sys.argv[1] + "/export/" + file)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
try:
    load_model("hub:somebody/nothing")
except UserError as error:
    print(error)
"""
FAIL_TO_PUSH_AND_PULL = """
import sys
from st_ar import UserError, load_model, push_to_hub
for call in (lambda: push_to_hub(sys.argv[1], "somebody/toy"), lambda: load_model("hub:somebody/toy")):
    try:
        call()
    except UserError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = subprocess.Popen([sys.executable, "-m", "tests.small_hub"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stdout is not None
    yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    server.kill()
    server.wait()
    server.stdout.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_export(tmp_path / "run" / "export", random_model(seed=1), random_model(seed=2), INFO)
    settings = {"config": {"model": {}, "seed": 5, "selfguided": {"mask_ratio": 0.25}}}
    write_json(tmp_path / "run" / "config.json", settings | {"tokens": {"source": "photos:train", "images": 8208}})
    return tmp_path / "run"


def talk(code: str, address: str, run: Path) -> list[str]:
    """The lines that a program prints which talks to the hub."""
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(run.parent / "home"), "HF_TOKEN": "hf_toy"}
    command = [sys.executable, "-c", code, str(run)]
    environment = os.environ | settings | {"HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_run_goes_up_and_both_its_weights_come_back_and_a_missing_model_is_named(address: str, run: Path) -> None:
    before = contents(run)
    url, error = talk(PUSH_AND_PULL, address, run)
    assert url == f"{address}/somebody/toy"
    assert contents(run) == before
    assert re.match(r"hub:somebody/nothing cannot be had .*check the name and the network", error)


def test_without_a_network_the_error_says_so(run: Path) -> None:
    push, pull = talk(FAIL_TO_PUSH_AND_PULL, "http://127.0.0.1:9", run)  # the discard port: nobody answers
    assert re.match("hub:somebody/toy cannot be written .*network", push)
    assert re.match("hub:somebody/toy cannot be had .*network", pull)


def test_a_cache_that_may_not_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "/cache/hub")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(
        UserError, match=r"hub:a/b cannot be stored \(.*Read-only .*/cache/hub'\): set HF_HOME to a folder"
    ):
        download("a/b")


def test_the_card_says_what_the_model_is_and_how_it_was_made(run: Path) -> None:
    card = model_card(run / "export", "somebody/toy", metrics={"probe accuracy": 0.625}, licence="mit")
    head, body = card.removeprefix("---\n").split("\n---\n")
    assert "license: mit" in head
    for told in (
        "preset st-ar-toy",
        "4 layers, 2 heads, width 16; 11 codes, 3 x 3 tokens, 3 classes; 1,234 optimizer steps",
        'st_ar.load_model("hub:somebody/toy")',
        "photos:train (8208 images)",
        "tokenizer: abc123",
        "- probe accuracy: 0.625",
    ):
        assert told in body
    recipe = json.loads(body.split("```json\n")[1].split("```")[0])
    assert recipe == {"seed": 5, "selfguided": {"mask_ratio": 0.25}}


def test_the_card_of_a_text_model_names_its_condition_and_encoder(tmp_path: Path) -> None:
    model = random_model(TINY_TEXT)
    save_export(tmp_path, model, model, INFO | {"encoder": "t5"})
    card = model_card(tmp_path, "somebody/toy", metrics={}, licence="mit")
    assert "3 x 3 tokens, captions of 5 x 6 features; 1,234 optimizer steps" in card
    assert "- captions: t5\n" in card


def test_the_card_of_an_export_alone_leaves_out_what_it_cannot_know(tmp_path: Path) -> None:
    model = random_model()
    save_export(tmp_path, model, model, INFO)
    card = model_card(tmp_path, "somebody/toy", metrics={}, licence="mit")
    assert "images: not recorded" in card
    assert "None were given." in card
    assert '"not recorded"' in card.split("```json")[1]


@pytest.mark.parametrize("part", ["config", "tokens"])
def test_a_run_whose_config_is_damaged_is_refused_for_its_card(run: Path, part: str) -> None:
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(record | {part: 3}))
    with refused(run, r"config\.json is damaged \(config or tokens is not an object\)"):
        model_card(run / "export", "somebody/toy", metrics={}, licence="mit")
