"""Identities of files: by content, independent of path and name, or by size and modification time."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from omniavatar.checkpoint.outside import open_regular
from omniavatar.errors import CheckpointError

END_BYTES = 2**20
SAMPLES, SAMPLE_BYTES = 64, 16 * 2**10
WHOLE_BYTES = 2 * END_BYTES + SAMPLES * SAMPLE_BYTES


def file_stamp(path: Path) -> str:
    """Size and modification time of a file as text; job folders and batch states store it."""
    found = path.stat()
    return f"{found.st_size} bytes, modified {found.st_mtime_ns}"


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's size and content. Raises CheckpointError.

    Of a file above 3 MiB, only the first and last MiB and 64 samples between are read. The last MiB of a
    `.pth` file holds the checksums of all its tensors.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
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
