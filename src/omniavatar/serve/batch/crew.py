"""What the scheduler knows of workers: they are hired, given tasks, and tell what happened to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from omniavatar.serve.batch.items import Outcome, Progress, Task, WorkerInfo


@dataclass(frozen=True)
class Started:
    """The worker of a slot is ready, or an Outcome says why it can't be."""

    slot: int
    answer: WorkerInfo | Outcome


@dataclass(frozen=True)
class Answered:
    """The worker of a slot has finished with its task."""

    slot: int
    outcome: Outcome


@dataclass(frozen=True)
class Lost:
    """The worker of a slot is gone: its process or its node died."""

    slot: int
    reason: str


News = Started | Answered | Lost


class Crew(Protocol):
    """Workers by slot number. A slot holds one worker at a time."""

    @property
    def workers(self) -> int:
        """How many slots there is room for."""
        ...

    def hire(self, slot: int) -> None:
        """Begin to start a worker; `Started` or `Lost` follows."""
        ...

    def give(self, slot: int, task: Task) -> None:
        """Hand the task to a ready worker; `Answered` or `Lost` follows."""
        ...

    def dismiss(self, slot: int) -> None:
        """End the slot's worker, whatever it does; nothing follows."""
        ...

    def wait(self, seconds: float) -> Sequence[News]:
        """What has happened, waiting at most `seconds` for the first of it."""
        ...

    def progress(self, slots: Sequence[int]) -> Mapping[int, Progress]:
        """Latest known progress of these working slots; doesn't wait, and asks for the next time."""
        ...

    def close(self) -> None:
        """End every worker and what was started for them."""
        ...
