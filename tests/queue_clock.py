"""A fake timeline of a device, which a test moves, for recorders."""

from __future__ import annotations


class QueueClock:
    """A device that reaches each mark `step` seconds after the previous one.

    Its time starts at `origin` on the host's clock, and a test may also set `now`. `marks` counts marks,
    `reads` counts reads.
    """

    queued = True

    def __init__(self, step: float = 0.0, origin: float = 0.0) -> None:
        self.now, self.marks, self.reads = 0.0, 0, 0
        self._step, self._origin = step, origin

    def mark(self) -> float:
        self.marks += 1
        self.now += self._step
        return self.now

    def seconds(self, start: float, end: float) -> float:
        self.reads += 1
        return end - start

    def moment(self, mark: float) -> float:
        self.reads += 1
        return self._origin + mark
