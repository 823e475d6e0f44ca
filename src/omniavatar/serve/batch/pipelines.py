"""Connects the batch to the pipeline: input lines become items, `AvatarPipeline` the engine of a worker."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omniavatar import __version__
from omniavatar.checkpoint.fingerprint import whole_digest
from omniavatar.config.change import changed
from omniavatar.config.schema import PipelineConfig
from omniavatar.device import choose_device, device_name
from omniavatar.engine.events import RequestStarted, WindowFinished
from omniavatar.engine.identity import content_values
from omniavatar.engine.orders import WindowsOrder
from omniavatar.engine.pipeline import AvatarPipeline
from omniavatar.engine.provenance import identity_of as provenance_identity
from omniavatar.engine.recorder import RunRecorder
from omniavatar.engine.requests_file import BadLine, RequestLine
from omniavatar.engine.targets import output_path
from omniavatar.engine.window_loop import ShouldStop, never
from omniavatar.errors import InputError, OmniAvatarError, ResourceError
from omniavatar.parallel.process import Process, connect, lost_another
from omniavatar.parallel.ranks import Ranks
from omniavatar.parallel.team import ONE
from omniavatar.plan.calibration import constants_file
from omniavatar.plan.sharing import shared_among
from omniavatar.serve.batch.cores import take_cores
from omniavatar.serve.batch.items import Engine, Item, Made, Member, PeerLost, Seat
from omniavatar.types import AvatarRequest, Event


@dataclass(frozen=True)
class AvatarEngines:
    """Makes the engine for a seat, in one process or in several (a `GroupFactory`).

    A process on the CPU has one thread unless the configuration sets another number.

    pin: bind a process on the CPU to one free core per thread, if enough are free.
    """

    config: PipelineConfig
    pin: bool = False

    def __call__(self, seat: Seat) -> Engine:
        config = self.on(self.config, seat.devices[0])
        return AvatarEngine(config, None, self.take_cores(config))

    def lead(self, member: Member) -> Engine:
        with _peer_errors():
            config = self._shared(member)
            return AvatarEngine(config, _join(member, config), self.take_cores(config))

    def follow(self, member: Member) -> None:
        with _peer_errors():
            config = self._shared(member)
            self.take_cores(config)
            AvatarPipeline.from_config(config, team=_join(member, config)).follow()

    def _shared(self, member: Member) -> PipelineConfig:
        count = len(member.seat.devices)
        return self.on(shared_among(self.config, count, f"--gpus-per-job {count}"), member.device)

    def on(self, config: PipelineConfig, device: str) -> PipelineConfig:
        """`config` for one process on `device`."""
        changes: dict[str, Any] = {"device": device}
        if device == "cpu":
            changes["threads"] = config.runtime.threads or 1
        return changed(config, runtime=changes)

    def take_cores(self, config: PipelineConfig) -> tuple[int, ...]:
        """Bind this process to cores for `config`; returns their numbers, () if it is not bound."""
        runtime = config.runtime
        if not self.pin or runtime.device != "cpu" or runtime.threads is None:
            return ()
        return take_cores(runtime.threads)


def _join(member: Member, config: PipelineConfig) -> Ranks:
    process = Process(member.rank, member.rank, len(member.seat.devices), member.store)
    return connect(process, choose_device(config.runtime.device))


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Raise PeerLost for an exchange that failed because another process died; pass other errors on."""
    try:
        yield
    except OmniAvatarError:
        raise
    except Exception as error:
        if not lost_another(error):
            raise
        raise PeerLost(f"lost contact with another process ({str(error).splitlines()[0][:200]})") from error


