"""`make docs`: the site builds strictly, from the repository alone, and needs no other host."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
OTHER_HOST = re.compile(r'<(?:script|link|img|iframe|source)[^>]+(?:src|href)="((?:https?:)?//[^"]+)"')

pytest.importorskip("material", reason="the site needs the docs extra: pip install -e '.[docs]'")

from docs.generate import links  # noqa: E402  (imports mkdocs)


def build(repository: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict` with a proxy that refuses every connection, so that using the network fails."""
    refused = {
        name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    }
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=repository,
        env=os.environ | refused | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(REPOSITORY, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_strictly_with_every_page(site: Path) -> None:
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
    assert (site / "repository" / "CONTRIBUTING.html").is_file()
    assert not (site / "generate").exists(), "the generators are no part of the site"


@pytest.mark.slow
def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert pages
    for page in pages:
        assert not OTHER_HOST.findall(page.read_text(encoding="utf-8")), page


@pytest.mark.slow
def test_the_search_index_lies_in_the_site(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "tea_cache_l1_thresh" in index


@pytest.mark.slow
def test_links_out_of_docs_lead_to_files_of_the_site(site: Path) -> None:
    page = (site / "licences.html").read_text(encoding="utf-8")
    assert 'href="repository/LICENSE"' in page and 'href="repository/examples/index.html"' in page
    back = (site / "repository" / "CONTRIBUTING.html").read_text(encoding="utf-8")
    assert 'href="../performance.html"' in back


@pytest.mark.slow
def test_a_broken_link_a_bad_anchor_and_a_page_outside_the_navigation_fail(tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(REPOSITORY / "docs", copy / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "mkdocs.yml", copy)
    for source in sorted((REPOSITORY / "docs").glob("*.md")):
        for target in links.linked(f"docs/{source.name}", source.read_text(encoding="utf-8")):
            if (REPOSITORY / target).is_file() and not (copy / target).exists():
                (copy / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / target, copy / target)
    (copy / "docs" / "forgotten.md").write_text("# Forgotten\n")
    with (copy / "docs" / "index.md").open("a") as page:
        page.write("\n[a](nowhere.md) [b](../NOWHERE.md) [c](settings.md#nothing) ![d](images/nothing.png)\n")
    done = build(copy, tmp_path / "site")
    assert done.returncode != 0
    for fault in ("forgotten.md", "nowhere.md", "NOWHERE.md", "#nothing", "images/nothing.png"):
        assert fault in done.stderr, fault


# Links


@pytest.mark.parametrize(
    ("source", "link", "on_the_site"),
    [
        ("docs/licences.md", "../LICENSE", "repository/LICENSE"),
        ("docs/structure.md", "../training/README.md", "repository/training/README.md"),
        ("docs/structure.md", "many_gpus.md#prediction", "many_gpus.md#prediction"),
        ("CONTRIBUTING.md", "docs/structure.md", "../structure.md"),
        ("training/README.md", "../docs/pocket.md", "../../pocket.md"),
        ("docs/structure.md", "../nowhere.md", "../nowhere.md"),
        ("docs/structure.md", "https://example.org/a.md", "https://example.org/a.md"),
    ],
)
def test_links_are_rewritten_for_the_site(source: str, link: str, on_the_site: str) -> None:
    assert links.rewritten(source, f"see [it]({link}).") == f"see [it]({on_the_site})."
