"""The page in Debian's Chromium: what a visitor does, and what must never happen."""

import contextlib
import io
import os
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from st_ar.config import SampleSettings
from st_ar.demo.generation import read_record
from st_ar.demo.serve import bind, make_server
from st_ar.demo.setup import Setup
from st_ar.sampling import sample_images
from st_ar.training.run import append_log
from tests.demo.small_page import LONG, small_setup
from tests.demo.test_inputs import bomb
from tests.programs import find_program

SOON = 120_000
"""Milliseconds that a busy machine may take."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = find_program("chromium")
    expect.set_options(timeout=SOON)
    with sync_playwright() as playwright:
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[*as_root, "--disable-dev-shm-usage", "--host-resolver-rules=MAP proxy.example 127.0.0.1"],
        )
        yield browser
        browser.close()


class Served:
    """A page that is served by a thread of this process."""

    def __init__(self, setup: Setup, proxy: "Proxy | None" = None) -> None:
        self.setup = setup
        listening = bind("127.0.0.1", 0)
        self.port = listening.getsockname()[1]
        self.url = f"http://localhost:{self.port}/"
        if proxy:
            self.url, proxy.target = f"http://proxy.example:{proxy.port}/a/demo/", self.port
        self.server = make_server(setup, "127.0.0.1", self.url if proxy else "")
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()
        wait_until(lambda: self.server.started)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()

    def position(self, name: str) -> int | None:
        """The token that weights are drawing, or drew last."""
        opened = self.setup.pool.loaded.get(name)
        if opened is None or opened.sampler is None or opened.sampler.token_sampler is None:
            return None
        return int(opened.sampler.token_sampler.position)


class Proxy(socketserver.ThreadingTCPServer):
    """A reverse proxy that serves the demo under /a/demo. It keeps the Host header, and strips the prefix or not."""

    daemon_threads = True
    target = 0

    def __init__(self, *, strips: bool) -> None:
        self.strips = strips
        super().__init__(("127.0.0.1", 0), Connection)
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}).start()


class Connection(socketserver.StreamRequestHandler):
    """Passes one request on; whichever side ends the connection ends the other's."""

    server: Proxy
    timeout = 60

    def handle(self) -> None:
        method, path, version = self.rfile.readline().split()
        if not path.startswith(b"/a/demo/"):  # Chromium asks for /favicon.ico
            return
        path = path.removeprefix(b"/a/demo" if self.server.strips else b"")
        head = [method + b" " + path + b" " + version + b"\r\nConnection: close\r\n"]
        while (line := self.rfile.readline()).strip():
            head += [] if line.lower().startswith(b"connection:") else [line]
        with socket.create_connection(("127.0.0.1", self.server.target)) as ahead:
            ahead.sendall(b"".join([*head, b"\r\n"]))
            asking = threading.Thread(target=pass_on, args=(self.rfile.read1, ahead))
            asking.start()
            pass_on(lambda: ahead.recv(1 << 16), self.connection)
            asking.join()


def pass_on(read: Callable[[], bytes], to: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := read():
            to.sendall(data)
    with contextlib.suppress(OSError):
        to.shutdown(socket.SHUT_RDWR)


def wait_until(condition: Callable[[], bool], seconds: float = SOON / 1000) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    with small_setup(folder) as (setup, _):
        run = folder / "run"
        run.mkdir()
        for step in range(1, 6):
            append_log(run / "log.jsonl", {"step": step, "loss_ar": 2.0 - step / 10, "tokens_per_second": 100.0})
        setup.runs = {"a run": run}
        page = Served(setup)
        yield page
        page.close()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A page whose images take long."""
    with small_setup(tmp_path_factory.mktemp("slow"), config=LONG) as (setup, _):
        page = Served(setup)
        yield page
        page.close()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages; at the end nothing must have been asked of any other host, and no script must have failed."""
    contexts: list[BrowserContext] = []
    failed: list[str] = []
    asked: list[str] = []

    def on_request(request: Request) -> None:
        asked.append(request.url)

    def opened(served: Served, script: str = "", **options: Any) -> Page:
        context = chromium.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.add_init_script(script)
        page.set_default_timeout(SOON)
        page.on("request", on_request)
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on("console", lambda said: failed.append(said.text) if "Content Security Policy" in said.text else None)
        page.goto(served.url)
        page.wait_for_selector("#generate-go")
        return page

    yield opened
    for context in contexts:
        context.close()
    elsewhere = [
        url for url in asked if not re.match(r"(data|blob):|http://(localhost:\d+|proxy\.example:\d+/a/demo)/", url)
    ]
    assert (elsewhere, failed) == ([], [])
    assert asked


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def saved(page: Page, which: str, index: int = 0) -> bytes:
    """The file that a link under a picture saves."""
    with page.expect_download() as download:
        page.locator(f"#{which} a.save").nth(index).click()
    return Path(download.value.path()).read_bytes()


def press(page: Page, which: str, across: float, down: float) -> None:
    """Click on a picture, at shares of its width and height, when it is there."""
    image = page.locator(f"#{which} img")
    page.wait_for_function(f"(i => i && i.complete && i.naturalWidth > 0)(document.querySelector('#{which} img'))")
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + across * box["width"], box["y"] + down * box["height"])