class AvatarEngine:
    """An `AvatarPipeline` that reports its windows.

    team: the processes that make each video together; None for one process.
    options: further ones of the pipeline.
    """

    def __init__(
        self,
        config: PipelineConfig,
        team: Ranks | None,
        cores: tuple[int, ...],
        make_pipeline: Callable[..., AvatarPipeline] = AvatarPipeline.from_config,
        **options: Any,
    ) -> None:
        self._on_window: Callable[[int, int], None] = lambda done, windows: None
        self._on_event: Callable[[Event], None] = lambda event: None
        self._team, self._cores = team, cores
        recorder = RunRecorder([self._listen])
        self.pipeline = make_pipeline(config, recorder=recorder, team=team or ONE, **options)

    def run(
        self, request: AvatarRequest, output: Path, fresh: bool, on_window: Callable[[int, int], None]
    ) -> Made:
        self._on_window = on_window
        return self._run(request, output, fresh, never)

    def run_watched(
        self,
        request: AvatarRequest,
        output: Path,
        on_event: Callable[[Event], None],
        should_stop: ShouldStop,
    ) -> Made:
        """As `run`, with every event of the run reported, until `should_stop`. Also raises StoppedError."""
        self._on_event = on_event
        return self._run(request, output, False, should_stop)

    def _run(self, request: AvatarRequest, output: Path, fresh: bool, should_stop: ShouldStop) -> Made:
        with _peer_errors():
            return self._made(request, output, fresh, should_stop)

    def _made(self, request: AvatarRequest, output: Path, fresh: bool, should_stop: ShouldStop) -> Made:
        if self._team is not None:
            self._team.last_order = None
        try:
            result = self.pipeline.generate(
                request, output, resume=False if fresh else None, should_stop=should_stop
            )
        except ResourceError:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise
        seconds = result.frames / self.pipeline.config.video.fps
        return Made(result.frames, result.windows, result.resumed_windows, seconds)

    def device(self) -> str:
        device = self.pipeline.models.device
        name = device_name(device)
        if self._cores and self._team is None:
            name = f"{name} core {','.join(map(str, self._cores))}"
        return name if self._team is None else f"{self._team.size} x {name}"

    def intact(self) -> bool:
        """False after an error while the other processes were inside a video: they block in an exchange."""
        return self._team is None or not isinstance(self._team.last_order, WindowsOrder)

    def _listen(self, event: Event) -> None:
        self._on_event(event)
        if isinstance(event, RequestStarted):
            self._on_window(event.resumed_windows, event.windows)
        elif isinstance(event, WindowFinished):
            self._on_window(event.window + 1, event.windows)


def make_items(lines: Sequence[RequestLine | BadLine], config: PipelineConfig) -> list[Item]:
    """One item per line of the input file, in order; a bad line becomes an item with a problem."""
    common = {
        "omniavatar": __version__,
        **content_values(config),
        **provenance_identity(config.output),
        "step cache": _constants_file(config),
    }
    items: list[Item] = []
    lines_of: dict[str, int] = {}
    for line in lines:
        item = _bad(line) if isinstance(line, BadLine) else _item_of(line, config, common)
        first = lines_of.setdefault(item.key, item.line)
        if first != item.line:
            error = (
                f"line {item.line}: its output {item.name} is already used by line {first}; "
                "set a different output name"
            )
            item = _bad(BadLine(line.index, line.line, InputError(error)))
        items.append(item)
    return items


def _bad(line: BadLine) -> Item:
    key = f"{line.index:03d}_line_{line.line}"
    return Item(key, f"{key}.mp4", line.line, "", "", None, str(line.error))


def _item_of(line: RequestLine, config: PipelineConfig, common: Mapping[str, Any]) -> Item:
    """The item of a line; one with a problem if a file of it cannot be read any more."""
    try:
        return _item(line, config, common)
    except OSError as error:
        what = f"line {line.line}: {error.filename}: cannot be read: {error.strerror}; check the path"
        return _bad(BadLine(line.index, line.line, InputError(what)))


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
    """Content of the file with measured step-cache constants, None if the run uses no such file."""
    path = constants_file(config.model, config.sampling)
    return _file(path) if path is not None and path.is_file() else None


def _file(path: Path) -> str:
    return f"{path.name}: {whole_digest(path)}"


def output_folder(config: PipelineConfig) -> Path:
    """The folder of the videos if --output is not given."""
    return output_path(config.output, config.sampling, 0, "").parent
