"""Pictures and sounds that the caller gives as bytes or as open files: kept in private files while they run.

A file object is read once, from its position to its end; the caller closes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import PIL.Image

from omniavatar.errors import InputError
from omniavatar.media.atomic import translate_os_error
from omniavatar.media.temporary import temporary_folder
from omniavatar.types import AvatarRequest, Waveform

if TYPE_CHECKING:
    from omniavatar.types import LocalAudio, LocalImage

READ_BYTES = 2**20
"""A file object is read in blocks of this size."""


@dataclass(frozen=True, eq=False)
class LocalRequest(AvatarRequest):
    """A request without bytes and file objects."""

    image: LocalImage
    audio: LocalAudio | None = None


@contextmanager
def in_files(request: AvatarRequest) -> Iterator[LocalRequest]:
    """`request`, with what it holds in memory written to files, which exist while the body runs.

    Raises InputError for a value of the wrong type, OutputError if the files cannot be written.
    """
    with ExitStack() as stack:
        image = _in_file("image", request.image, (np.ndarray, PIL.Image.Image), stack)
        audio = request.audio
        if audio is not None:
            audio = _in_file("audio", audio, (Waveform,), stack)
        yield LocalRequest(
            request.prompt,
            image,
            audio,
            request.sampling,
            request.size,
            request.continues,
            request.provenance,
        )


def _in_file(name: str, value: Any, known: tuple[type, ...], stack: ExitStack) -> Any:
    """`value` if it is a path or of a `known` type, else the path of a file with its content."""
    if isinstance(value, (str, os.PathLike)):
        return value if isinstance(value, str) else Path(value)
    if isinstance(value, known):
        return value
    blocks = _blocks(name, value, known)
    folder = stack.enter_context(temporary_folder("inputs"))
    path = folder / f"{name} in memory"
    with path.open("wb") as out:
        for block in blocks:
            with translate_os_error(path):
                out.write(block)
    return path


def _blocks(name: str, value: Any, known: tuple[type, ...]) -> Iterable[bytes]:
    """The content of bytes or of a file object. Raises InputError for anything else."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return [bytes(value)]
    if not hasattr(value, "read"):
        kinds = ", ".join(["a path", "bytes", "a binary file", *(kind.__name__ for kind in known)])
        raise InputError(f"{name}: is of type {type(value).__name__}; give one of {kinds}")
    return iter(lambda: _block(name, value), b"")


def _block(name: str, file: BinaryIO) -> bytes:
    try:
        block = file.read(READ_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: the file object cannot be read ({error}); give an open file") from None
    if not isinstance(block, bytes):
        raise InputError(f"{name}: the file object gives no bytes; open it in binary mode")
    return block
