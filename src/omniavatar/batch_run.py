"""A batch of avatar videos: requests of an input file as items, the pipeline as the workers' engine."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omniavatar import __version__
from omniavatar.calibration_file import default_path
from omniavatar.config import PipelineConfig
from omniavatar.config_identity import result_values
from omniavatar.errors import ConfigError, InputError, ResourceError
from omniavatar.output import output_path, weight_identities
from omniavatar.parallel.batch.items import Engine, Item, Made, Place
from omniavatar.pipeline import AvatarPipeline
from omniavatar.profiling.recorder import RunRecorder
from omniavatar.requests_file import BadLine, RequestLine
from omniavatar.types import AvatarRequest


@dataclass(frozen=True)
class AvatarEngines:
    """Makes a pipeline for a place; one thread on a CPU unless the configuration says otherwise."""

    config: PipelineConfig

    def __call__(self, place: Place) -> Engine:
        if len(place.devices) > 1:
            raise ConfigError("--gpus-per-job: one video on several GPUs is not in this version; use 1")
        runtime = self.config.runtime
        changes: dict[str, Any] = {"device": place.devices[0]}
        if place.devices[0] == "cpu":
            changes["threads"] = runtime.threads or 1
        config = self.config.model_copy(update={"runtime": runtime.model_copy(update=changes)})
        return _AvatarEngine(config)


class _AvatarEngine:
    """An `AvatarPipeline` that tells its windows."""

    def __init__(self, config: PipelineConfig) -> None:
        self._on_window: Callable[[int, int], None] = lambda done, windows: None
        self._pipeline = AvatarPipeline.from_config(config, recorder=RunRecorder([self._listen]))

    def run(
        self, request: AvatarRequest, output: Path, fresh: bool, on_window: Callable[[int, int], None]
    ) -> Made:
        self._on_window = on_window
        try:
            result = self._pipeline.generate(request, output, resume=False if fresh else None)
        except ResourceError:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise
        seconds = result.frames / self._pipeline.config.video.fps
        return Made(result.frames, result.windows, result.resumed_windows, seconds)

    def device(self) -> str:
        device = self._pipeline.components.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def _listen(self, name: str, fields: Mapping[str, Any]) -> None:
        if name == "request_started":
            self._on_window(fields["resumed_windows"], fields["windows"])
        elif name == "window_finished":
            self._on_window(fields["window"] + 1, fields["windows"])


def make_items(lines: Sequence[RequestLine | BadLine], config: PipelineConfig) -> list[Item]:
    """Items of the input file's lines, in order; a bad line is an item with a problem."""
    common = {
        "omniavatar": __version__,
        **result_values(config),
        **weight_identities(config.model),
        "step cache": _constants_file(config),
    }
    items: list[Item] = []
    lines_of: dict[str, int] = {}
    for line in lines:
        item = _bad(line) if isinstance(line, BadLine) else _item(line, config, common)
        first = lines_of.setdefault(item.key, item.line)
        if first != item.line:
            error = (
                f"line {item.line}: its video would be {item.name}, as line {first}'s; name another output"
            )
            item = _bad(BadLine(line.index, line.line, InputError(error)))
        items.append(item)
    return items


def _bad(line: BadLine) -> Item:
    key = f"{line.index:03d}_line_{line.line}"
    return Item(key, f"{key}.mp4", line.line, "", "", None, str(line.error))


def _item(line: RequestLine, config: PipelineConfig, common: Mapping[str, Any]) -> Item:
    name = line.target(config).name
    values = {
        **common,
        "prompt": line.prompt,
        "sampling": vars(line.sampling),
        "image": _file(line.image),
        "audio": None if line.audio is None else _file(line.audio),
    }
    text = json.dumps(values, sort_keys=True, default=str)
    identity = hashlib.sha256(text.encode()).hexdigest()
    return Item(Path(name).stem, name, line.line, line.prompt, identity, line.request())


def _constants_file(config: PipelineConfig) -> str | None:
    """The file of measured step-cache constants, where there is one."""
    wanted = config.sampling.step_cache_file
    path = wanted if isinstance(wanted, Path) else default_path(config.model) if wanted == "auto" else None
    return _file(path) if path is not None and path.is_file() else None


def _file(path: Path) -> str:
    found = path.stat()
    return f"{path.name}: {found.st_size} bytes, modified {found.st_mtime_ns}"


def output_folder(config: PipelineConfig) -> Path:
    """Where videos go when no --output is given."""
    return output_path(config.output, config.sampling, 0, "").parent
