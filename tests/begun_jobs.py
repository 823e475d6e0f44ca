"""Unfinished jobs on disk, without a model."""

from __future__ import annotations

from pathlib import Path

from omniavatar.engine.job import Job

VALUES = {"request.prompt": '"a"'}
PARTIAL = b"partial"


def begun(output: Path) -> Job:
    """An unfinished job of `output` with one window."""
    job = Job(output)
    with job.owned():
        job.open(VALUES, True)
        job.segment_path(0).write_bytes(b"segment")
        job.finish_window(b"given")
        job.partial.write_bytes(PARTIAL)
    return job
