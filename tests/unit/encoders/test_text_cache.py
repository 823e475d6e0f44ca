"""The cache of embeddings on disk: right entries only, a limit, and emptying it."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from omniavatar.checkpoint.fingerprint import file_fingerprint
from omniavatar.encoders.text import TextEncoder
from omniavatar.encoders.text_cache import (
    TextCache,
    cache_entries,
    encode_cached,
    encoder_identity,
)
from omniavatar.errors import CheckpointError
from tiny_text import SPEC


class Loader:
    """Replaces the slow load and counts its calls."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder, self.calls = encoder, 0

    def __call__(self) -> TextEncoder:
        self.calls += 1
        return self.encoder


def test_a_repeated_prompt_never_loads_the_encoder(encoder: TextEncoder, tmp_path: Path) -> None:
    load = Loader(encoder)
    prompts = ["a man", "bad quality", "a  man "]
    first = encode_cached(prompts, TextCache(tmp_path / "cache", "one"), load)
    assert load.calls == 1
    assert torch.equal(first, encoder.encode(prompts))
    again = encode_cached(prompts, TextCache(tmp_path / "cache", "one"), load)
    assert load.calls == 1
    assert torch.equal(again, first) and again.dtype == first.dtype
    assert len(list((tmp_path / "cache").iterdir())) == 2
    encode_cached(["a man", "a cat"], TextCache(tmp_path / "cache", "one"), load)
    assert load.calls == 2
    encode_cached(["a man"], TextCache(tmp_path / "cache", "another"), load)
    assert load.calls == 3


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "folder"])
def test_a_damaged_entry_is_reported_and_computed_again(
    encoder: TextEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache, load = TextCache(tmp_path, "one"), Loader(encoder)
    whole = encode_cached(["a man"], cache, load)
    path = cache.path("a man")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-7])
    elif damage == "flip":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        path.mkdir()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(encode_cached(["a man"], cache, load), whole)
    assert load.calls == 2
    assert "computing it again" in caplog.text
    if damage != "folder":
        assert cache.get("a man") is not None


def entry(cache: TextCache, prompt: str, used: float, rows: int = 10) -> Path:
    cache.put(prompt, torch.nn.functional.pad(torch.ones(rows, SPEC.dim), (0, 0, 0, 512 - rows)))
    os.utime(cache.path(prompt), (used, used))
    return cache.path(prompt)


def test_the_cache_has_a_limit_and_forgets_what_was_not_used(tmp_path: Path) -> None:
    probe = TextCache(tmp_path / "probe", "one")
    size = entry(probe, "a", 1).stat().st_size
    cache = TextCache(tmp_path / "cache", "one", limit=3 * size)
    paths = [entry(cache, prompt, used) for used, prompt in enumerate("abc", 1)]
    assert all(path.exists() for path in paths)
    assert cache.get("a") is not None  # now the one used last
    entry(cache, "d", 4)
    assert [path.exists() for path in paths] == [True, False, True]
    entry(cache, "long", 5, rows=500)
    assert [each.path for each in cache_entries(cache.folder)] == [cache.path("long")]
    assert cache.get("long") is not None


def test_only_entries_of_the_cache_are_listed(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, "one")
    path = entry(cache, "a", 1)
    size = path.stat().st_size
    left = tmp_path / f"{path.name}.4711.partial"
    left.write_bytes(b"killed")
    others = [tmp_path / "notes.embedding", tmp_path / "mine.txt", tmp_path / f"{'0' * 64}.embedding"]
    others[0].write_text("mine")
    others[1].write_text("mine")
    others[2].symlink_to(others[1])
    assert {each.path for each in cache_entries(tmp_path)} == {path, left}
    assert sum(each.bytes for each in cache_entries(tmp_path)) == size + 6
    assert cache_entries(tmp_path / "none") == []


@pytest.mark.parametrize("content", [{"other": torch.ones(2, 3)}, {"embedding": torch.ones(3)}, None])
def test_an_entry_with_other_content_is_damaged(tmp_path: Path, content: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save

    cache = TextCache(tmp_path, "one")
    data = b"no tensors" if content is None else save(content)
    cache.path("a").write_bytes(hashlib.sha256(data).digest() + data)
    assert cache.get("a") is None


def test_embeddings_that_are_not_finite_are_not_kept(encoder: TextEncoder, tmp_path: Path) -> None:
    """UMT5 overflows in float16 with some prompts; the video would be black."""
    cache = TextCache(tmp_path, "one")

    class Overflowing:
        def encode(self, prompts: list[str]) -> torch.Tensor:
            return torch.full((len(prompts), 512, SPEC.dim), float("inf"))

    with pytest.raises(CheckpointError, match=r"not finite in torch\.float32; set dtype=bfloat16"):
        encode_cached(["a"], cache, Overflowing)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    cache.put("a", torch.full((512, SPEC.dim), float("nan")))
    assert cache.get("a") is None  # as versions before wrote it


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(
    encoder: TextEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    embeddings = encode_cached(["a"], TextCache(tmp_path / "file", "one"), Loader(encoder))
    assert torch.equal(embeddings, encoder.encode(["a"]))
    assert "cannot store the text embedding" in caplog.text


def test_identity_depends_on_content_not_path(
    encoder_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    identity = encoder_identity(encoder_file, tokenizer_folder, torch.bfloat16)
    copy = shutil.copy(encoder_file, tmp_path / "elsewhere.pth")
    tokenizer = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
    os.utime(copy, (1, 1))
    assert encoder_identity(Path(copy), tokenizer, torch.bfloat16) == identity
    assert encoder_identity(Path(copy), tokenizer, torch.float32) != identity
    settings_file = tokenizer / "tokenizer_config.json"
    settings_file.write_text(settings_file.read_text() + " ")
    assert encoder_identity(Path(copy), tokenizer, torch.bfloat16) != identity
    with pytest.raises(CheckpointError, match="tokenizer folder not found"):
        encoder_identity(encoder_file, tmp_path / "none", torch.bfloat16)


def test_fingerprint_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(50_000_000)
    seen = {file_fingerprint(path)}
    for place in (10, 50_000_000 * 30 // 65 + 100, 49_999_000):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.add(file_fingerprint(path))
    assert len(seen) == 4
    with pytest.raises(CheckpointError, match="none"):
        file_fingerprint(tmp_path / "none")
