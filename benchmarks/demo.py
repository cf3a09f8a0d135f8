"""The page of `st-ar demo` in Debian's Chromium: time to the first image, cold and warm, and previews a second.

    python benchmarks/demo.py --preset b --name demo-cpu

Models have random weights of the preset's size, the tokenizer is VQ-16 with random weights (of `tiny`, patches of pixels). Cold is from
the command to the first preview that the browser shows; warm is from the press of the button, when the models have drawn before. Previews
are limited to 12 a second and to a quarter of the time.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Page, sync_playwright

from common import save, summarise
from sampling import random_model
from st_ar.config import VQ_16, ModelConfig
from st_ar.model.weights import EMA, LIVE, save_weights
from st_ar.presets import get_preset
from st_ar.tokenizer.kmeans import KMeansTokenizer
from tokenizing import random_tokenizer

WATCH = """
() => {
  window.shown = [];
  const place = document.querySelector('#generate-pictures');
  let last = '';
  new MutationObserver(() => {
    const image = place.querySelector('img');
    if (image && image.src !== last) { last = image.src; window.shown.push(performance.now()); }
  }).observe(place, {childList: true, subtree: true, attributes: true});
}
"""
"""Notes when the first picture on the page becomes another."""


def make_model(folder: Path, preset: str) -> ModelConfig:
    """Write a model and its tokenizer, both with random weights."""
    torch.manual_seed(0)
    if preset == "tiny":
        config = replace(get_preset("llamagen-photos").model, num_classes=10)
        tokenizer = KMeansTokenizer(torch.rand(config.vocab_size, 48) * 2 - 1, 4)
    else:
        config = get_preset(f"llamagen-{preset}").model
        tokenizer = random_tokenizer(VQ_16)
    tokenizer.save(folder / "tokenizer")
    weights = random_model(config).state_dict()
    info = {"step": 0, "preset": preset, "tokenizer": tokenizer.fingerprint}
    save_weights(folder / "model", {LIVE: weights, EMA: weights}, config, info)
    return config


def draw(page: Page, seed: int, images: int) -> dict[str, float]:
    """Press the button and wait for the whole images: milliseconds of the browser's clock as seconds."""
    page.locator("#generate-seed input").fill(str(seed))
    count = page.locator("#generate-count input[type=number]")
    count.fill(str(images))
    count.press("Enter")
    page.evaluate("window.shown.length = 0")
    begun = page.evaluate("performance.now()")
    page.click("#generate-go")
    page.wait_for_function(
        f"document.querySelectorAll('#generate-pictures a.save').length === {images} && window.shown.length > 0"
    )
    shown = [(when - begun) / 1000 for when in page.evaluate("window.shown")]
    page.evaluate(
        "document.querySelector('#generate-pictures').querySelectorAll('a.save').forEach(link => link.remove())"
    )
    rate = (len(shown) - 1) / (shown[-1] - shown[0]) if len(shown) > 1 else 0.0
    return {"first": shown[0], "whole": shown[-1], "frames": len(shown), "frames_per_second": rate}


def measure(folder: Path, images: int, rounds: int, port: int) -> dict[str, Any]:
    """Start the command, open its page, and draw `rounds` times after the first."""
    command = ["-m", "st_ar", "demo", "--model", folder / "model", "--tokenizer", folder / "tokenizer", "--port", port]
    begun = time.perf_counter()
    with (
        subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True) as process,
        sync_playwright() as playwright,
    ):
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[4]
            served = time.perf_counter() - begun
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
            page = browser.new_page()
            page.set_default_timeout(600_000)
            page.goto(address)
            page.wait_for_selector("#generate-go")
            page.evaluate(f"({WATCH})()")
            opened = time.perf_counter() - begun
            first = draw(page, 0, images)
            warm = [draw(page, seed, images) for seed in range(1, rounds + 1)]
            browser.close()
        finally:
            process.terminate()
    return {
        "images": images,
        "seconds until it serves": served,
        "seconds until the page is there": opened,
        "seconds to the first preview, cold": opened + first["first"],
        "seconds to the first preview, warm": summarise([each["first"] for each in warm]),
        "seconds to the whole images, warm": summarise([each["whole"] for each in warm]),
        "frames a second, warm": summarise([each["frames_per_second"] for each in warm]),
        "frames, warm": [each["frames"] for each in warm],
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="b", help="of LlamaGen's sizes: b, l, ..; or tiny")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--name", default="demo-cpu")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error("--rounds must be at least 2: the quartiles of fewer say nothing")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = make_model(Path(folder), given.preset)
        for images in given.images:
            key = f"{given.preset}, {images} image{'s' if images > 1 else ''}"
            results[key] = found = measure(Path(folder), images, given.rounds, given.port)
            for name, value in found.items():
                shown = value["median"] if isinstance(value, dict) else value
                print(f"{key:16}{name:40}{shown if isinstance(shown, list | int) else f'{shown:.2f}'}", flush=True)
    results["model"] = {
        "preset": given.preset,
        "dim": config.dim,
        "layers": config.n_layers,
        "tokens": config.sequence_length,
    }
    save(given.name, results)


if __name__ == "__main__":
    main()
