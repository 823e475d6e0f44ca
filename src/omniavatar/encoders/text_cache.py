"""Cache of prompt embeddings on disk, so that a repeated prompt does not load the 11 GB encoder.

The name of an entry is a hash of everything the embedding depends on: the content of the encoder file and of
the tokenizer's files (`checkpoint.fingerprint`), the dtype, and the cleaned text. An entry holds only the
rows of the text, after a digest of its bytes. A damaged entry is reported in the log and computed again.
Entries appear by rename, so several processes can share a folder. A folder holds at most `LIMIT_BYTES`: the
entries that were not used for the longest time are deleted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from omniavatar.checkpoint.fingerprint import content_identity
from omniavatar.checkpoint.finite import is_finite
from omniavatar.encoders.tokens import TEXT_TOKENS, clean_prompt
from omniavatar.errors import CheckpointError

if TYPE_CHECKING:
    from omniavatar.encoders.text import TextEncoder

FORMAT = 1
DIGEST_BYTES = 32
SUFFIX = ".embedding"
LIMIT_BYTES = 2**30
"""About 1,000 prompts of the released models (1 MB each at 120 tokens)."""
MAX_ENTRY_BYTES = 64 * 2**20

_log = logging.getLogger(__name__)


def encoder_identity(encoder_path: Path, tokenizer_path: Path, dtype: torch.dtype) -> str:
    """Text that identifies everything embeddings depend on except the prompt. Raises `CheckpointError`."""
    tokenizer = sorted(path for path in Path(tokenizer_path).glob("*") if path.is_file())
    if not tokenizer:
        raise CheckpointError(
            f"{tokenizer_path}: tokenizer folder not found or empty; it comes with the base model"
        )
    return json.dumps(
        {
            "encoder": content_identity(Path(encoder_path)),
            "tokenizer": {path.name: content_identity(path) for path in tokenizer},
            "dtype": str(dtype),
        }
    )


class TextCache:
    """Embeddings of one encoder in `folder`; several encoders can share a folder.

    identity: of the encoder, from `encoder_identity`.
    limit: bytes of all entries in the folder.
    """

    def __init__(self, folder: Path, identity: str, limit: int = LIMIT_BYTES) -> None:
        self.folder, self.identity = folder, identity
        self._limit = limit

    def path(self, prompt: str) -> Path:
        """Path of the entry for `prompt`, whether it exists or not."""
        name = json.dumps([FORMAT, TEXT_TOKENS, self.identity, clean_prompt(prompt)])
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()}{SUFFIX}"

    def get(self, prompt: str) -> torch.Tensor | None:
        """The cached embedding (512, width) on the CPU, or None."""
        path = self.path(prompt)
        try:
            if path.stat().st_size > MAX_ENTRY_BYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning(
                "%s: cannot read the cached text embedding (%s); computing it again", path, error.strerror
            )
            return None
        with contextlib.suppress(OSError):  # a shared folder may be read-only
            os.utime(path)
        rows = _rows(content)
        if rows is None:
            _log.warning("%s: the cached text embedding is damaged; computing it again", path)
            return None
        return torch.nn.functional.pad(rows, (0, 0, 0, TEXT_TOKENS - len(rows)))

    def put(self, prompt: str, embedding: torch.Tensor) -> None:
        """Store `embedding` (512, width). A failure is only logged, since the run works without the cache."""
        from safetensors.torch import save

        rows = int(embedding.ne(0).any(1).nonzero().max()) + 1 if embedding.any() else 0
        data = save({"embedding": embedding[:rows].cpu().contiguous()})
        path = self.path(prompt)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(hashlib.sha256(data).digest() + data)
            partial.replace(path)
            self._make_room(path)
        except OSError as error:
            _log.warning("%s: cannot store the text embedding (%s)", path, error.strerror)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _make_room(self, kept: Path) -> None:
        """Delete the entries that were not used for the longest time, but not `kept`."""
        entries = cache_entries(self.folder)
        too_many = sum(entry.bytes for entry in entries) - self._limit
        for entry in entries:
            if too_many <= 0:
                return
            if entry.path != kept:
                entry.path.unlink(missing_ok=True)
                too_many -= entry.bytes


@dataclass(frozen=True)
class CacheEntry:
    """A file of the cache.

    used: seconds since the epoch of its last use.
    """

    path: Path
    bytes: int
    used: float


def cache_entries(folder: Path) -> list[CacheEntry]:
    """The embeddings in a cache folder, and pieces that killed processes left there; the oldest use first."""
    found = []
    for path in (*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*{SUFFIX}.*.partial")):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # another process deleted it
        name = path.name.partition(".")[0]
        if stat.S_ISREG(status.st_mode) and re.fullmatch(r"[0-9a-f]{64}", name):
            found.append(CacheEntry(path, status.st_size, status.st_mtime))
    return sorted(found, key=lambda entry: (entry.used, entry.path))


def is_entry(content: bytes) -> bool:
    """Whether these are the bytes of a whole entry."""
    return hashlib.sha256(content[DIGEST_BYTES:]).digest() == content[:DIGEST_BYTES]


def _rows(content: bytes) -> torch.Tensor | None:
    """The rows in an entry; None if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not is_entry(content):
        return None
    try:
        rows = load(content[DIGEST_BYTES:]).get("embedding")
    except (SafetensorError, KeyError):
        return None
    if rows is None or rows.dim() != 2 or len(rows) > TEXT_TOKENS or not is_finite(rows):
        return None
    return rows


def encode_cached(
    prompts: Sequence[str], cache: TextCache | None, load: Callable[[], TextEncoder]
) -> torch.Tensor:
    """Embeddings (n, 512, width) of n prompts on the CPU; `load` is called once, only for missing entries."""
    texts = [clean_prompt(prompt) for prompt in prompts]
    known = {text: None if cache is None else cache.get(text) for text in texts}
    missing = [text for text, embedding in known.items() if embedding is None]
    if missing:
        for text, embedding in zip(missing, load().encode(missing).cpu(), strict=True):
            if not is_finite(embedding):
                raise CheckpointError(
                    f"text encoder: the embedding of a prompt is not finite in {embedding.dtype}; "
                    "set dtype=bfloat16, or use the released text encoder"
                )
            if cache is not None:
                cache.put(text, embedding)
            known[text] = embedding
    return torch.stack([embedding for text in texts if (embedding := known[text]) is not None])
