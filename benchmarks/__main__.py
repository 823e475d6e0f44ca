"""Starts one benchmark: `python -m benchmarks NAME [options]`, from the root of the repository.

Every file of this folder whose name does not begin with an underscore is a benchmark. The first line of its
docstring describes it in the list; its `main(arguments)` runs it.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
USAGE = "usage: python -m benchmarks NAME [options]"
TORCHRUN = "torchrun --standalone --nproc_per_node=2 -m benchmarks scaling"


def descriptions() -> dict[str, str]:
    """Name and one-line description of every benchmark, sorted by name. Imports none of them."""
    files = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("_"))
    return {path.stem: _first_line(path) for path in files}


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0]


def overview() -> str:
    """The usage line and the list of all benchmarks."""
    found = descriptions()
    width = max(map(len, found))
    lines = [f"  {name:{width}}  {text}" for name, text in found.items()]
    after = "`python -m benchmarks NAME --help` prints the options of one. On several GPUs: "
    return "\n".join([USAGE, "", *lines, "", f"{after}`{TORCHRUN}`."])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the first argument names with the other arguments.

    Raises SystemExit with code 2 for an unknown name, and with the exit code of an `OmniAvatarError`.
    """
    name, *options = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return
    known = list(descriptions())
    if name not in known:
        nearest = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
        print(
            f"error: no benchmark is called {name}; nearest: {nearest} (`python -m benchmarks` lists all)",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from omniavatar.errors import OmniAvatarError

    try:
        importlib.import_module(f"benchmarks.{name}").main(options)
    except OmniAvatarError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
