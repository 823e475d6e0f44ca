"""The engines of the queue's workers: several models on one device, as many loaded as the memory plan allows.

A model is loaded when a job needs it. If its plan does not fit beside the loaded ones, those that were used
longest ago are closed first. Several GPUs for one job hold one model at a time.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from omniavatar.config.schema import PipelineConfig, RuntimeConfig
from omniavatar.device import choose_device, device_name
from omniavatar.engine.host import Host
from omniavatar.engine.window_loop import ShouldStop
from omniavatar.errors import ConfigError
from omniavatar.plan.run import window_shape
from omniavatar.serve.batch.group import GroupWorker
from omniavatar.serve.batch.items import Made, Member, Outcome, Seat, WorkerInfo
from omniavatar.serve.batch.pipelines import AvatarEngine, AvatarEngines
from omniavatar.serve.jobs.logs import log_as_json
from omniavatar.serve.jobs.worker import JobTask, JobWorker
from omniavatar.types import AvatarRequest, Event

HOST_SHARE = 0.8
"""Part of the machine's memory that the models on a CPU may take together."""


class Loaded(Protocol):
    """A model of the shelf."""

    def needs(self) -> int:
        """Bytes of the device that its plan takes."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


Model = TypeVar("Model", bound=Loaded)


class Shelf(Generic[Model]):
    """Loaded models by name, within a limit in bytes (None for no limit).

    make: opens a model, which loads nothing yet.
    """

    def __init__(self, make: Callable[[str], Model], limit: Callable[[], int | None]) -> None:
        self._make, self._limit = make, limit
        self._models: dict[str, Model] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the loaded models, the one used last at the end."""
        return tuple(self._models)

    def get(self, name: str) -> Model:
        """The model, made if needed; others are closed until it fits."""
        if name in self._models:
            self._models[name] = self._models.pop(name)
            return self._models[name]
        new = self._make(name)
        needed, limit = new.needs(), self._limit()
        while self._models and limit is not None and needed + self._held() > limit:
            self._models.pop(next(iter(self._models))).close()
        self._models[name] = new
        return new

    def beside(self, name: str) -> int:
        """Bytes that the other models hold."""
        return sum(model.needs() for other, model in self._models.items() if other != name)

    def close(self) -> None:
        while self._models:
            self._models.popitem()[1].close()

    def _held(self) -> int:
        return sum(model.needs() for model in self._models.values())


class _SharedHost(Host):
    """A machine whose device a model shares with others; `alone` while its plan is made as if it did not."""

    def __init__(self, beside: Callable[[], int]) -> None:
        self._beside, self.alone = beside, False

    def memory_limit(self, runtime: RuntimeConfig, device: torch.device) -> int | None:
        limit = super().memory_limit(runtime, device)
        return limit if limit is None or self.alone else limit - self._beside()


class _LoadedModel:
    """A pipeline on the shelf."""

    def __init__(self, config: PipelineConfig, cores: tuple[int, ...], host: _SharedHost) -> None:
        self._host = host
        self.engine = AvatarEngine(config, None, cores, host=host)
        self._needs: int | None = None

    def needs(self) -> int:
        if self._needs is None:
            pipeline = self.engine.pipeline
            config, models = pipeline.config, pipeline.models  # with the family of the weights
            size = max(config.video.sizes, key=lambda size: size[0] * size[1])
            shape = window_shape(config, size, bool(models.dit_config.audio_dim))
            self._host.alone = True
            try:
                self._needs = models.residency.place(shape, {}).memory.peak
            finally:
                self._host.alone = False
        return self._needs

    def close(self) -> None:
        self.engine.pipeline.close()


