"""The state of every item on disk, from which the same command continues after an interruption.

Each change replaces `<run>/items/<key>.json` by rename, so a reader sees a complete state or none. An
unreadable state counts as missing. Only the driver writes states, and the work itself decides over them: a
finished video with its sidecar, or the job folder of an interrupted one. Renames are not synced to the disk:
after a power failure a state may be old, and the item is checked again.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from omniavatar.errors import OutputError
from omniavatar.media.atomic import atomic_write_json, check_writable, translate_os_error
from omniavatar.media.lease import Lease, holder_of, try_lease
from omniavatar.serve.batch.items import Item
from omniavatar.text import read_record

FORMAT = 1
StateName = Literal["queued", "running", "done", "failed"]


@dataclass(frozen=True)
class ItemState:
    """The state of one item.

    window: finished windows, of `windows` (0 if not known yet).
    updated: seconds since 1970.
    """

    key: str
    name: str
    line: int
    prompt: str
    identity: str
    state: StateName
    attempts: int = 0
    window: int = 0
    windows: int = 0
    error: str = ""
    error_class: str = ""
    worker: str = ""
    frames: int = 0
    video_seconds: float = 0.0
    seconds: float = 0.0
    bytes: int = 0
    updated: float = 0.0


def first_state(item: Item) -> ItemState:
    return ItemState(item.key, item.name, item.line, item.prompt, item.identity, "queued")


class RunFolder:
    """The run folder of one batch; one driver at a time owns it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._items = folder / "items"

    def own(self) -> Lease:
        """The lease on this run folder; release it at the end.

        Raises OutputError if another driver holds it, or the folder cannot be written.
        """
        self._refuse_foreign()
        check_writable(self._items)
        path = self.folder / "driver.lock"
        lease = try_lease(path)
        if lease is None:
            raise OutputError(
                f"{self.folder}: {holder_of(path)} is running this batch; wait until it ends, or set "
                "another --run-dir"
            )
        return lease

    def _refuse_foreign(self) -> None:
        """Raise OutputError if the folder holds a summary that no batch wrote."""
        summary = self.folder / "summary.json"
        if not summary.exists():
            return
        try:
            values = json.loads(summary.read_text(encoding="utf-8"))
            ours = isinstance(values, dict) and "items" in values
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise OutputError(
                f"{summary}: was not written by omniavatar; move it away or set another --run-dir"
            )

    def states(self) -> dict[str, ItemState]:
        """Every readable state by key."""
        names = {field.name for field in fields(ItemState)}
        found: dict[str, ItemState] = {}
        for path in self._items.glob("*.json"):
            try:
                values = read_record(path) or {}
                if values.pop("format") == FORMAT and set(values) == names and values["key"] == path.stem:
                    found[path.stem] = ItemState(**values)
            except (KeyError, TypeError):
                continue
        return found

    def write(self, state: ItemState) -> None:
        """Replace the item's state. Raises OutputError."""
        values = {"format": FORMAT, **vars(state), "updated": round(time.time(), 3)}
        text = json.dumps(values, ensure_ascii=False)  # an indent would take ten times as long
        path = f"{self._items}/{state.key}"
        with translate_os_error(f"{path}.json"):
            with open(f"{path}.tmp", "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text + "\n")
            os.replace(f"{path}.tmp", f"{path}.json")

    def write_summary(self, summary: dict[str, Any]) -> Path:
        path = self.folder / "summary.json"
        atomic_write_json(path, summary)
        return path
