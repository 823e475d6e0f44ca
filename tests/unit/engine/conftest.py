"""What tests of the engine share: a folder for prompts, and the nano pipeline with a finished video."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import make_pipeline, request
from omniavatar import AvatarPipeline


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text-cache")


@pytest.fixture(scope="module")
def pipeline(nano_checkpoint: Path, cache: Path) -> AvatarPipeline:
    return make_pipeline(nano_checkpoint, cache)


@pytest.fixture(scope="module")
def whole(pipeline: AvatarPipeline, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The video of `request(0.7)`, three windows of two steps."""
    result = pipeline.generate(request(0.7), tmp_path_factory.mktemp("whole") / "x.mp4")
    assert result.windows == 3
    return result.output.read_bytes()