class ShelfEngine:
    """Makes videos with any of the models, in one process."""

    def __init__(self, configs: Mapping[str, PipelineConfig], cores: tuple[int, ...] = ()) -> None:
        self._configs, self._cores = configs, cores
        self._device = choose_device(next(iter(configs.values())).runtime.device)
        self._runtime = next(iter(configs.values())).runtime
        self.shelf = Shelf(self._open, self._limit)

    def run(
        self,
        model: str,
        request: AvatarRequest,
        output: Path,
        on_event: Callable[[Event], None],
        should_stop: ShouldStop,
    ) -> Made:
        if model not in self._configs:
            raise ConfigError(f"model {model}: is not configured; choose from {', '.join(self._configs)}")
        return self.shelf.get(model).engine.run_watched(request, output, on_event, should_stop)

    def device(self) -> str:
        return device_name(self._device)

    def intact(self) -> bool:
        return True

    def _open(self, name: str) -> _LoadedModel:
        return _LoadedModel(self._configs[name], self._cores, _SharedHost(lambda: self.shelf.beside(name)))

    def _limit(self) -> int | None:
        limit = Host().memory_limit(self._runtime, self._device)
        if limit is None and hasattr(os, "sysconf"):
            limit = int(HOST_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return limit


class _OneModelEngine:
    """Makes videos with the model of a group."""

    def __init__(self, model: str, engine: AvatarEngine) -> None:
        self._model, self._engine = model, engine

    def run(
        self,
        model: str,
        request: AvatarRequest,
        output: Path,
        on_event: Callable[[Event], None],
        should_stop: ShouldStop,
    ) -> Made:
        if model != self._model:
            raise ValueError(f"this group holds {self._model}, not {model}")
        return self._engine.run_watched(request, output, on_event, should_stop)

    def device(self) -> str:
        return self._engine.device()

    def intact(self) -> bool:
        return self._engine.intact()


@dataclass(frozen=True)
class JobEngines:
    """Makes the engine of a worker (an `EngineFactory` and a `GroupFactory` of the queue).

    configs: by the name of the model; the first one is loaded first.
    pin: as in `AvatarEngines`.
    log_level: of the JSON log of the worker's process; None leaves the logs as they are.
    """

    configs: Mapping[str, PipelineConfig]
    pin: bool = False
    log_level: str | None = None

    def __call__(self, seat: Seat) -> ShelfEngine:
        self._log()
        engines = {name: AvatarEngines(config, self.pin) for name, config in self.configs.items()}
        configs = {name: each.on(each.config, seat.devices[0]) for name, each in engines.items()}
        first = next(iter(configs))
        return ShelfEngine(configs, engines[first].take_cores(configs[first]))

    def only(self, model: str) -> JobEngines:
        """The same for one model. Raises ConfigError if it is not configured."""
        if model not in self.configs:
            raise ConfigError(f"model {model}: is not configured; choose from {', '.join(self.configs)}")
        return replace(self, configs={model: self.configs[model]})

    def lead(self, member: Member) -> _OneModelEngine:
        self._log()
        name, engines = self._first
        engine = engines.lead(member)
        assert isinstance(engine, AvatarEngine)
        return _OneModelEngine(name, engine)

    def follow(self, member: Member) -> None:
        self._first[1].follow(member)

    def _log(self) -> None:
        if self.log_level is not None:
            log_as_json(self.log_level)

    @property
    def _first(self) -> tuple[str, AvatarEngines]:
        name, config = next(iter(self.configs.items()))
        return name, AvatarEngines(config, self.pin)


class JobGroupWorker:
    """A worker of several processes; it starts them again for a job of another model."""

    def __init__(self, factory: bytes, seat: Seat, files: Any, folder: str) -> None:
        self._engines: JobEngines = pickle.loads(factory)
        self._arguments = (seat, files, folder)
        self._model = next(iter(self._engines.configs))
        self._group = self._new_group()

    def start(self) -> WorkerInfo | Outcome:
        return self._group.start()

    def run(self, task: JobTask) -> Outcome:
        if task.spec.model != self._model and task.spec.model in self._engines.configs:
            self._group.close()
            self._model = task.spec.model
            self._group = self._new_group()
            began = time.time()
            started = self._group.start()
            if isinstance(started, Outcome):
                return replace(started, began=began, replace=True)
        return self._group.run(task)

    def progress(self) -> Any:
        return self._group.progress()

    def stop(self, how: Any) -> None:
        self._group.stop(how)

    def close(self) -> None:
        """End the processes."""
        self._group.close()

    def _new_group(self) -> GroupWorker:
        seat, files, folder = self._arguments
        factory = pickle.dumps(self._engines.only(self._model))
        return GroupWorker(factory, seat, files, folder, kind=JobWorker)
