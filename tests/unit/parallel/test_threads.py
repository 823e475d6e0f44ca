"""How idle threads wait: bounded by the command line before torch is loaded, unless the user decides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omniavatar.parallel.threads import WAIT_SETTINGS, bound_spinning, bounded_spin, waiting

REPOSITORY = Path(__file__).resolve().parents[3]
PROGRAM = """
import json, os, sys
from omniavatar.cli import main
try:
    main(["--version"])
except SystemExit:
    pass
names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
print(json.dumps([[os.environ.get(name) for name in names], "torch" in sys.modules]))
"""


def test_spinning_is_bounded_in_every_runtime() -> None:
    assert set(bounded_spin({"OMP_NUM_THREADS": "4"})) == {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


@pytest.mark.parametrize("name", WAIT_SETTINGS)
def test_a_setting_of_the_user_wins(name: str) -> None:
    environment = {name: "ACTIVE"}
    bound_spinning(environment)
    assert environment == {name: "ACTIVE"}
    assert waiting(environment) == f"as the environment says ({name}=ACTIVE)"


def test_the_wait_is_described() -> None:
    assert waiting({}).startswith("spin for long")
    assert waiting(bounded_spin({})).startswith("spin briefly, then sleep (GOMP_SPINCOUNT=")


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_the_command_line_sets_it_before_torch_is_loaded(given: dict[str, str]) -> None:
    """libgomp reads its settings when torch is loaded."""
    environment = {name: text for name, text in os.environ.items() if name not in WAIT_SETTINGS}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env={**environment, **given}, stdout=subprocess.PIPE, text=True, check=True
    )
    found, torch_is_loaded = json.loads(done.stdout.splitlines()[-1])
    expected = {**given, **bounded_spin(given)}
    assert found == [expected.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")]
    assert not torch_is_loaded


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "scripts").glob("*.py")))
def test_every_script_enters_by_the_command_line_and_imports_nothing_before(script: str) -> None:
    lines = (REPOSITORY / "scripts" / script).read_text().splitlines()
    imported = [line for line in lines if line.startswith(("import ", "from "))]
    assert imported == ["import sys", "from omniavatar.cli import command"]
