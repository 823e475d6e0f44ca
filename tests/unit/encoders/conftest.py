"""A small text encoder, its file and its tokenizer, for the tests of text and of its cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omniavatar.encoders.text import TextEncoder, random_text_encoder
from tiny_text import SIZES, write_text_encoder
from tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return random_text_encoder("cpu", torch.float32, seed=1, sizes=SIZES)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def encoder_file(tmp_path: Path) -> Path:
    return write_text_encoder(tmp_path)