def drawn(page: Page) -> None:
    page.click("#generate-go")
    expect(page.locator("#generate-pictures a.save")).to_have_count(4)


def test_images_are_drawn_saved_and_drawn_again_bit_for_bit(
    visit: Callable[..., Page], served: Served, tmp_path: Path
) -> None:
    page = visit(served)
    drawn(page)
    data = saved(page, "generate-pictures", 1)
    record = read_record(data)
    assert (record.labels, record.number, record.class_name) == ((0, 1, 2, 0), 1, "bee")
    opened = served.setup.pool.loaded["first"]
    expected = sample_images(opened.network, served.setup.pool.tokenizer, [0, 1, 2, 0], SampleSettings(cfg_scale=1.0))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), expected[1])
    (tmp_path / "saved.png").write_bytes(data)
    page.click("#again > button")
    page.set_input_files("#again-file input[type=file]", tmp_path / "saved.png")
    expect(page.locator("#again-status")).to_contain_text("The same image, bit for bit. Generated by first, seed 0")
    assert saved(page, "again-picture") == data


@pytest.mark.parametrize("strips", [True, False], ids=["stripped prefix", "kept prefix"])
def test_the_demo_works_under_a_proxys_prefix(visit: Callable[..., Page], tmp_path: Path, strips: bool) -> None:
    with Proxy(strips=strips) as proxy, small_setup(tmp_path) as (setup, _):
        served = Served(setup, proxy)
        page = visit(served)
        drawn(page)
        drawn(page)
        data = saved(page, "generate-pictures", 1)
        assert read_record(data).class_name == "bee"
        (tmp_path / "saved.png").write_bytes(data)
        page.click("#again > button")
        page.set_input_files("#again-file input[type=file]", tmp_path / "saved.png")
        expect(page.locator("#again-status")).to_contain_text("The same image, bit for bit.")
        page.close()
        served.close()
        proxy.shutdown()


def test_classes_are_found_by_name_and_settings_are_used(visit: Callable[..., Page], served: Served) -> None:
    page = visit(served)
    page.locator("#generate-classes .remove-all").click()
    page.locator("#generate-classes input").fill("co")
    page.get_by_role("option", name="cow").click()
    page.keyboard.press("Escape")
    page.locator("#generate-seed input").fill("77")
    page.locator("#generate-scale input[type=number]").fill("2.5")
    page.locator("#generate-scale input[type=number]").press("Enter")
    page.click("#generate-more > button")
    page.locator("#generate-schedule input").click()
    page.get_by_role("option", name="linear").click()
    drawn(page)
    record = read_record(saved(page, "generate-pictures", 3))
    assert record.labels == (2, 2, 2, 2)
    assert record.settings == SampleSettings(cfg_scale=2.5, cfg_schedule="linear", seed=77)


def test_no_class_is_said_on_the_page(visit: Callable[..., Page], served: Served) -> None:
    page = visit(served)
    page.locator("#generate-classes .remove-all").click()
    page.click("#generate-go")
    expect(page.get_by_text("no class is chosen: choose one or more classes")).to_be_visible()
    page.locator("#generate-classes input").fill("ant")
    page.get_by_role("option", name="ant").click()
    drawn(page)


def test_two_models_are_compared(visit: Callable[..., Page], served: Served) -> None:
    page = visit(served)
    tab(page, "Compare")
    page.click("#compare-go")
    expect(page.locator("#compare-pictures a.save")).to_have_count(8)
    assert page.locator("#compare-pictures h3").all_inner_texts() == ["first", "second"]
    left, right = (read_record(saved(page, "compare-pictures", index)) for index in (1, 5))
    assert (left.settings, left.labels, left.number) == (right.settings, right.labels, right.number)
    assert (left.weights.step, right.weights.step) == (10, 20)


