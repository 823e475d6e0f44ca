"""What a pipeline holds does not grow with the number of its requests."""

from __future__ import annotations

import pytest
import torch
from benchmarks.requests_memory import nano_pipeline, run

from engine import make_pipeline
from omniavatar.engine.prompts import KEPT_BYTES, KeptEmbeddings

SMALL = torch.zeros(1, 512, 8)
"""16 KiB."""


def test_embeddings_used_last_are_kept() -> None:
    kept = KeptEmbeddings(most=3 * SMALL.nbytes)
    for name in "abc":
        kept.put(name, SMALL + ord(name))
    assert kept.get("a") is not None
    kept.put("d", SMALL)
    assert kept.get("b") is None and kept.bytes == 3 * SMALL.nbytes
    found = kept.get("a")
    assert found is not None and torch.equal(found, SMALL + ord("a"))
    kept.put("a", SMALL)
    assert kept.bytes == 3 * SMALL.nbytes and torch.equal(kept.get("a"), SMALL)


def test_an_embedding_larger_than_the_limit_is_kept_alone() -> None:
    kept = KeptEmbeddings(most=10)
    kept.put("a", SMALL)
    kept.put("b", SMALL)
    assert kept.get("a") is None and kept.get("b") is not None and kept.bytes == SMALL.nbytes


def test_a_kept_embedding_does_not_keep_the_batch_it_was_computed_in() -> None:
    kept = KeptEmbeddings()
    kept.put("a", torch.zeros(100, 512, 8)[:1])
    assert kept.get("a").untyped_storage().nbytes() == SMALL.nbytes
    assert KEPT_BYTES == 16 * 512 * 4096 * 2  # 16 prompts of the released models


def test_a_dropped_prompt_is_embedded_again(nano_checkpoint, tmp_path) -> None:
    prompts = make_pipeline(nano_checkpoint, tmp_path).models.prompts
    prompts.remember("a", SMALL)
    assert torch.equal(prompts.embed(["a"])[0], SMALL)
    prompts.remember("large", torch.zeros(KEPT_BYTES // 4))
    with pytest.raises(RuntimeError, match="no placement"):  # it would ask whether the text encoder fits
        prompts.embed(["a"])
    assert torch.equal(prompts.embed(["large"])[0], torch.zeros(KEPT_BYTES // 4))


def test_requests_leave_nothing_behind(nano_checkpoint, tmp_path) -> None:
    """30 requests here; `python -m benchmarks requests_memory` runs 2,000."""
    with nano_pipeline(nano_checkpoint, tmp_path / "text") as pipeline:
        rows = run(pipeline, 30, 10, 0.25, tmp_path / "video.mp4")
    first, last = rows[0], rows[-1]
    assert last.threads == first.threads and last.files == first.files
    assert last.objects - first.objects < 20 * 4  # an embedding a request, until the limit
    assert last.host_bytes - first.host_bytes < 20 * 2**20
