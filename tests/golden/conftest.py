"""The `golden` fixture: recordings of the original code, read from a folder outside the repository.

The folder is named by the environment variable OMNIAVATAR_GOLDEN, else `../shared/golden` beside the
repository. Where neither exists, every test that asks for the fixture is skipped and says so.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parents[2]


class Golden:
    """Reads recordings; calling it with a file name gives (tensors, metadata)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Path of the recording `name`; fails the test when the folder lacks it."""
        path = self.folder / name
        if not path.is_file():
            pytest.fail(f"{self.folder} has no recording {name}")
        return path

    def __call__(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Tensors of a safetensors recording (16-bit floats brought to float32) and its metadata."""
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
