"""Reads the commands that a Markdown page shows."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

NEEDS = ("gpu", "download", "install")
"""What a comment `<!-- needs: gpu, download -->` before a block may name; no test runs such a block."""

_FENCE = re.compile(r"^\s*```(\S*)")
_MARK = re.compile(r"^\s*<!-- needs: ([a-z, ]+) -->$")
_INLINE = re.compile(r"`((?:omniavatar|make|python|torchrun) [^`]+)`")

_SETTING = re.compile(r"`((?:--hp )?[a-z_]+=[^` ]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its lines, the line it begins at, and what it needs."""

    page: str
    line: int
    language: str
    text: str
    needs: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each command; comments left out, continued lines joined."""
        joined = self.text.replace("\\\n", " ")
        lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
        return [words for words in lines if words]


def blocks(page: Path, root: Path) -> list[Block]:
    """All fenced blocks of `page`, named relative to `root`."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    opened: tuple[int, str, tuple[str, ...]] | None = None
    body: list[str] = []
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if fence is None:
            body.append(line)
        elif opened is None:
            mark = _MARK.match(lines[number - 2]) if number > 1 else None
            needs = tuple(part.strip() for part in mark[1].split(",")) if mark else ()
            opened, body = (number, fence[1], needs), []
        else:
            start, language, needs = opened
            found.append(Block(str(page.relative_to(root)), start, language, "\n".join(body), needs))
            opened = None
    return found


def inline_commands(page: Path) -> list[list[str]]:
    """The words of commands shown inside sentences and tables."""
    return [shlex.split(found) for found in _INLINE.findall(_prose(page))]


def inline_settings(page: Path) -> list[str]:
    """The `key=value` settings shown inside sentences and tables."""
    return [found.removeprefix("--hp ") for found in _SETTING.findall(_prose(page))]


def _prose(page: Path) -> str:
    """The page without its fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^\s*```.*?^\s*```$", "", text, flags=re.DOTALL | re.MULTILINE)
