"""Fixtures for every test: skips GPU tests without a GPU, and makes one nano checkpoint for the whole run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from ranks import RankPool


def pytest_configure() -> None:
    """One token for every Ray instance of this process, because Ray reads it only once."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", "5eed" * 16)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def nano_checkpoint(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder like `pretrained_models/nano`, made once, read-only, and shared by all xdist workers."""
    from omniavatar.checkpoint.synthetic import make_checkpoint

    base = tmp_path_factory.getbasetemp()
    root = base if worker_id == "master" else base.parent
    folder = root / "nano_checkpoint"
    done = root / "nano_checkpoint.done"
    with FileLock(root / "nano_checkpoint.lock"):
        if not done.is_file():
            make_checkpoint("nano", folder)
            done.touch()
    return folder


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, RankPool]]:
    """Groups of 2 and of 4 processes, kept for the tests of a module."""
    from ranks import RankPool

    folder = tmp_path_factory.mktemp("ranks")
    made = {size: RankPool(size, folder) for size in (2, 4)}
    yield made
    for pool in made.values():
        pool.close()
