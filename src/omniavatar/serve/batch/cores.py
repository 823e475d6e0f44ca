"""Bind a CPU worker to cores that no other worker uses (Linux).

An unbound worker with n threads uses more than n cores: x264 always runs four threads, since its output
depends on their number, and sound, files and Ray add theirs. Binding keeps workers from slowing each other
down, so the speed of one predicts the speed of several. Each core is claimed with a file lock: two batches on
one machine take different cores, and the kernel frees those of a killed worker at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from omniavatar.media.lease import Lease, try_lease


def bindable_cores() -> int:
    """Number of cores this process can be bound to; 0 if the system cannot bind processes."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 0


def take_cores(count: int, folder: Path | None = None) -> tuple[int, ...]:
    """Bind this process, until it ends, to `count` cores that no other worker of this user holds.

    Returns the core numbers. If too few cores are free, returns () and changes nothing.

    folder: holds the lock files; all workers on the machine must use the same one.
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
    """Bind every thread of this process; a later thread inherits the binding of its creator."""
    bound: set[str] = set()
    while new := set(os.listdir("/proc/self/task")) - bound:
        for thread in new:
            try:
                os.sched_setaffinity(int(thread), numbers)
            except ProcessLookupError:  # the thread has ended
                continue
        bound |= new
