"""Where an interrupted job goes on: at its last window whose files, and those before it, are whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import av.error

from omniavatar.engine.handover import read_given
from omniavatar.errors import InputError, ResumeError
from omniavatar.media.running import packet_count

if TYPE_CHECKING:
    from omniavatar.engine.job import Job
    from omniavatar.plan.run import RunPlan


def go_on_from_good(job: Job, plan: RunPlan) -> str | None:
    """Let `job` go back to its last good window; returns a sentence on what is damaged, None if all is whole.

    A window is good if the segments before it are whole and its hand-overs are. Window 0 needs neither.
    """
    total = len(plan.windows)
    recorded = min(job.done, total)
    damaged = next((index for index in range(recorded) if not _segment_good(job, plan, index)), None)
    start = recorded if damaged is None else damaged
    path = None if damaged is None else job.segment_path(damaged)
    while 0 < start < total and (bad := _damaged_given(job, start)) is not None:
        path = path or job.given_path(bad)
        start -= 1
    if start == job.done:
        return None
    job.go_back(start)
    what = "the job counts more windows than the video has" if path is None else f"{path} is {_fault(path)}"
    return f"{what}; going on from window {start + 1} of {total}"


def _fault(path: Path) -> str:
    return "damaged" if path.exists() else "missing"


def _segment_good(job: Job, plan: RunPlan, index: int) -> bool:
    path = job.segment_path(index)
    if not path.is_file():
        return False
    intact = job.intact(path)
    if intact is not None:
        return intact
    try:  # the folder was written before checksums were
        return packet_count(path) == plan.windows[index].new_frames
    except (av.error.FFmpegError, OSError, InputError):
        return False


def _damaged_given(job: Job, window: int) -> int | None:
    """The first hand-over that `window` needs and that is not whole."""
    needed = job.hand_overs.needed(window)
    return next((number for number in needed if not _given_good(job, number)), None)


def _given_good(job: Job, number: int) -> bool:
    path = job.given_path(number)
    if not path.is_file() or job.intact(path) is False:
        return False
    try:
        read_given(path)
    except ResumeError:
        return False
    return True
