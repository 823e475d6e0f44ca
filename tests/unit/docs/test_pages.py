"""What the written pages say about the repository is true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
DOCS = REPOSITORY / "docs"
PACKAGE = REPOSITORY / "src" / "omniavatar"
PATH = re.compile(r"`([a-z_0-9]+(?:/[a-z_0-9.A-Z]+)*/[a-z_0-9A-Z.]+\.(?:py|md|yaml|txt|npz))`")
DATED = {"lab_notes.md"}
"""Pages about the past, which name files as they were."""
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name not in DATED)


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_exist(name: str) -> None:
    missing = [
        path
        for path in PATH.findall((DOCS / name).read_text())
        if not any((root / path).is_file() for root in (REPOSITORY, PACKAGE))
        and not path.startswith(("training/build/", "pretrained_models/"))
    ]
    assert not missing, f"docs/{name}"


def test_performance_names_every_result_file() -> None:
    page = (DOCS / "performance.md").read_text().split("## Result files")[1]
    listed = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert listed == sorted(path.name for path in (REPOSITORY / "benchmarks" / "results").iterdir())


# The walk of one request


def walk() -> list[str]:
    table = (DOCS / "structure.md").read_text().split("## The walk")[1].split("\n## ")[0]
    return re.findall(r"^\| \d+ \| `([a-z_/]+\.py)` \|", table, re.M)


def imported_files(path: Path) -> set[Path]:
    """Files of the package that `path` imports, also inside functions."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("omniavatar"):
            base = PACKAGE.parent / node.module.replace(".", "/")
            found |= {base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)}
    return {path for path in found if path.is_file()}


def test_the_walk_has_at_most_twelve_stops_from_the_command_to_the_written_file() -> None:
    stops = walk()
    assert stops[0] == "cli/main.py" and stops[-1] == "engine/writer.py"
    assert len(set(stops)) == len(stops) <= 12


def test_each_stop_of_the_walk_is_imported_by_an_earlier_one() -> None:
    stops = [PACKAGE / stop for stop in walk()]
    reachable = {stops[0]}
    for stop in stops:
        assert stop.is_file(), stop
        assert stop in reachable, f"{stop} is imported by no earlier stop"
        reachable |= imported_files(stop)
