"""The HTML report: everything that was given is on the page, nothing of it is markup, and nothing is fetched."""

import base64
import hashlib
import io
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from st_ar.errors import UserError
from st_ar.figures import line_chart
from st_ar.report import (
    Chart,
    Gallery,
    Section,
    Spread,
    Table,
    difference,
    is_noise,
    png_uri,
    provenance,
    write_report,
)
from tests.disk import contents, full_disk, refused
from tests.programs import find_program

NASTY = """<script>alert("1")</script> & 'AT&T' <b>"""


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, and the text inside each kind of tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
            if tag in ("td", "th"):
                self.texts.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        tag = self.open[-1] if self.open else ""
        if tag in ("td", "th"):
            self.texts[-1] = (tag, self.texts[-1][1] + data)
        elif data.strip():
            self.texts.append((tag, data.strip()))

    def within(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (4, 6, 3)).astype(np.uint8)


SECTIONS = [
    Section(
        title="Results",
        paragraphs=["First.", "Second."],
        commands=["st-ar train x --steps 3", "st-ar sample --out 'a & b'"],
        parts=[
            Table(
                columns=["", "AR", "ST-AR"],
                rows=[["loss", "1.25", ""], ["accuracy", "0.5 %", "7 %"]],
                caption="Of one run.",
            )
        ],
    ),
    Section(
        title="Pictures",
        parts=[
            Chart(svg=line_chart({"AR": ([1, 2], [3, 4])}, name="curve", x="step", y="loss").svg(), caption="A curve."),
            Gallery(columns=["real", "drawn"], rows=[("ant", [png_uri(noise(0)), png_uri(noise(1))])], caption="Ants."),
        ],
    ),
    Section(title="Nothing"),
]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "page.html"
    write_report(path, title="AR and ST-AR", lead="Two models.", sections=SECTIONS)
    return path.read_text()


def test_every_heading_paragraph_and_command_is_there_in_order(html: str) -> None:
    page = Page(html)
    assert page.within("title") == page.within("h1") == ["AR and ST-AR"]
    assert page.within("h2") == ["Results", "Pictures", "Nothing"]
    assert page.within("p") == ["Two models.", "First.", "Second."]
    assert page.within("pre") == ["st-ar train x --steps 3\nst-ar sample --out 'a & b'"]
    assert page.within("figcaption", "caption") == ["Of one run.", "A curve.", "Ants."]


def test_every_cell_is_there_the_missing_one_too(html: str) -> None:
    page = Page(html)
    assert page.within("th", "td") == ["", "AR", "ST-AR", "loss", "1.25", "", "accuracy", "0.5 %", "7 %"]
    assert page.within("td") == ["1.25", "", "0.5 %", "7 %"]  # the first column names the row
    assert sum(tag == "table" for tag, _ in page.tags) == 1
    assert "None" not in html


def test_the_text_of_a_provenance_wraps_and_numbers_do_not(tmp_path: Path) -> None:
    crops = [f"crop-{index}" for index in range(15)]  # a line of these hid the values beside it
    record = {"train": {"crops": crops, "images": 600}, "none": {}}
    numbers = Section(title="Numbers", parts=[Table(columns=["", "a"], rows=[["loss", "1"]])])
    write_report(tmp_path / "p.html", title="", lead="", sections=[numbers, provenance(record, ["train", "none"])])
    page = Page((tmp_path / "p.html").read_text())
    assert [attributes for tag, attributes in page.tags if tag == "table"] == [{}, {"class": "text"}]
    assert page.within("td") == ["1", json.dumps(crops), "600"]


def test_the_gallerys_pictures_are_inside_the_page_pixel_by_pixel(html: str) -> None:
    pictures = [attributes for tag, attributes in Page(html).tags if tag == "img"]
    assert [picture["alt"] for picture in pictures] == ["ant, real", "ant, drawn"]
    for seed, picture in enumerate(pictures):
        with Image.open(io.BytesIO(base64.b64decode(picture["src"].removeprefix("data:image/png;base64,")))) as opened:
            np.testing.assert_array_equal(np.asarray(opened), noise(seed))


def test_the_figure_is_inside_the_page_as_it_was_drawn(html: str) -> None:
    chart = SECTIONS[1].parts[0]
    assert isinstance(chart, Chart)
    assert chart.svg in html


def test_the_page_fetches_nothing_and_runs_its_one_script_alone(html: str) -> None:
    page = Page(html)
    [script] = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert [(tag, attributes) for tag, attributes in page.tags if tag == "script"] == [("script", {})]
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "data", "poster", "action", "srcset"):
                assert value.startswith(("#", "data:image/png;base64,")), value[:60]
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


