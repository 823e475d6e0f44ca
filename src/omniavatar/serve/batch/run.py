"""Runs one batch, from its items to its summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniavatar.media.temporary import remove_abandoned
from omniavatar.serve.batch.crew import Crew
from omniavatar.serve.batch.destination import Destination
from omniavatar.serve.batch.events import BatchFinished
from omniavatar.serve.batch.items import Item
from omniavatar.serve.batch.ledger import Ledger
from omniavatar.serve.batch.report import summary
from omniavatar.serve.batch.rules import Rules
from omniavatar.serve.batch.run_folder import RunFolder
from omniavatar.serve.batch.scheduler import Report, Scheduler


@dataclass(frozen=True)
class BatchResult:
    """The record of a batch, and its `summary.json`: content and path."""

    ledger: Ledger
    summary: dict[str, Any]
    path: Path


def run_batch(
    items: Sequence[Item],
    open_crew: Callable[[], Crew],
    destination: Destination,
    folder: Path,
    rules: Rules,
    event: Report,
) -> BatchResult:
    """Make the items that are not done yet and write `summary.json` into the run folder.

    An error that ended the batch early is in `BatchResult.ledger`.

    open_crew: makes the workers; called only if an item is queued.
    event: called with each event of `serve.batch.events`.

    Raises OutputError if another driver runs the same folder, or a folder cannot be written.
    """
    remove_abandoned()
    run = RunFolder(folder)
    with run.own():
        with destination.prepared():
            ledger = Scheduler(open_crew, run, rules, event).run(items, run.states(), destination.sizes())
        figures = summary(ledger)
        event(BatchFinished(figures))
        return BatchResult(ledger, figures, run.write_summary(figures))
