"""Fixtures: the nano checkpoint, ComfyUI's folders and progress, the Load node's model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from comfy_tools import ENGINE_PYTHON, Shown, folder_paths, load, management, progress


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano checkpoint."""
    folder = tmp_path_factory.mktemp("models") / "nano"
    program = "import sys; from omniavatar.cli import command; sys.argv[1:1] = ['make-checkpoint']; command()"
    command = [ENGINE_PYTHON, "-c", program, "--scale", "nano", "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def package() -> Iterator[ModuleType]:
    """The module of the nodes. Its process ends with the tests."""
    module = sys.modules["comfyui.omniavatar_nodes.nodes"]
    yield module
    module.ENGINES.close()


@pytest.fixture
def comfy_folders(tmp_path: Path) -> Path:
    """ComfyUI's folders, below the test's own one; returns the output folder."""
    (tmp_path / "output").mkdir()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    folder_paths.set_temp_directory(str(tmp_path / "temp"))
    return tmp_path / "output"


@pytest.fixture
def shown() -> Iterator[Shown]:
    hook = Shown()
    progress.set_progress_bar_global_hook(hook)
    yield hook
    progress.set_progress_bar_global_hook(None)
    management.interrupt_current_processing(False)


@pytest.fixture
def model(package: ModuleType, comfy_folders: Path, checkpoint: Path, cache: Path) -> Any:
    """What the Load node gives."""
    return load(checkpoint, cache)
