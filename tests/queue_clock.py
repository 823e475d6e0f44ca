"""A device's timeline that a test winds by hand, for recorders."""

from __future__ import annotations


class QueueClock:
    """The device gets to each mark `step` seconds after the one before, and began at `origin` of the host's
    clock. `now` may be moved besides; `marks` counts what was marked, `asked` what was read."""

    queued = True

    def __init__(self, step: float = 0.0, origin: float = 0.0) -> None:
        self.now, self.marks, self.asked = 0.0, 0, 0
        self._step, self._origin = step, origin

    def mark(self) -> float:
        self.marks += 1
        self.now += self._step
        return self.now

    def seconds(self, start: float, end: float) -> float:
        self.asked += 1
        return end - start

    def moment(self, mark: float) -> float:
        self.asked += 1
        return self._origin + mark
