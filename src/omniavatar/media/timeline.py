"""Places decoded sound on a time line: late starts and gaps in the time stamps become silence."""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE_S = 0.015
"""Time stamps are this inexact: containers round them, recorders write jitter. Lost packets are longer."""
_SPLICE_S = 10.0
_RESTART_S = 0.5
_CLOCK_S = 60.0

_MATROSKA, _MOV = "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"
_STAMPED = {"asf", "asf_o", "flv", _MATROSKA, _MOV, "mpeg", "mpegts", "mxf", "nut", "ogg", "wtv"}
_FREE_CLOCK = {"mpeg", "mpegts"}
"""Formats of broadcast: their clock starts anywhere and jumps where recordings were joined."""


@dataclass
class TimeLine:
    """The samples placed so far at `rate` Hz, and how much silence the time stamps added.

    - stamped: whether the stamps of this format are times; otherwise they only count samples.
    - zero: the stamp in seconds at which the sound starts.
    - late: seconds of silence at the start.
    - gaps: seconds of silence between sounds.
    - jumps: jumps of the clock that were closed, not filled.
    """

    rate: int
    stamped: bool
    free_clock: bool
    zero: float
    position: int = 0
    late: float = 0.0
    gaps: float = 0.0
    jumps: int = 0
    _placed: bool = False

    @classmethod
    def of(cls, format_name: str, rate: int, first_stamp: float | None) -> TimeLine:
        """The time line of a container whose earliest stamp of any stream is `first_stamp` seconds."""
        free = format_name in _FREE_CLOCK
        first = first_stamp or 0.0
        # A file that starts beyond a minute was cut out of a live stream.
        zero = first if free or first > _CLOCK_S else 0.0
        return cls(rate, format_name in _STAMPED, free, zero)

    def silence_before(self, stamp: float | None) -> int:
        """Samples of silence between the sound so far and a frame at `stamp` seconds (None: unknown)."""
        if not self.stamped or stamp is None:
            return 0
        lag = stamp - self.zero - self.position / self.rate
        first, self._placed = not self._placed, True
        if first and lag <= TOLERANCE_S:
            self.zero += lag
            return 0
        restarted = lag < -_RESTART_S or (self.free_clock and lag > _SPLICE_S)
        if restarted and not first:
            self.zero += lag
            self.jumps += 1
            return 0
        if lag <= TOLERANCE_S:
            return 0
        silence = round(lag * self.rate)
        if first:
            self.late = lag
        else:
            self.gaps += lag
        return silence

    def add(self, samples: int) -> None:
        """Count samples of sound or silence."""
        self.position += samples
