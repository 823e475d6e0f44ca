"""One order of a node: progress, previews and interruption of ComfyUI while the engine works."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from PIL import Image

from .engine import Engine, Engines
from .inputs import Model, Request, output_folder
from .video import last_frame

PREVIEW_SIDE = 512
_log = logging.getLogger("omniavatar.comfyui")


class Display:
    """Shows the steps of a run as ComfyUI's progress, and the last frame of each window as its preview."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bar: Any = None
        self._windows = self._steps = self._value = 0
        self._preview = Path()

    def reply(self, reply: Mapping[str, Any]) -> None:
        """Show a reply of the engine. ComfyUI's interruption may leave this call."""
        kind = reply["kind"]
        if kind == "message":
            _log.log(logging.WARNING if reply["level"] == "warning" else logging.INFO, "%s", reply["text"])
        elif kind == "request_started":
            self._windows, self._steps = reply["windows"], reply["steps"]
            self._preview = Path(reply["preview"])
            self._bar = comfy.utils.ProgressBar(self._windows * self._steps)
            self._update(reply["resumed_windows"] * self._steps)
        elif kind == "step":
            self._update(reply["window"] * self._steps + reply["step"] + 1)
        elif kind == "window_finished":
            finished = self._folder / self._preview.name.replace(".partial.mp4", ".mp4")
            frame = last_frame((self._preview, finished), reply["frames_done"] - 1)
            if frame is not None:
                self._update(self._value, ("JPEG", Image.fromarray(frame), PREVIEW_SIDE))

    def _update(self, value: int, preview: Any = None) -> None:
        self._value = value
        self._bar.update_absolute(value, self._windows * self._steps, preview)


def poll() -> None:
    """Raise ComfyUI's exception if the user has interrupted."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def engine_of(engines: Engines, model: Model) -> Engine:
    """The engine of a model; its log lies in ComfyUI's folder for temporary files."""
    return engines.of(model.python, Path(folder_paths.get_temp_directory()) / "omniavatar_engine.log")


def make(engines: Engines, model: Model, request: Request, name: str) -> dict[str, Any]:
    """Make the video of a request, or find the finished one; returns the engine's result.

    Raises EngineError, InputProblem, and ComfyUI's exception of an interruption.
    """
    folder = output_folder(folder_paths.get_output_directory(), name, request.key(model))
    folder.mkdir(parents=True, exist_ok=True)
    if model.free_memory and not any(folder.glob("*.mp4")):
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
    engine = engine_of(engines, model)
    with request.in_files() as values:
        order = {"do": "generate", "model": model.order(), "request": values, "output": str(folder)}
        try:
            return engine.order(order, Display(folder).reply, poll)
        finally:
            with suppress(OSError):  # it holds a video or finished windows
                folder.rmdir()
            if not model.keep_loaded:
                engine.close()


def ask(engines: Engines, model: Model, request: Request | None = None) -> dict[str, Any]:
    """Open the model, or plan a request."""
    engine = engine_of(engines, model)
    if request is None:
        return engine.order({"do": "open", "model": model.order()}, Display(Path()).reply, poll)
    with request.in_files() as values:
        order = {"do": "plan", "model": model.order(), "request": values}
        return engine.order(order, Display(Path()).reply, poll)
