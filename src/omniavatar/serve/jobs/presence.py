"""Which processes that claimed jobs have died, so that their jobs need not wait for the end of a lease.

Each process holds a kernel lock in the folder of the job files, which the kernel releases when it dies. A
lock that can be taken is the proof of that; a pid is none, because containers share pids and host names. Only
locks of the same boot of the same kernel count: a shared folder may not pass locks on to other machines.
Without that knowledge, and for workers that may outlive their server (Ray), the end of the lease decides.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import time
from collections.abc import Generator, Iterable
from pathlib import Path

from omniavatar.errors import OutputError
from omniavatar.media.lease import Lease, try_lease

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_TRIES, _PAUSE_S = 100, 0.01


def boot_id() -> str | None:
    """Names this boot of the machine's kernel, in containers too; None where the system does not say."""
    try:
        return _BOOT.read_text("ascii").strip()
    except OSError:
        return None


class Presence:
    """That this process lives. name: of the process, in the claims of its workers."""

    def __init__(self, folder: Path, boot: str | None) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"
        self._folder, self._boot = folder, boot
        self._lease: Lease | None = None

    def enter(self) -> None:
        """Hold the lock until `leave`. Raises OutputError."""
        if self._boot is None or self._lease is not None:
            return
        for _ in range(_TRIES):  # another process may be looking whether it is held
            self._lease = try_lease(self._path(self.name))
            if self._lease is not None:
                return
            time.sleep(_PAUSE_S)

    def leave(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def dead(self, names: Iterable[str]) -> Generator[str]:
        """Those of the processes that have died for sure.

        The lock of each is held while the caller has it, and then removed, unless the caller failed.
        """
        if self._boot is None:
            return
        known = {self._path(name): name for name in names}
        for path in sorted(self._folder.glob(f"{self._boot}-*.lock")):
            try:
                lease = try_lease(path, create=False)
            except OutputError:  # another user's, or no locks here: no proof
                continue
            if lease is not None:
                if path in known:
                    try:
                        yield known[path]
                    except GeneratorExit:
                        lease.abandon()
                        raise
                lease.release()

    def _path(self, name: str) -> Path:
        return self._folder / f"{self._boot}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"
