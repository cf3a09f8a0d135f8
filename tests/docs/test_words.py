"""What README.md and docs/ name is there: messages, options, files, and the places that links lead to."""

import ast
import re
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from st_ar.cli import COMMANDS
from st_ar.cli.completion import read_commands
from tests.docs.blocks import ROOT, name_of, pages

FOREIGN = {
    "--shutdown-timeout": "torchrun",
    "--unidiff-zero": "git",
    "--nproc-per-node": "torchrun",
    "--local-addr": "torchrun",
    "--numa-binding": "torchrun",
    "--rdzv-endpoint": "torchrun",
    "--requeue": "Slurm",
    "--shm-size": "Docker",
    "--version": "st-ar itself",
    "--tokens-per-second": "benchmarks/plan.py",
    "--codebook-l2-norm": "LlamaGen",
    "--codebook-size": "LlamaGen",
    "--image-size": "LlamaGen",
}
"""Options of other programs that the text names."""


def prose(page: Path) -> str:
    """The page without its blocks."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    return re.sub(r"(?m)^    .*$", "", text)


@cache
def options() -> set[str]:
    return {option for words in read_commands().values() for option in words.options}


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_option_that_is_named_exists(page: Path) -> None:
    text = re.sub(r"(?m)^> .*$", "", prose(page))  # messages have a test of their own
    if page.name == "llamagen.md":  # the first column of its tables is LlamaGen's
        text = re.sub(r"(?m)^\| .*? \|", "", text)
    spans = re.findall(r"`([^`\n]+)`", text)
    if page.name != "llamagen.md":
        spans = [span for span in spans if not re.match(r"python (benchmarks|autoregressive)/", span)]
    for span in spans:
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", span):
            assert option in options() | set(FOREIGN), f"{name_of(page)}: {span}"


def messages() -> list[str]:
    """Every text of the sources, with … for what is filled in."""
    found: list[str] = []
    for path in (ROOT / "src/st_ar").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
    return found


def test_every_message_that_troubleshooting_explains_is_one_of_ours() -> None:
    texts = messages()
    quoted = re.findall(r"(?m)^> (`+)(.*)\1$", (ROOT / "docs/troubleshooting.md").read_text())
    assert len(quoted) > 30
    for _, message in quoted:
        pattern = re.compile("…+".join(re.escape(part) for part in re.split("…+", message)))
        assert any(pattern.search(text) for text in texts), message


def anchor(heading: str) -> str:
    words = re.sub(r"[`*]", "", heading).lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", words).strip())


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        file, _, place = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{name_of(page)}: {target}"
        if place:
            headings = re.findall(r"(?m)^#+ (.*)$", path.read_text())
            assert place in {anchor(heading) for heading in headings}, f"{name_of(page)}: {target}"


def test_files_that_the_pages_name_are_there() -> None:
    """`benchmarks/x.py`, `tests/..`, `src/..`, and the modules of development.md."""
    for page in pages():
        for named in re.findall(r"`((?:benchmarks|examples|tests|src)/[\w./-]+)`", prose(page)):
            assert (ROOT / named).exists(), f"{name_of(page)}: {named}"
    modules = {path.name for path in (ROOT / "src/st_ar").rglob("*.py")}
    for named in re.findall(r"\b(\w+\.py)\b", (ROOT / "docs/development.md").read_text()):
        assert named in modules, named


def test_every_page_is_in_the_sites_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    for page in pages()[1:]:
        assert re.search(rf" {re.escape(name_of(page))}$", menu, re.MULTILINE), name_of(page)


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert f"`{command}`" in readme, command


def test_the_options_page_is_what_the_code_says() -> None:
    spec = spec_from_file_location("options", ROOT / "docs/options.py")
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    assert text == script.page(), "the options have changed: run `python docs/options.py`"
    sections = dict(re.findall(r"(?ms)^## st-ar ([\w-]+)$(.*?)(?=^## |\Z)", text))
    for command, words in read_commands().items():
        listed = set(re.findall(r"`(--[\w.-]+)`", "".join(re.findall(r"(?m)^\|([^|]+)\|", sections[command]))))
        assert listed == set(words.options) - {"--help"}, command
    assert "| `--selfguided.mask-ratio` FLOAT | `0.0` | Fraction r of" in sections["train"]
    assert (
        "| `st-ar-b-50-k8` | Table 6, 8 positions. | `st-ar-b-50` with `--selfguided.positions 8` |"
        in sections["train"]
    )
