"""Opens files that the user named: regular files only, without ever waiting for one."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from omniavatar.errors import InputError

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(source: str | Path, name: str) -> BinaryIO:
    """`source` opened for reading; it is a regular file and not empty.

    Raises InputError that starts with `name`. Folders, pipes, sockets and devices are refused before they are
    opened, and again afterwards in case the path changed in between.
    """
    try:
        _refuse_irregular(os.stat(source).st_mode, name)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(source, flags)
        try:
            found = os.fstat(handle)
            _refuse_irregular(found.st_mode, name)
            if not found.st_size:
                raise InputError(f"{name} is empty; give another file")
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{name} does not exist; check the path") from error
    except PermissionError as error:
        raise InputError(f"{name} cannot be read; check its permissions") from error
    except OSError as error:
        reason = error.strerror if error.errno != errno.ENAMETOOLONG else "the name is too long"
        raise InputError(f"{name} cannot be opened ({reason or error}); check the path") from error
    except ValueError as error:  # a zero byte, or half a surrogate pair
        raise InputError(f"{name} cannot be opened ({error}); check the path") from error


def _refuse_irregular(mode: int, name: str) -> None:
    if stat.S_ISDIR(mode):
        raise InputError(f"{name} is a folder; give a file")
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "not a regular file")
        raise InputError(f"{name} is {kind}; copy its content into a file and give that file")
