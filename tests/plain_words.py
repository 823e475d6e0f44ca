"""Phrases that read badly, in the text of the package and in the documents, each with a plainer one.

`python tests/plain_words.py` prints them as `file:line: phrase -> plainer`, `--room serve` those of one room.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "omniavatar"

PLAINER = {
    r"anew": "again",
    r"whoever": "name the process or the person",
    r"foretold|foretells?": "predicted, estimated",
    r"told(?! apart)|tells? (?:of|that|whether)": "reported, given, shown",
    r"said": "reported, shown",
    r"asked": "requested, called, queried",
    r"as ever": "normally, as usual",
    r"comes? to(?! the same)": "is, reaches, adds up to",
    r"wants? an?": "needs a",
    r"(?:its|their) like": "similar ones",
    r"(?<!place )of (?:its|their|his|one's) own(?! \w)": "own, separate",
    r"what is there": "what is available",
    r"(?:is|are) there(?= *[.,;:?)]|$)": "is available, exists",
    r"is there (?:a|an|any|no)": "has, exists",
    r"no \w+ there": "none is available",
    r"once more with less": "retrying with less",
    r"so many": "as many",
    r"what becomes of": "what happens to",
    r"wanted figures?": "targets",
    r"(?:had|would) rather": "prefers",
    r"thereby|thereof|therein|whereof|wherein|hence|thus": "so, in it",
    r"at first try": "the first time",
}
"""Pattern (whole words, in any case) and the plainer wording."""
_ANY = [
    (re.compile(rf"(?<![\w-])(?:{pattern})(?![\w-])", re.IGNORECASE | re.MULTILINE), plainer)
    for pattern, plainer in PLAINER.items()
]


@dataclass(frozen=True)
class Finding:
    """A phrase in line `line` of `path`."""

    path: Path
    line: int
    phrase: str
    plainer: str

    @property
    def room(self) -> str:
        """The folder of src/omniavatar, `package` for its own files, or `docs`."""
        if not self.path.is_relative_to(PACKAGE):
            return "docs"
        parts = self.path.relative_to(PACKAGE).parts
        return parts[0] if len(parts) > 1 else "package"

    def __str__(self) -> str:
        return f"{self.path.relative_to(REPOSITORY)}:{self.line}: {self.phrase} -> {self.plainer}"


def findings() -> Iterator[Finding]:
    """Of docstrings, comments and string literals of the package, and of the documents' prose."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield from in_lines(path, python_prose(path.read_text()))
    documents = [
        *(REPOSITORY / "docs").rglob("*.md"),
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
    ]
    documents = [path for path in documents if path.is_file()]
    for path in sorted(documents):
        yield from in_lines(path, document_prose(path.read_text()))


def in_lines(path: Path, lines: dict[int, str]) -> Iterator[Finding]:
    """Phrases in `lines`, texts by line number; a phrase may be broken over two lines."""
    text, starts = "", {}
    for number, line in sorted(lines.items()):
        text += " " if number - 1 in lines else " \n"
        starts[number] = len(text)
        text += line.strip().removeprefix("#").strip()
    for pattern, plainer in _ANY:
        for match in pattern.finditer(text):
            line = max(number for number, start in starts.items() if start <= match.start())
            yield Finding(path, line, match.group(), plainer)


def python_prose(source: str) -> dict[int, str]:
    """Comments and strings of more than one word by line number; code is blank."""
    prose: dict[int, str] = {}

    def add(line: int, text: str) -> None:
        prose[line] = f"{prose[line]} | {text}" if line in prose else text

    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            add(token.start[0], token.string)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            for offset, text in enumerate(node.value.split("\n")):
                add(min(node.lineno + offset, node.end_lineno or node.lineno), text)
    return prose


def document_prose(text: str) -> dict[int, str]:
    """Lines outside fenced code, without what stands in backquotes."""
    prose, fenced = {}, False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            prose[number] = re.sub(r"`[^`]*`", "`", line)
    return prose


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--room", help="only this room: a folder of src/omniavatar, package, or docs")
    arguments = parser.parse_args()
    for each in findings():
        if arguments.room in (None, each.room):
            print(each)
