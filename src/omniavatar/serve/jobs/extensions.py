"""A job that goes on from a finished one with more sound (`engine.continuation`)."""

from __future__ import annotations

from omniavatar.errors import InputError
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.records import SOURCE_VIDEO, JobRecord, JobStatus


def prepare_extension(files: JobFiles, source: JobRecord, new_id: str) -> str:
    """Copy what the new job needs from the finished one; returns the name of its portrait.

    The new job then depends on no other one. Its spec has the source's model, settings and size, `extends`,
    the returned `image`, and as `audio` the new sound alone.

    Raises InputError if the source is not completed, FileMissingError, OutputError.
    """
    if source.status is not JobStatus.completed or source.output is None:
        raise InputError(f"{source.id}: is {source.status}; wait until it is completed, then extend it")
    files.copy(source.id, source.output, new_id, SOURCE_VIDEO)
    files.copy(source.id, source.spec.image, new_id, source.spec.image)
    return source.spec.image
