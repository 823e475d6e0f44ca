"""Errors that a user can fix, each with an exit code for the command line.

Every message is one line that names the file or field at fault and what to do about it. Any other exception
is a bug in this program and keeps its traceback.
"""


class OmniAvatarError(Exception):
    """Base class of errors that the user can fix; the command line returns `exit_code`."""

    exit_code = 1


class ConfigError(OmniAvatarError):
    """A configuration file, an override or a combination of values cannot be used."""

    exit_code = 2


class InputError(OmniAvatarError):
    """An image, an audio file, a prompt or a line of the input file cannot be used."""

    exit_code = 3


class CheckpointError(OmniAvatarError):
    """A weight file is missing, broken, or does not fit the model."""

    exit_code = 4


class OutputError(OmniAvatarError):
    """The result cannot be written: the folder is read-only or the disk full. Finished windows are kept."""

    exit_code = 5


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


class NumbersError(OmniAvatarError):
    """A window's numbers are not finite, so its frames would be black. Windows before it are kept."""

    exit_code = 8


class StoppedError(OmniAvatarError):
    """The caller stopped the run (`should_stop`). Finished windows are kept."""

    exit_code = 130
