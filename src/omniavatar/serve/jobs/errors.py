"""Errors of the job store, its files and its keys. The API gives each its status; a message is one line."""

from __future__ import annotations

from omniavatar.errors import ConfigError, InputError, OmniAvatarError, ResourceError


class StoreError(ResourceError):
    """The database of jobs cannot be reached, or another version of this package wrote it."""

    public = "the server cannot reach its database now; try again later"


class JobNotFoundError(OmniAvatarError):
    """No job has this id, or it belongs to another key."""


class QueueFullError(OmniAvatarError):
    """The queue holds as many jobs as it may."""


class KeyLimitError(OmniAvatarError):
    """The key has as many unfinished jobs as it may have."""


class IdempotencyConflictError(OmniAvatarError):
    """The key used this idempotency key for another request."""


class FileNameError(InputError):
    """A name or an id can be no file of a job."""


class FileTooLargeError(InputError):
    """A file has more bytes than the limit allows."""


class KeyNameError(ConfigError):
    """An API key of this name exists already, or none does."""


class FileMissingError(OmniAvatarError):
    """A job has no file of this name."""