@pytest.mark.parametrize(
    "place", ["title", "lead", "heading", "paragraph", "command", "column", "cell", "caption", "name"]
)
def test_text_is_shown_as_text_wherever_it_is(tmp_path: Path, place: str) -> None:
    def text(here: str) -> str:
        return NASTY if here == place else "plain"

    table = Table(columns=["", text("column")], rows=[["row", text("cell")]], caption=text("caption"))
    gallery = Gallery(columns=["real"], rows=[(text("name"), [png_uri(noise(0))])])
    section = Section(
        title=text("heading"), paragraphs=[text("paragraph")], commands=[text("command")], parts=[table, gallery]
    )
    write_report(tmp_path / "page.html", title=text("title"), lead=text("lead"), sections=[section])
    html = (tmp_path / "page.html").read_text()
    page = Page(html)
    assert html.count("<script") == 1  # the page's own
    assert not any(tag == "b" for tag, _ in page.tags)
    assert NASTY in [shown for _, shown in page.texts]
    if place == "name":
        assert f"{NASTY}, real" in [attributes.get("alt") for _, attributes in page.tags]


def test_a_page_with_no_sections_is_a_page(tmp_path: Path) -> None:
    write_report(tmp_path / "page.html", title="Empty", lead="", sections=[])
    assert Page((tmp_path / "page.html").read_text()).within("h1", "h2") == ["Empty"]


def test_a_full_disk_leaves_the_page_that_was_there(tmp_path: Path) -> None:
    write_report(tmp_path / "page.html", title="Old", lead="", sections=[])
    with refused(tmp_path, r"cannot write .*page\.html"), full_disk(100):
        write_report(tmp_path / "page.html", title="New", lead="", sections=SECTIONS)
    assert set(contents(tmp_path)) == {"page.html"}


def test_a_page_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*page\.html"):
        write_report(tmp_path / "page.html", title="New", lead="", sections=[])
    assert list(tmp_path.rglob("*")) == [tmp_path / "page.html"]


def seen_by_a_browser(page: Path, tmp_path: Path) -> str:
    """The page after its script has run."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [find_program("chromium", "google-chrome"), *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def test_a_browser_lets_the_pages_own_script_run_and_no_other(tmp_path: Path, html: str) -> None:
    page = tmp_path / "page.html"
    page.write_text(html.replace("</body>", "<script>document.title = 'foreign'</script></body>"))
    seen = seen_by_a_browser(page, tmp_path)
    assert seen.count('title="sort by this column"') == 3
    assert "<dialog>" in seen
    assert "<title>AR and ST-AR</title>" in seen


def test_a_click_sorts_and_a_click_on_a_picture_shows_it_large(tmp_path: Path) -> None:
    rows = [["b", "2.5 ± 0.1", "x"], ["a", "-", "y"], ["c", "1,000", ""], ["d", "-3", "z"]]
    sections = [Section(title="Table", parts=[Table(columns=["", "n", "w"], rows=rows), *SECTIONS[1].parts])]
    page = tmp_path / "page.html"
    write_report(page, title="Sorted", lead="", sections=sections)
    clicks = """<script>
    const heads = document.querySelectorAll("thead th"), order = [];
    const names = () => order.push([...document.querySelectorAll("tbody th")].map(cell => cell.textContent).join(""));
    for (const column of [1, 1, 1, 0]) { heads[column].click(); names(); }
    const large = [];
    for (const picture of document.querySelectorAll("figure > svg, .gallery img")) {
      picture.dispatchEvent(new Event("click"));
      const dialog = document.querySelector("dialog");
      large.push(dialog.open + dialog.firstChild.tagName.toLowerCase());
      dialog.click();
      large.push(dialog.open);
    }
    document.title = order.join(" ") + " " + large.join(" ");
    </script></body>"""
    html = re.sub(r'<meta http-equiv="Content-Security-Policy".*', "", page.read_text()).replace("</body>", clicks)
    page.write_text(html)
    [title] = re.findall("<title>(.*)</title>", seen_by_a_browser(page, tmp_path))
    # rising, falling, as it was; then by name. What is no number comes last when numbers rise.
    assert title == "dbca acbd bacd abcd truesvg false trueimg false trueimg false"


def test_mean_and_deviation_are_the_formulas() -> None:
    spread = Spread((1.0, 2.0, 6.0))
    assert spread.mean == 3
    assert spread.deviation == pytest.approx(((4 + 1 + 9) / 2) ** 0.5)
    assert spread.text(1) == "3.0 ± 2.6"
    assert spread.describe() == {"mean": 3.0, "deviation": spread.deviation, "values": [1.0, 2.0, 6.0]}


def test_one_seed_says_nothing_about_spread() -> None:
    single = Spread((0.847,))
    assert (single.mean, single.deviation, single.text(2)) == (0.847, None, "0.85")
    assert is_noise(single) is None


def test_differences_are_taken_seed_by_seed() -> None:
    paired = difference(Spread((10.0, 20.0, 30.0)), Spread((9.0, 19.0, 29.0)))
    assert paired.values == (1.0, 1.0, 1.0)
    assert is_noise(paired) is False  # though each spreads by ten
    with pytest.raises(ValueError, match="shorter"):
        difference(Spread((1.0, 2.0)), Spread((1.0,)))


@pytest.mark.parametrize(("shift", "noise"), [(1.1, True), (1.2, False), (-1.2, False)])
def test_noise_is_up_to_two_standard_errors(shift: float, noise: bool) -> None:
    paired = Spread(tuple(shift + x for x in (-1.0, 1.0, -1.0, 1.0)))  # the standard error is sqrt(4 / 3) / 2 = 0.577
    assert is_noise(paired) is noise
