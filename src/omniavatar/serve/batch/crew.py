"""The scheduler's view of the workers: it starts them, gives them tasks and receives their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from omniavatar.serve.batch.items import Outcome, Progress, WorkerInfo


@dataclass(frozen=True)
class Started:
    """The worker of a slot is ready, or could not start (`answer` is then an Outcome with the error)."""

    slot: int
    answer: WorkerInfo | Outcome


@dataclass(frozen=True)
class Answered:
    """The worker of a slot finished its task, with success or an error."""

    slot: int
    outcome: Outcome


@dataclass(frozen=True)
class Lost:
    """The worker of a slot died with its process or its node."""

    slot: int
    reason: str


News = Started | Answered | Lost


class CrewLost(Exception):
    """All workers are lost, because what runs them ended. The crew can only be closed."""


class Crew(Protocol):
    """Workers by slot number. A slot has one worker at a time."""

    @property
    def workers(self) -> int:
        """Number of slots."""
        ...

    def hire(self, slot: int) -> None:
        """Start a worker without waiting; `Started` or `Lost` follows."""
        ...

    def give(self, slot: int, task: Any) -> None:
        """Give the task, a `Task` in a batch, to a ready worker; `Answered` or `Lost` follows."""
        ...

    def dismiss(self, slot: int) -> None:
        """Kill the slot's worker; no news follows."""
        ...

    def wait(self, seconds: float) -> Sequence[News]:
        """News since the last call; waits at most `seconds` for the first one. Raises CrewLost."""
        ...

    def progress(self, slots: Sequence[int]) -> Mapping[int, Progress]:
        """Last known progress of these busy slots. Does not wait; requests newer values for the next call."""
        ...

    def close(self) -> None:
        """Kill every worker and stop the services started for them."""
        ...
