"""The lower bounds of pyproject.toml as constraints for pip: what `make test-oldest` installs."""

import re
import tomllib
from pathlib import Path


def lower_bounds(pyproject: Path) -> list[str]:
    """`NAME==VERSION` for each `NAME>=VERSION` among the dependencies and the extras."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = [one for wanted in project["optional-dependencies"].values() for one in wanted]
    bounds: list[str] = []
    for requirement in dict.fromkeys([*project["dependencies"], *extras]):
        if requirement.startswith("st-ar["):
            continue
        found = re.fullmatch(r"([A-Za-z0-9_-]+)(?:\[\w+\])?>=([0-9.]+)", requirement)
        if found is None:
            raise SystemExit(f"{pyproject}: {requirement!r} is not of the form NAME>=VERSION")
        bounds.append(f"{found[1]}=={found[2]}")
    return bounds


if __name__ == "__main__":
    print("\n".join(lower_bounds(Path(__file__).parents[1] / "pyproject.toml")))
