"""The state of every item on disk, so that the same command goes on where it was cut.

`<run>/items/<key>.json` is replaced by rename at each change, so a reader sees a whole state or none; a state
that cannot be read counts as none. States are a memory of the driver's, who alone writes them. What decides
is the work itself: a finished video with its sidecar, or the job folder of one that was cut. Renames are
not forced to the disk: after a power cut a state may be old, and the item is looked at again.
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
from omniavatar.serve.batch.items import Item
from omniavatar.serve.batch.lease import Lease, holder_of, try_lease

FORMAT = 1
StateName = Literal["queued", "running", "done", "failed"]


@dataclass(frozen=True)
class ItemState:
    """How far one item is. window: windows done, of `windows` (0: not known yet). updated: since 1970."""

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
    """The run folder of one batch, owned by one driver at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._items = folder / "items"

    def own(self) -> Lease:
        """The right to drive this batch; give it back at the end.

        Raises OutputError while another driver has it, or when the folder cannot be written.
        """
        check_writable(self._items)
        path = self.folder / "driver.lock"
        lease = try_lease(path)
        if lease is None:
            raise OutputError(
                f"{self.folder}: {holder_of(path)} is running this batch; wait for it, or give another "
                "--run-dir"
            )
        return lease

    def states(self) -> dict[str, ItemState]:
        """Every readable state by key."""
        names = {field.name for field in fields(ItemState)}
        found: dict[str, ItemState] = {}
        for path in self._items.glob("*.json"):
            try:
                values: Any = json.loads(path.read_text(encoding="utf-8"))
                if values.pop("format") == FORMAT and set(values) == names and values["key"] == path.stem:
                    found[path.stem] = ItemState(**values)
            except (OSError, ValueError, AttributeError, KeyError, TypeError):
                continue
        return found

    def write(self, state: ItemState) -> None:
        """Replace the item's state. Raises OutputError."""
        values = {"format": FORMAT, **vars(state), "updated": round(time.time(), 3)}
        text = json.dumps(values, ensure_ascii=False)  # with an indent it would take ten times as long
        path = f"{self._items}/{state.key}"
        with translate_os_error(f"{path}.json"):
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.replace(f"{path}.tmp", f"{path}.json")

    def write_summary(self, summary: dict[str, Any]) -> Path:
        path = self.folder / "summary.json"
        atomic_write_json(path, summary)
        return path
