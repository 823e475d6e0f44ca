"""Prompts to token numbers: cleaning as Wan does it, then the tokenizer of the released folder.

`ByteTokenizer` stands in where weights are random and there is no folder: one token a UTF-8 byte, so equal
prompts give equal tokens and no file is read. It is of no use with trained weights.
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
    """`ids` and `mask` (n, length) int64, mask 0 on padding; `lengths`: tokens before any cut."""

    ids: torch.Tensor
    mask: torch.Tensor
    lengths: tuple[int, ...]


class Tokenizer(Protocol):
    def __call__(self, texts: Sequence[str], length: int) -> Tokens:
        """Tokens of cleaned texts, padded or cut to `length`."""
        ...


def clean_prompt(prompt: str) -> str:
    """Broken encodings mended, HTML entities resolved (twice), runs of white space made one space."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class FolderTokenizer:
    """The tokenizer of a Hugging Face folder. Raises `CheckpointError` when the folder holds none."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no tokenizer folder; the base model has it (google/umt5-xxl)")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, padding_side="right"
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{folder}: no usable tokenizer ({reason}); download it again") from error

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
    """Deterministic stand-in without files: byte b is token b + 3, then the end token 1; padding is 0."""

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
    """Log a warning for each prompt that lost its end."""
    for text, length in zip(texts, tokens.lengths, strict=True):
        if length > tokens.ids.shape[1]:
            kept = tokens.ids.shape[1]
            _log.warning("prompt: %d tokens, the model reads %d; the end is lost: %.60s", length, kept, text)
