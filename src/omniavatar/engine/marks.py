"""What tells our files from a user's, so that no file without our mark is replaced or deleted.

- a sidecar: JSON with the identity of the video and the version of this package;
- a job folder: `job.json` with an identity; a damaged one counts beside windows, if all names are ours;
- a preview: lies beside a job folder of ours, or carries `PREVIEW_MARK`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Any

from omniavatar.text import read_record as read_json_record

PREVIEW_MARK = "omniavatar: this video is still being made"
STATE = "job.json"
OWNER = "owner.lock"
_NAMES = (
    re.escape(STATE),
    re.escape(OWNER),
    r"segment_\d{5,}\.mp4",
    r"given_\d{5,}\.safetensors",
    r"frames_\d{5,}\.mp4",
    r"audio_16k\.f32",
    r"audio_features\.npy(\.partial)?",
    r"sound\.mp4",
    r"joined_sound\.wav",
    r"\..*\.[0-9a-f]{8}\.tmp",
)
_JOB_FILE = re.compile("|".join(_NAMES), re.DOTALL)
_WINDOW = re.compile(r"(segment|given|frames)_\d{5,}\.")
_FIRST_STATE = re.compile(rf"\.{re.escape(STATE)}\.[0-9a-f]{{8}}\.tmp")
_HEAD_BYTES = 2**16


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None if it is missing, not readable, or something else.

    A file that this process may not read raises PermissionError.
    """
    if os.path.lexists(path) and path.exists() and not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return read_json_record(path)


def sidecar_record(path: Path) -> dict[str, Any] | None:
    """The content of one of our sidecars; None for any other file."""
    values = read_record(path)
    return values if values is not None and is_sidecar(values) else None


def is_sidecar(values: Any) -> bool:
    """Whether this JSON is the content of one of our sidecars."""
    if not isinstance(values, dict) or not isinstance(values.get("versions"), dict):
        return False
    return isinstance(values.get("fingerprint"), dict) and "omniavatar" in values["versions"]


def job_files(folder: Path) -> list[Path]:
    """The files of `folder` that have names of ours."""
    return sorted(path for path in folder.iterdir() if _JOB_FILE.fullmatch(path.name))


def is_job_folder(folder: Path) -> bool:
    """Whether `folder` is a folder in which we may write and delete files with names of ours."""
    if not _is(folder, stat.S_ISDIR):
        return False
    state = read_record(folder / STATE)
    if state is not None:
        return isinstance(state.get("fingerprint"), dict) and "format" in state
    names = {path.name for path in folder.iterdir()}
    if STATE in names:  # damaged
        return all(_JOB_FILE.fullmatch(name) for name in names) and any(map(_WINDOW.match, names))
    return all(name == OWNER or _FIRST_STATE.fullmatch(name) for name in names)


def is_preview(path: Path) -> bool:
    """Whether the file begins as a growing video of ours does."""
    if not _is(path, stat.S_ISREG):
        return False
    with path.open("rb") as file:
        return PREVIEW_MARK.encode() in file.read(_HEAD_BYTES)


def _is(path: Path, kind: Any) -> bool:
    """Whether `path` itself, not what it links to, is of this kind."""
    try:
        return bool(kind(path.lstat().st_mode))
    except (FileNotFoundError, NotADirectoryError):
        return False
