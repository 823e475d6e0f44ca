"""Opens files that the user named: regular files only, without ever waiting for one."""

from __future__ import annotations

import errno
import os
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from omniavatar import text
from omniavatar.errors import InputError

_KINDS = {"FIFO": "a pipe", "socket": "a socket", "device": "a device"}


def open_input(source: str | Path, name: str) -> BinaryIO:
    """`source` opened for reading; it is a regular file and not empty.

    Raises InputError that starts with `name`.
    """
    try:
        file = BufferedReader(text.open_regular(source))
    except text.IrregularFileError as error:
        if error.kind == "folder":
            raise InputError(f"{name} is a folder; give a file") from None
        kind = _KINDS.get(error.kind, "not a regular file")
        raise InputError(f"{name} is {kind}; copy its content into a file and give that file") from None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{name} does not exist; check the path") from error
    except PermissionError as error:
        raise InputError(f"{name} cannot be read; check its permissions") from error
    except OSError as error:
        reason = error.strerror if error.errno != errno.ENAMETOOLONG else "the name is too long"
        raise InputError(f"{name} cannot be opened ({reason or error}); check the path") from error
    except ValueError as error:  # a zero byte, or half a surrogate pair
        raise InputError(f"{name} cannot be opened ({error}); check the path") from error
    if not os.fstat(file.fileno()).st_size:
        file.close()
        raise InputError(f"{name} is empty; give another file")
    return file