def test_a_token_and_a_head_are_clicked_on(visit: Callable[..., Page], served: Served) -> None:
    page = visit(served)
    tab(page, "Understand")
    page.click("#understand-show")
    words = page.locator("#understand-words")
    expect(words).to_contain_text("after 4 of 9 tokens of image 0 of the store: ant")
    press(page, "understand-picture", 0.5, 0.9)  # the middle of the last row
    expect(words).to_contain_text("Prediction of token 7")
    before = page.locator("#understand-attention img").get_attribute("src")
    press(page, "understand-overview", 0.75, 0.95)  # head 2 of 2, layer 4 of 4
    expect(page.locator("#understand-layer input[type=number]")).to_have_value("4")
    expect(page.locator("#understand-head input")).to_have_value("2")
    expect(page.locator("#understand-attention img")).not_to_have_attribute("src", before or "")
    reading = served.setup.read("first", served.setup.from_store(0), 0)
    expect(words).to_contain_text(f"{float(reading.attention[3, 1, 7, 0]):.3f}")
    page.click("#understand-ask")
    expect(page.locator("#understand-guesses tbody tr")).to_have_count(8)


SLOW_CLOSE = """
const real = window.fetch;
window.fetch = async (...asked) => {
  const answer = await real(...asked);
  if (!String(asked[0].url ?? asked[0]).includes('/queue/data')) return answer;
  const held = new TransformStream({async transform(chunk, next) {
    if (window.atClose && new TextDecoder().decode(chunk).includes('close_stream')) {
      const press = window.atClose;
      window.atClose = null;
      document.querySelector(press).click();
      await new Promise(done => setTimeout(done, 1000));
    }
    next.enqueue(chunk);
  }});
  return new Response(answer.body.pipeThrough(held), answer);
};
"""
"""Presses `atClose` when the server has closed the stream of its messages, of which the page then learns a second later."""


def test_a_click_while_the_last_answer_ends_is_answered_too(visit: Callable[..., Page], served: Served) -> None:
    page = visit(served, script=SLOW_CLOSE)
    tab(page, "Understand")
    page.evaluate("window.atClose = '#understand-show'")
    page.locator("#understand-source").get_by_label("generated").click()
    expect(page.get_by_text("there are no generated images")).to_be_visible()
    assert page.evaluate("window.atClose") is None  # by that press


def test_what_was_drawn_can_be_looked_at(visit: Callable[..., Page], served: Served) -> None:
    page = visit(served)
    tab(page, "Understand")
    page.locator("#understand-source").get_by_label("generated").click()
    page.click("#understand-show")
    expect(page.get_by_text("there are no generated images")).to_be_visible()
    tab(page, "Generate")
    drawn(page)
    tab(page, "Understand")
    page.locator("#understand-index input[type=number]").fill("2")
    page.locator("#understand-index input[type=number]").press("Enter")
    page.click("#understand-show")
    expect(page.locator("#understand-words")).to_contain_text("of image 2 generated by first: cow")


def test_uploads_are_read_and_bad_ones_refused(visit: Callable[..., Page], served: Served, tmp_path: Path) -> None:
    page = visit(served)
    tab(page, "Understand")
    page.locator("#understand-source").get_by_label("upload").click()
    (tmp_path / "bomb.png").write_bytes(bomb(5000, 5000))
    (tmp_path / "words.png").write_text("no image")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    chooser = page.locator("#understand-file input[type=file]")
    chooser.set_input_files(tmp_path / "bomb.png")
    expect(page.get_by_text("give one of at most 16,777,216 pixels")).to_be_visible()
    page.locator("#understand-file").get_by_label("Clear").click()
    chooser.set_input_files(tmp_path / "words.png")
    expect(page.get_by_text("the file is not an image")).to_be_visible()
    page.locator("#understand-file").get_by_label("Clear").click()
    chooser.set_input_files(tmp_path / "red.png")
    expect(page.locator("#understand-words")).to_contain_text("of the uploaded image")
    tab(page, "Generate")
    page.click("#again > button")
    page.set_input_files("#again-file input[type=file]", tmp_path / "red.png")
    expect(page.get_by_text("has no record of its settings")).to_be_visible()


