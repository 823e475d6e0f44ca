"""Errors a user can act on: one clear line each, with an exit code for the command line.

Every message names the file or field at fault and what to do about it. Anything that is not an
`OmniAvatarError` is a bug of ours and keeps its traceback.
"""


class OmniAvatarError(Exception):
    """Base of every error that is the user's to fix; `exit_code` is what the command line returns."""

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
    """The result cannot be written: folder not writable, disk full. Finished windows stay on disk."""

    exit_code = 5


class ResumeError(OmniAvatarError):
    """Unfinished work lies on disk that was made with another configuration or other inputs."""

    exit_code = 6


class ResourceError(OmniAvatarError):
    """The machine lacks what the run needs: device, memory, an optional package."""

    exit_code = 7
