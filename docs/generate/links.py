"""MkDocs hook: pages may link to files of the repository outside docs/, and the site carries those files.

A page of docs/ links to another file as it lies in the repository (`../CONTRIBUTING.md`), so the link works
where the repository is read, too. The site gets such a file below `repository/`, and the link is rewritten.
A link to a file that does not exist stays as it is, and the strict build fails on it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")
"""Target of a relative Markdown link, without its anchor."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages of the site link to, and those that these link to."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        for target in linked(source, (ROOT / source).read_text(encoding="utf-8")):
            if target in seen or target.startswith("docs/") or not (ROOT / target).is_file():
                continue
            seen.add(target)
            files.append(File.generated(config, site_path(target), abs_src_path=str(ROOT / target)))
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links that leave docs/, or that come from a file outside it."""
    site = page.file.src_uri
    return rewritten(repository_path(site), markdown)


def linked(source: str, markdown: str) -> list[str]:
    """Repository paths that the Markdown of the repository file `source` links to."""
    folder = posixpath.dirname(source)
    return [posixpath.normpath(posixpath.join(folder, link)) for link in LINK.findall(markdown)]


def rewritten(source: str, markdown: str) -> str:
    """`markdown` of the repository file `source`, its links to repository files as the site needs them."""
    folder = posixpath.dirname(source)

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[1]))
        if target.startswith("../") or not (ROOT / target).is_file():
            return found[1]
        return posixpath.relpath(site_path(target), posixpath.dirname(site_path(source)) or ".")

    return LINK.sub(link, markdown)


def site_path(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def repository_path(site: str) -> str:
    """Where a file of the site lies in the repository."""
    return site.removeprefix("repository/") if site.startswith("repository/") else f"docs/{site}"
