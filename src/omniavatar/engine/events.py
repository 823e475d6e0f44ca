"""Events of a run, as values. A recorder passes each to its listeners: displays, JSON lines, traces."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from omniavatar.types import Event

_log = logging.getLogger("omniavatar")

Level = Literal["info", "warning"]
Action = Literal["compute", "reuse"]
About = Literal["", "image", "audio", "prompt"]


@dataclass(frozen=True)
class Message(Event, kind="message"):
    """A sentence for the user.

    - about: the input that it concerns; empty for none.
    """

    text: str
    level: Level = "info"
    about: About = ""


@dataclass(frozen=True)
class CommandFailed(Event, kind="error"):
    """The command ends with an error.

    - text: the line that the user reads.
    """

    text: str


@dataclass(frozen=True)
class RequestStarted(Event, kind="request_started"):
    """A request is planned.

    - index: number of the request. name: of the video file.
    - resumed_windows: windows that an earlier run finished.
    - preview: path of the growing video; empty if nothing is written.
    """

    index: int
    name: str
    frames: int
    windows: int
    steps: int
    resumed_windows: int
    preview: str = ""


@dataclass(frozen=True)
class RequestFinished(Event, kind="request_finished"):
    """A video has its final name.

    - output: path of the video.
    """

    output: str
    seconds: float
    frames: int


@dataclass(frozen=True)
class WindowStarted(Event, kind="window_started"):
    """The host starts to queue a window; windows are numbered from 0."""

    window: int
    windows: int


@dataclass(frozen=True)
class StepFinished(Event, kind="step"):
    """A step of a window is queued.

    - passes: number of its forward passes.
    """

    window: int
    step: int
    steps: int
    action: Action
    passes: int


@dataclass(frozen=True)
class WindowFinished(Event, kind="window_finished"):
    """A window is on disk.

    - frames_done: of the whole video. seconds: since the previous window.
    """

    window: int
    windows: int
    frames_done: int
    seconds: float


def log_event(event: Event) -> None:
    """A listener that writes events to the logger `omniavatar`.

    Messages have their own level. Requests and finished windows are INFO, everything else is DEBUG.
    """
    match event:
        case Message():
            _log.log(logging.WARNING if event.level == "warning" else logging.INFO, "%s", event.text)
        case RequestStarted() | RequestFinished() | WindowFinished():
            _log.info("%s %s", event.kind, event.as_dict())
        case _:
            _log.debug("%s %s", event.kind, event.as_dict())