def test_two_visitors_at_once_take_turns_and_get_their_own(visit: Callable[..., Page], slow: Served) -> None:
    one, two = visit(slow), visit(slow)
    for page, seed in ((one, "1"), (two, "2")):
        page.locator("#generate-seed input").fill(seed)
        page.locator("#generate-count input[type=number]").fill("1")
        page.locator("#generate-count input[type=number]").press("Enter")
    one.click("#generate-go")
    expect(one.locator("#generate-status")).to_contain_text("of 1600")
    two.click("#generate-go")
    expect(two.locator("#generate-status")).to_contain_text("queue")
    for page, seed in ((one, 1), (two, 2)):
        expect(page.locator("#generate-pictures a.save")).to_have_count(1)
        assert read_record(saved(page, "generate-pictures")).settings.seed == seed


@pytest.mark.parametrize("how", ["close", "stop"])
def test_a_drawing_ends_when_its_page_is_closed_or_stopped(visit: Callable[..., Page], slow: Served, how: str) -> None:
    page = visit(slow)
    page.locator("#generate-count input[type=number]").fill("16")
    page.locator("#generate-count input[type=number]").press("Enter")
    page.click("#generate-go")
    expect(page.locator("#generate-status")).to_contain_text("of 1600")
    if how == "close":
        page.close()
    else:
        page.click("#generate-stop")

    def stands() -> bool:
        before = slow.position("first")
        time.sleep(1)
        return before == slow.position("first")

    wait_until(stands)
    assert (slow.position("first") or 0) < 1599
    other = visit(slow)
    other.locator("#generate-count input[type=number]").fill("1")
    other.locator("#generate-count input[type=number]").press("Enter")
    other.click("#generate-go")
    expect(other.locator("#generate-pictures a.save")).to_have_count(1)


def test_a_run_is_followed_live(visit: Callable[..., Page], served: Served) -> None:
    page = visit(served)
    tab(page, "Runs")
    curves = page.locator("#runs-curves")
    expect(curves).to_contain_text("a run: step 5, 100 tokens/s; ")
    expect(curves.locator("svg")).to_have_count(1)
    expect(page.locator("#runs-samples")).to_contain_text("has no samples")
    run = served.setup.runs["a run"]
    append_log(run / "log.jsonl", {"step": 6, "loss_ar": 1.0, "ridge_probe_top1": 0.5, "tokens_per_second": 120.0})
    (run / "samples").mkdir(exist_ok=True)
    for step in (3, 6):
        Image.new("RGB", (12, 6), (step, 0, 0)).save(run / "samples" / f"step_{step:08d}.png")
    expect(curves).to_contain_text("a run: step 6, 120 tokens/s")
    expect(page.locator("#runs-samples")).to_contain_text("Samples after step 6")
    expect(curves.locator("svg")).to_have_count(2)
    slider = page.locator("#runs-which input[type=number]")
    slider.fill("0")
    slider.press("Enter")
    expect(page.locator("#runs-samples")).to_contain_text("Samples after step 3")
    append_log(run / "log.jsonl", {"step": 7, "loss_ar": 0.9, "tokens_per_second": 120.0})
    expect(curves).to_contain_text("a run: step 7")
    assert slider.input_value() == "0"  # whoever looks at an older grid stays there
    expect(page.locator("#runs-samples")).to_contain_text("Samples after step 3")


def brightness(page: Page) -> float:
    """Of the page's background, 0 to 255."""
    picture = Image.open(io.BytesIO(page.screenshot()))
    return float(np.asarray(picture.convert("L"))[:, -10:].mean())


def test_the_page_follows_the_screens_mode(visit: Callable[..., Page], served: Served) -> None:
    assert brightness(visit(served, color_scheme="light")) > 200
    dark = visit(served, color_scheme="dark")
    assert brightness(dark) < 60
    colours = dark.locator(".quiet").first.evaluate("element => getComputedStyle(element).color")
    assert min(map(int, re.findall(r"\d+", colours)[:3])) > 120


def test_the_page_fits_a_phone(visit: Callable[..., Page], served: Served) -> None:
    page = visit(served, viewport={"width": 375, "height": 700}, is_mobile=True, has_touch=True, device_scale_factor=2)
    drawn(page)
    for name, ready in (
        ("Compare", "#compare-go"),
        ("Understand", "#understand-show"),
        ("Runs", "#runs-name"),
        ("Generate", "#generate-go"),
    ):
        tab(page, name)
        page.wait_for_selector(ready)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, name
    first = page.locator("#generate-pictures img").first.bounding_box()
    assert first is not None
    assert first["width"] >= 120
