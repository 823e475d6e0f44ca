"""Identities of files by content, independent of path, name and time.

Large files are sampled. Two files of one size that differ only between the samples get the same fingerprint:
one changed tensor in a file of 10 GB can stay unseen, other weights of the same model cannot.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

from omniavatar.checkpoint.outside import open_weights
from omniavatar.errors import CheckpointError
from omniavatar.text import open_regular

END_BYTES = 2**20
SAMPLES, SAMPLE_BYTES = 64, 16 * 2**10
REMEMBERED = 4096
WHOLE_BYTES = 2 * END_BYTES + SAMPLES * SAMPLE_BYTES


def content_identity(path: Path) -> str:
    """`file_fingerprint`, which this process computes again only if the file's stamp or inode changed.

    Raises CheckpointError.
    """
    return _remembered(path, _version(path))


def whole_digest(path: Path) -> str:
    """SHA-256 of all bytes of an input file, remembered like `content_identity`. Raises OSError."""
    return _remembered_digest(path, _version(path))


def _version(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@functools.lru_cache(REMEMBERED)
def _remembered(path: Path, version: tuple[int, ...]) -> str:
    return file_fingerprint(path)


@functools.lru_cache(REMEMBERED)
def _remembered_digest(path: Path, version: tuple[int, ...]) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's size and content. Raises CheckpointError.

    Of a file above 3 MiB, only the first and last MiB and 64 samples between are read. The last MiB of a
    `.pth` file holds the checksums of all its tensors.
    """
    digest = hashlib.sha256()
    try:
        with open_weights(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(str(size).encode())
            if size <= WHOLE_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(END_BYTES))
                for sample in range(1, SAMPLES + 1):
                    file.seek(size * sample // (SAMPLES + 1))
                    digest.update(file.read(SAMPLE_BYTES))
                file.seek(size - END_BYTES)
                digest.update(file.read())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); download it again") from error
    return digest.hexdigest()
