"""Weight files known by content, wherever they lie and whatever they are called, without reading them whole.

A file's size and hash; a large one by its first and last MiB and samples between (the last MiB of a `.pth`
holds the checksums of all its tensors).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from omniavatar.errors import CheckpointError

END_BYTES = 2**20
SAMPLES, SAMPLE_BYTES = 64, 16 * 2**10
WHOLE_BYTES = 2 * END_BYTES + SAMPLES * SAMPLE_BYTES


def file_fingerprint(path: Path) -> str:
    """Hash of a file's size and content; of one above 3 MiB, of both ends and 64 samples between."""
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
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
