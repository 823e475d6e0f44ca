"""The folder that a benchmark writes its reports to."""

from __future__ import annotations

import json
from pathlib import Path

from omniavatar.errors import TargetError
from omniavatar.media.atomic import check_writable
from omniavatar.media.lease import Lease, lease_for

NAMES = ("benchmark.json", "benchmark.md", "benchmark.html")


def own_reports(folder: Path) -> Lease:
    """The lease on the reports in `folder`.

    Raises OutputError if it cannot be written, BusyError if another benchmark writes there, and TargetError
    for a report that is not ours.
    """
    check_writable(folder.absolute())
    lease = lease_for(folder / ".benchmark.lock", folder / NAMES[0])
    foreign = next((folder / name for name in NAMES if (folder / name).exists()), None)
    if foreign is not None and not _ours(folder / NAMES[0]):
        lease.release()
        raise TargetError(
            f"{foreign}: was not written by omniavatar; move it away or choose another --output"
        )
    return lease


def _ours(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "rows" in values
