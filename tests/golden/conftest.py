"""The `golden` fixture: recordings of the original code, read from a folder outside the repository.

The environment variable OMNIAVATAR_GOLDEN gives the folder; the default is `../shared/golden` beside the
repository. If the folder does not exist, every test that uses the fixture is skipped with a message.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parents[2]


class Golden:
    """Reads recordings; a call with a file name returns (tensors, metadata)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Path of the recording `name`; fails the test if the folder does not have it."""
        path = self.folder / name
        if not path.is_file():
            pytest.fail(f"{self.folder} has no recording {name}")
        return path

    def __call__(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Tensors of a safetensors recording (16-bit floats converted to float32) and its metadata."""
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(self.path(name), framework="pt") as recording:
            metadata = dict(recording.metadata() or {})
            for key in recording.keys():  # noqa: SIM118  (a handle, not a dict)
                tensor = recording.get_tensor(key)
                tensors[key] = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
        return tensors, metadata


@pytest.fixture(scope="session")
def golden() -> Golden:
    named = os.environ.get("OMNIAVATAR_GOLDEN")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(f"no golden recordings: {folder} is not a folder (set OMNIAVATAR_GOLDEN)")
    return Golden(folder)
