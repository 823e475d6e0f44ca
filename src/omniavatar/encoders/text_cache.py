"""Prompt embeddings kept on disk, so that a repeated prompt never loads the 11 GB encoder.

An entry's name is the hash of everything its numbers depend on: the encoder file, the tokenizer's files, the
number type and the cleaned text. Files are known by content (`checkpoint.fingerprint`), wherever they lie. An
entry holds the rows of the text only, behind a digest of its bytes; a damaged one is reported in the log and
made anew. Entries appear by rename, so several processes may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from omniavatar.checkpoint.fingerprint import file_fingerprint
from omniavatar.encoders.tokens import TEXT_TOKENS, clean_prompt
from omniavatar.errors import CheckpointError

if TYPE_CHECKING:
    from omniavatar.encoders.text import TextEncoder

FORMAT = 1
DIGEST_BYTES = 32

_log = logging.getLogger(__name__)


def encoder_identity(encoder_path: Path, tokenizer_path: Path, dtype: torch.dtype) -> str:
    """All that embeddings depend on besides the text. Raises `CheckpointError` for a missing file."""
    tokenizer = sorted(path for path in Path(tokenizer_path).glob("*") if path.is_file())
    if not tokenizer:
        raise CheckpointError(f"{tokenizer_path}: no tokenizer folder; it comes with the base model")
    return json.dumps(
        {
            "encoder": file_fingerprint(Path(encoder_path)),
            "tokenizer": {path.name: file_fingerprint(path) for path in tokenizer},
            "dtype": str(dtype),
        }
    )


class TextCache:
    """Embeddings of the encoder `identity` (`encoder_identity`) in `folder`, which may hold others' too."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity

    def path(self, prompt: str) -> Path:
        """Where the embedding of `prompt` lies or would lie."""
        name = json.dumps([FORMAT, TEXT_TOKENS, self.identity, clean_prompt(prompt)])
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()}.embedding"

    def get(self, prompt: str) -> torch.Tensor | None:
        """The kept embedding (512, width) on the CPU, or None."""
        from safetensors.torch import load

        path = self.path(prompt)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("%s: cached text embedding cannot be read (%s); made anew", path, error.strerror)
            return None
        digest, data = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            _log.warning("%s: cached text embedding is damaged; made anew", path)
            return None
        rows = load(data)["embedding"]
        return torch.nn.functional.pad(rows, (0, 0, 0, TEXT_TOKENS - len(rows)))

    def put(self, prompt: str, embedding: torch.Tensor) -> None:
        """Keep `embedding` (512, width). Where that fails the log says so; the run does not depend on it."""
        from safetensors.torch import save

        rows = int(embedding.ne(0).any(1).nonzero().max()) + 1 if embedding.any() else 0
        data = save({"embedding": embedding[:rows].cpu().contiguous()})
        path = self.path(prompt)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(hashlib.sha256(data).digest() + data)
            partial.replace(path)
        except OSError as error:
            _log.warning("%s: text embedding cannot be kept (%s)", path, error.strerror)


def encode_cached(prompts: Sequence[str], cache: TextCache, load: Callable[[], TextEncoder]) -> torch.Tensor:
    """Embeddings (n, 512, width) of n prompts on the CPU; `load` is called, once, only if one is not kept."""
    texts = [clean_prompt(prompt) for prompt in prompts]
    known = {text: cache.get(text) for text in texts}
    missing = [text for text, embedding in known.items() if embedding is None]
    if missing:
        for text, embedding in zip(missing, load().encode(missing).cpu(), strict=True):
            cache.put(text, embedding)
            known[text] = embedding
    return torch.stack([embedding for text in texts if (embedding := known[text]) is not None])
