"""Errors that a user can fix, each with an exit code for the command line.

Every message is one line that names the file or field at fault and what to do about it. Any other exception
is a bug in this program: a command reports it in one line and ends with `BUG`.
"""

from __future__ import annotations

import errno
from typing import ClassVar

BUG = 70
"""Exit code of a command that met a bug."""


class OmniAvatarError(Exception):
    """Base class of errors that the user can fix; the command line returns `exit_code`.

    public: what clients of a server read in place of messages that name its paths and addresses.
    """

    exit_code = 1
    public: ClassVar[str | None] = None

    def __str__(self) -> str:
        """The message as one line, also if it holds a name or the text of a library with line ends."""
        return " ".join(super().__str__().splitlines())


class ConfigError(OmniAvatarError):
    """A configuration file, an override or a combination of values cannot be used."""

    exit_code = 2


class InputError(OmniAvatarError):
    """An image, an audio file, a prompt or a line of the input file cannot be used."""

    exit_code = 3


class CheckpointError(OmniAvatarError):
    """A weight file is missing, broken, or does not fit the model."""

    exit_code = 4
    public = "the weights of this model cannot be used; choose another model, or tell who runs it"


class OutputError(OmniAvatarError):
    """The result cannot be written: the folder is read-only or the disk full. Finished windows are kept."""

    exit_code = 5
    public = "the server cannot store it now; try again later"


class TargetError(OutputError):
    """One output cannot be written, such as a file that is not ours; other outputs may be."""


class BusyError(TargetError):
    """Another process, or another thread, makes this output now."""


class ResumeError(OmniAvatarError):
    """Unfinished work on disk was made with another configuration or other inputs."""

    exit_code = 6


class ResourceError(OmniAvatarError):
    """The machine lacks a device, memory or an optional package that the run needs."""

    exit_code = 7
    public = "the server lacks a device or memory for it; try again later, or ask for a smaller one"


class NumbersError(OmniAvatarError):
    """A window's numbers are not finite, so its frames would be black. Windows before it are kept."""

    exit_code = 8


class StoppedError(OmniAvatarError):
    """The caller stopped the run (`should_stop`). Finished windows are kept."""

    exit_code = 130


_UNKNOWN_TO_CLIENTS = "the server cannot do it; try again later, or tell who runs it (the log says more)"


def for_clients(kind: type[OmniAvatarError], text: str) -> str:
    """The message of an error for a client of a server: it names no path or address of the server.

    A message about the client's own input or settings stays, unless it names a path.
    """
    if kind.public is not None:
        return kind.public
    return _UNKNOWN_TO_CLIENTS if "/" in text or "\\" in text else text


OF_ONE_LINE = (InputError, ResumeError, TargetError, NumbersError)
"""Errors of one line of an input file; the other lines still run."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)
_FILES = (errno.EMFILE, errno.ENFILE)


def translated(error: BaseException) -> OmniAvatarError | None:
    """The error of the user's machine that `error` of the system means; None if it is none."""
    if isinstance(error, MemoryError):
        return ResourceError(
            "memory: too little is free on this machine; end other programs, then run it again"
        )
    if not isinstance(error, OSError):
        return None
    name, reason = error.filename or "the disk", error.strerror or str(error)
    if error.errno in _FULL:
        return OutputError(f"{name}: cannot be written: {reason}; free some space or choose another folder")
    if error.errno in _PATH and error.filename is not None:
        return InputError(f"{name}: cannot be used: {reason}; check the path and its permissions")
    if error.errno in _FILES:
        return ResourceError(f"files: {reason}; raise the limit, as with `ulimit -n 4096`")
    return None
