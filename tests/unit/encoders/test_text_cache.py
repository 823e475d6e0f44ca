"""The folder of cached text embeddings is bounded in bytes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from omniavatar.encoders.text_cache import STALE_S, TextCache

WIDTH = 16


def embedding(value: float) -> torch.Tensor:
    return torch.full((512, WIDTH), value)


@pytest.fixture
def entry_bytes(tmp_path: Path) -> int:
    cache = TextCache(tmp_path / "one", "encoder")
    cache.put("a", embedding(1))
    return cache.path("a").stat().st_size


def aged(cache: TextCache, prompts: str) -> None:
    """Give the entries the ages of their order, the first the oldest."""
    for number, prompt in enumerate(prompts):
        moment = time.time() - 1000 + number
        os.utime(cache.path(prompt), (moment, moment))


def test_entries_used_longest_ago_are_removed(tmp_path: Path, entry_bytes: int) -> None:
    cache = TextCache(tmp_path / "cache", "encoder", most=3 * entry_bytes)
    for number, prompt in enumerate("abc"):
        cache.put(prompt, embedding(number + 1))
    aged(cache, "abc")
    found = cache.get("a")
    assert found is not None and torch.equal(found, embedding(1))
    cache.put("d", embedding(4))
    assert [cache.path(prompt).exists() for prompt in "abcd"] == [True, False, True, True]
    assert cache.get("b") is None
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 3 * entry_bytes


def test_entries_of_other_encoders_count_and_the_newest_stays(tmp_path: Path, entry_bytes: int) -> None:
    folder = tmp_path / "cache"
    other = TextCache(folder, "another encoder")
    other.put("a", embedding(1))
    cache = TextCache(folder, "encoder", most=entry_bytes - 1)
    cache.put("a", embedding(2))
    assert not other.path("a").exists() and cache.path("a").exists()


def test_only_old_half_written_files_are_removed(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "encoder")
    old, new, foreign = tmp_path / "x.embedding.1.partial", tmp_path / "y.embedding.2.partial", tmp_path / "z"
    for path in (old, new, foreign):
        path.write_bytes(b"half")
    moment = time.time() - STALE_S - 60
    for path in (old, foreign):
        os.utime(path, (moment, moment))
    cache.put("a", embedding(1))
    assert not old.exists() and new.exists() and foreign.exists()
