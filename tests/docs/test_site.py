"""The site: it is built without a warning, and no page of it asks another host for anything."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from tests.docs.blocks import ROOT, name_of, pages
from tests.programs import find_program

FETCHED = {"src", "srcset", "poster", "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in pages()[1:]:
        html = (site / name_of(page)).with_suffix(".html").read_text()
        assert "<h1" in html
    assert "frechet_distance" in (site / "api.html").read_text()
    assert "Losses" in (site / "api.html").read_text()


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    class Fetches(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            for name, value in attrs:
                if name in FETCHED or (name == "href" and tag in ("link", "base")):
                    assert not re.match(r"(https?:)?//", value or ""), f"<{tag} {name}={value}>"

    for page in site.rglob("*.html"):
        Fetches().feed(page.read_text())
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", sheet.read_text()), sheet


def test_equations_are_drawn_on_the_texts_baseline(site: Path) -> None:
    html = (site / "method.html").read_text()
    assert html.count('<p class="equation"><svg') == 6
    assert "$" not in re.sub(r"(?s)<(code|script|style).*?</\1>", "", html.split("<article")[1].split("</article>")[0])
    [total] = re.findall(r'<svg [^>]*aria-label="L = L_{AR} [^"]*"[^>]*>', html)
    [depth] = re.findall(r"vertical-align:-([\d.]+)em", total)
    [height] = re.findall(r'height="([\d.]+)em"', total)
    assert 0.3 < float(depth) < float(height) < 3  # a fraction reaches below the baseline


def test_lines_do_not_break_inside_options_and_measurements(site: Path) -> None:
    html = (site / "results/cifar10.html").read_text()
    assert '<code><span class="word">--selfguided.beta 0</span></code>' in html
    assert '<span class="word">--rows</span></code> selects' in html
    assert "<strong>3.35\u00a0±\u00a00.00</strong>" in html
    assert "8\u00a0x\u00a08 tokens" in html
    assert '<td class="text">both contrasts, nothing masked, in every second step' in html
    assert "<td>ST-AR</td>" in html
    assert "1.40 (1.36\u00a0to\u00a01.49)" in (site / "performance.html").read_text()


def test_each_quoted_message_is_one_piece_of_code(site: Path) -> None:
    quotes = re.findall(r"(?s)<blockquote>\s*<p>(.*?)</p>", (site / "troubleshooting.html").read_text())
    assert len(quotes) > 30
    for quote in quotes:
        assert re.fullmatch(r"(?s)<code>(?:(?!</code>).)*</code>", quote), quote


WIDER = """() => {
  const scrolls = element => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  const outside = element => element.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
  const visible = element => {
    for (let each = element.parentElement; each; each = each.parentElement) if (scrolls(each) && !outside(each)) return false;
    return true;
  };
  return [...document.querySelectorAll("article *")].filter(each => outside(each) && visible(each)).map(each => each.outerHTML);
}"""
"""The elements that reach beyond the window and are in no box that scrolls."""


@pytest.mark.slow
def test_wide_tables_and_code_scroll(site: Path) -> None:
    chromium = find_program("chromium")
    with sync_playwright() as playwright:
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=[*as_root, "--disable-dev-shm-usage"])
        for width in (1280, 390):
            page = browser.new_page(viewport={"width": width, "height": 800})
            for path in sorted(site.rglob("*.html")):
                page.goto(path.as_uri())
                assert page.evaluate(WIDER) == [], f"{path} at {width} pixels"
                assert page.evaluate("document.documentElement.scrollWidth") == width, path
        browser.close()
