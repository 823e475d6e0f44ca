"""Checks a file that the user named before it is opened."""

from __future__ import annotations

from pathlib import Path

from omniavatar.errors import InputError


def existing_file(source: str | Path, name: str) -> Path:
    """`source` as the path of a readable file that is not empty, else InputError that starts with `name`."""
    try:
        path = Path(source)
        with path.open("rb") as file:
            empty = not file.read(1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{name} does not exist; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{name} is a folder; give a file") from error
    except PermissionError as error:
        raise InputError(f"{name} cannot be read; check its permissions") from error
    except (OSError, ValueError) as error:  # a name too long for the system, or with a zero byte in it
        raise InputError(f"{name} cannot be opened ({error}); check the path") from error
    if empty:
        raise InputError(f"{name} is empty; give another file")
    return path
