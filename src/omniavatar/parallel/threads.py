"""How the threads of PyTorch's CPU code wait for each other: they spin briefly, then sleep.

OpenMP's threads wait for the slowest one at the end of every parallel loop. GNU's runtime, which is in the
wheels of PyTorch, spins for up to 300,000 rounds, several milliseconds. On a shared machine the slowest
thread may have lost its core to another process, and the spinning thread then burns the core that it needs.
Threads that sleep at once lose time on an idle machine, because waking takes longer than most loops.
`python -m benchmarks shared_machine` measures both.

The runtime reads its settings when torch is loaded, so they must be in the environment before. Settings do
not change results. Source: the manual of libgomp (GOMP_SPINCOUNT) and of LLVM's runtime (KMP_BLOCKTIME).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

SPIN_ROUNDS = 5000
BLOCK_TIME_MS = 1
WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables that say how threads wait, in any OpenMP runtime."""


def bounded_spin(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to add so that idle threads soon sleep; none if the environment sets one already."""
    if any(name in environment for name in WAIT_SETTINGS):
        return {}
    return {"GOMP_SPINCOUNT": str(SPIN_ROUNDS), "KMP_BLOCKTIME": str(BLOCK_TIME_MS)}


def waiting(environment: Mapping[str, str]) -> str:
    """One line that says how idle threads wait with these variables."""
    found = {name: environment[name] for name in WAIT_SETTINGS if name in environment}
    settings = " ".join(f"{name}={value}" for name, value in found.items())
    if not found:
        return "spin for long: set GOMP_SPINCOUNT before torch is imported if the machine has other work"
    if found == bounded_spin({}):
        return (
            f"spin briefly, then sleep ({settings}, set by the command line; a setting of yours wins, and a "
            "Python program sets its own before it imports torch)"
        )
    return f"as the environment says ({settings})"


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set `bounded_spin` in this process and its children; call it before torch is imported."""
    environment.update(bounded_spin(environment))
