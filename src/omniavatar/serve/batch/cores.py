"""Cores of its own for a worker on the CPU (Linux).

A worker of n threads that may run anywhere takes more than n cores: x264 always has four threads, since its
output depends on their number, and sound, files and Ray have theirs. Bound to n cores it takes n, so that
workers do not slow each other down, and one worker is the measure of several. The cores are claimed by lock,
as items are: batches side by side do not take the same ones, and those of a killed worker are free at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from omniavatar.serve.batch.lease import Lease, try_lease


def cores_here() -> int:
    """Cores this process may use and can be bound to: none where the system has no such thing."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 0


def take_cores(count: int, folder: Path | None = None) -> tuple[int, ...]:
    """Bind this process, until it ends, to `count` cores that no other worker of this user has.

    Returns their numbers; none, and nothing is changed, where there are not that many. folder: of the
    locks, one for the machine.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"omniavatar-cores-{os.getuid()}"
    numbers: list[int] = []
    leases: list[Lease] = []
    for number in sorted(os.sched_getaffinity(0)):
        if len(numbers) < count and (lease := try_lease(folder / f"core{number}.lock")) is not None:
            numbers.append(number)
            leases.append(lease)
    if len(numbers) < count:
        for lease in leases:
            lease.release()
        return ()
    bind(numbers)
    return tuple(numbers)


def bind(numbers: Sequence[int]) -> None:
    """Bind every thread there is in this process; those to come are bound as the one that starts them."""
    bound: set[str] = set()
    while new := set(os.listdir("/proc/self/task")) - bound:
        for thread in new:
            try:
                os.sched_setaffinity(int(thread), numbers)
            except ProcessLookupError:  # it has ended
                continue
        bound |= new
