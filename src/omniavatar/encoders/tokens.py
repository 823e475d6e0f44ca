"""Turns prompts into tokens: cleaned as in Wan, then tokenised with the released folder.

`ByteTokenizer` replaces the folder for random weights: one token per UTF-8 byte, without files. It does not
work with trained weights.
"""

from __future__ import annotations

import html
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from omniavatar.checkpoint.outside import read_bounded, read_table, reason_of, shown
from omniavatar.errors import CheckpointError, OmniAvatarError
from omniavatar.media.temporary import temporary_folder

TEXT_TOKENS = 512
PAD_TOKEN, END_TOKEN, FIRST_BYTE_TOKEN = 0, 1, 3

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "special_tokens_map.json", "added_tokens.json")
MAX_TOKENIZER_BYTES = 128 * 2**20
SETTINGS = {
    "tokenizer_class", "model_max_length", "padding_side", "truncation_side", "legacy", "extra_ids",
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "add_bos_token",
    "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "spaces_between_special_tokens",
    "split_special_tokens",
}  # fmt: skip
"""Fields of `tokenizer_config.json` that are used; others could name files or code."""

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
    """The tokenizer in a Hugging Face folder, made from its data alone.

    transformers sees a copy that holds the files of `TOKENIZER_FILES` and the settings of `SETTINGS`. No code
    of the folder runs, and no setting can name another file or the network.

    Raises `CheckpointError` if the folder has no tokenizer of the T5 family.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: tokenizer folder not found; it comes with the base model (google/umt5-xxl)"
            )
        self._folder = folder
        with _unusable(folder), temporary_folder("tokenizer") as copy:
            name = _copy_data(folder, copy)
            self._tokenizer: Any = _class(folder, name).from_pretrained(
                str(copy), local_files_only=True, trust_remote_code=False, padding_side="right"
            )

    def __call__(self, texts: Sequence[str], length: int) -> Tokens:
        with _unusable(self._folder):
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


@contextmanager
def _unusable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OmniAvatarError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise CheckpointError(
            f"{folder}: unusable tokenizer ({reason_of(error)}); download it again"
        ) from error


def _copy_data(folder: Path, target: Path) -> str | None:
    """Copy the data of a tokenizer folder; returns the name of its class, if it has one."""
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            (target / name).write_bytes(read_bounded(folder / name, MAX_TOKENIZER_BYTES))
    path = folder / "tokenizer_config.json"
    table = read_table(path) if path.exists() else {}
    if table.get("auto_map"):
        raise CheckpointError(
            f"{path}: auto_map names Python code, which is not run for safety; "
            "use the tokenizer folder of the base model (google/umt5-xxl)"
        )
    kept = {name: value for name, value in table.items() if name in SETTINGS}
    (target / path.name).write_text(json.dumps(kept), encoding="utf-8")
    given = table.get("tokenizer_class")
    return None if given is None else shown(str(given))


def _class(folder: Path, name: str | None) -> Any:
    from transformers import PreTrainedTokenizerFast, T5Tokenizer

    if name in ("T5Tokenizer", "T5TokenizerFast"):
        return T5Tokenizer
    if name in (None, "PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer"):
        return PreTrainedTokenizerFast
    raise CheckpointError(
        f"{folder}: has a tokenizer of the class {name}, UMT5 needs T5Tokenizer; "
        "use the tokenizer folder of the base model (google/umt5-xxl)"
    )


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
