"""Write every generated page and picture; with `--check`, only name those that are not current."""

from __future__ import annotations

import sys
from pathlib import Path

from docs.generate import api, rooms, settings, sizing

DOCS = Path(__file__).parent.parent


def generated() -> dict[Path, str]:
    """Text of every generated file by its path."""
    return {
        DOCS / "settings.md": settings.page(),
        DOCS / "python_api.md": api.page(),
        DOCS / "deploy.md": sizing.page((DOCS / "deploy.md").read_text(encoding="utf-8")),
        DOCS / "images" / "rooms.svg": rooms.picture(rooms.contract(DOCS.parent / "pyproject.toml")),
    }


def stale() -> list[Path]:
    """Generated files that are missing or differ from what the code gives."""
    return [
        path
        for path, text in generated().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main() -> int:
    """Exit code: 1 if `--check` found a file that is not current."""
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        print("usage: python -m docs.generate [--check]", file=sys.stderr)
        return 2
    old = stale()
    for path in old:
        if check:
            print(f"{path} is not current; run python -m docs.generate", file=sys.stderr)
        else:
            path.write_text(generated()[path], encoding="utf-8")
            print(f"wrote {path}")
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
