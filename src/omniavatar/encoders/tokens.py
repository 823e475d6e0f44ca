"""Turns prompts into tokens: cleaned as in Wan, then tokenised with the released folder.

`ByteTokenizer` replaces the folder for random weights: one token per UTF-8 byte, without files. It does not
work with trained weights.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from omniavatar.errors import CheckpointError

TEXT_TOKENS = 512
PAD_TOKEN, END_TOKEN, FIRST_BYTE_TOKEN = 0, 1, 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of n texts.

    ids, mask: (n, length) int64; mask is 0 for padding.
    lengths: number of tokens of each text before truncation.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    lengths: tuple[int, ...]


class Tokenizer(Protocol):
    def __call__(self, texts: Sequence[str], length: int) -> Tokens:
        """Tokens of cleaned texts, padded or truncated to `length`."""
        ...


def clean_prompt(prompt: str) -> str:
    """`prompt` with fixed encoding errors, resolved HTML entities (twice) and single spaces."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class FolderTokenizer:
    """The tokenizer in a Hugging Face folder. Raises `CheckpointError` if the folder has none."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: tokenizer folder not found; it comes with the base model (google/umt5-xxl)"
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, padding_side="right"
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{folder}: unusable tokenizer ({reason}); download it again") from error

    def __call__(self, texts: Sequence[str], length: int) -> Tokens:
        whole = self._tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=True,
            padding="max_length",
            truncation=True,
            max_length=length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return Tokens(encoded["input_ids"], encoded["attention_mask"], tuple(len(ids) for ids in whole))


class ByteTokenizer:
    """Tokenizer without files: byte b is token b + 3, followed by the end token 1; padding is 0."""

    def __call__(self, texts: Sequence[str], length: int) -> Tokens:
        ids = torch.full((len(texts), length), PAD_TOKEN, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        lengths = []
        for row, text in enumerate(texts):
            tokens = [FIRST_BYTE_TOKEN + byte for byte in text.encode()]
            lengths.append(len(tokens) + 1)
            kept = [*tokens[: length - 1], END_TOKEN]
            ids[row, : len(kept)] = torch.tensor(kept)
            mask[row, : len(kept)] = 1
        return Tokens(ids, mask, tuple(lengths))


def warn_of_cuts(texts: Sequence[str], tokens: Tokens) -> None:
    """Log a warning for each truncated prompt."""
    for text, length in zip(texts, tokens.lengths, strict=True):
        if length > tokens.ids.shape[1]:
            kept = tokens.ids.shape[1]
            _log.warning(
                "prompt: has %d tokens, the model uses the first %d; shorten it: %.60s", length, kept, text
            )
