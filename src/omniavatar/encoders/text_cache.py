"""Cache of prompt embeddings on disk, so that a repeated prompt does not load the 11 GB encoder.

The name of an entry is a hash of everything the embedding depends on: the content of the encoder file and of
the tokenizer's files (`checkpoint.fingerprint`), the dtype, and the cleaned text. An entry holds only the
rows of the text, after a digest of its bytes. A damaged entry is reported in the log and computed again.
Entries appear by rename, so several processes can share a folder.
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
    """Text that identifies everything embeddings depend on except the prompt. Raises `CheckpointError`."""
    tokenizer = sorted(path for path in Path(tokenizer_path).glob("*") if path.is_file())
    if not tokenizer:
        raise CheckpointError(
            f"{tokenizer_path}: tokenizer folder not found or empty; it comes with the base model"
        )
    return json.dumps(
        {
            "encoder": file_fingerprint(Path(encoder_path)),
            "tokenizer": {path.name: file_fingerprint(path) for path in tokenizer},
            "dtype": str(dtype),
        }
    )


class TextCache:
    """Embeddings of one encoder in `folder`; several encoders can share a folder.

    identity: of the encoder, from `encoder_identity`.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity

    def path(self, prompt: str) -> Path:
        """Path of the entry for `prompt`, whether it exists or not."""
        name = json.dumps([FORMAT, TEXT_TOKENS, self.identity, clean_prompt(prompt)])
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()}.embedding"

    def get(self, prompt: str) -> torch.Tensor | None:
        """The cached embedding (512, width) on the CPU, or None."""
        from safetensors.torch import load

        path = self.path(prompt)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning(
                "%s: cannot read the cached text embedding (%s); computing it again", path, error.strerror
            )
            return None
        digest, data = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            _log.warning("%s: the cached text embedding is damaged; computing it again", path)
            return None
        rows = load(data)["embedding"]
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
        except OSError as error:
            _log.warning("%s: cannot store the text embedding (%s)", path, error.strerror)


def encode_cached(
    prompts: Sequence[str], cache: TextCache | None, load: Callable[[], TextEncoder]
) -> torch.Tensor:
    """Embeddings (n, 512, width) of n prompts on the CPU; `load` is called once, only for missing entries."""
    texts = [clean_prompt(prompt) for prompt in prompts]
    known = {text: None if cache is None else cache.get(text) for text in texts}
    missing = [text for text, embedding in known.items() if embedding is None]
    if missing:
        for text, embedding in zip(missing, load().encode(missing).cpu(), strict=True):
            if cache is not None:
                cache.put(text, embedding)
            known[text] = embedding
    return torch.stack([embedding for text in texts if (embedding := known[text]) is not None])
