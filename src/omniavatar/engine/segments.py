"""The segments of a job: a closed one for each window, or several windows by one encoder that goes on.

With `key_frame_s`, windows share an encoder (`media.running`) until that time has passed. Then the
pictures since the last key frame lie beside the segments as `frames_0000k.mp4`, so that a resumed run has the
same encoder. The windows of one encoder are encoded in order, one at a time; those of the next encoder beside
them. So a model that is faster than one encoder keeps several busy, and nothing of that changes the bytes.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omniavatar.engine.host import Host
from omniavatar.engine.job import Job
from omniavatar.errors import OutputError
from omniavatar.media.h264 import ENCODERS

if TYPE_CHECKING:
    from omniavatar.config.schema import OutputConfig
    from omniavatar.media.running import RunningEncoder
    from omniavatar.plan.run import RunPlan
    from omniavatar.types import Window

ENCODER_THREADS = 4
"""Threads of x264. Fixed, because its output depends on them and a resumed run must give the same video."""
MOST_WAITING = 2**30
"""Bytes of frames that may wait for their encoder, unless two windows have more."""


def most_waiting(plan: RunPlan) -> int:
    """Windows whose frames may be in memory."""
    height, width = plan.size
    return MOST_WAITING // (max(window.new_frames for window in plan.windows) * height * width * 3)


def encoders_at_once(host: Host, plan: RunPlan) -> int:
    """Closed windows that are encoded at the same time. This number does not change the bytes."""
    return max(2, min(host.encoders, most_waiting(plan)))


def goes_on(output: OutputConfig, encoder: str) -> bool:
    """Whether windows share an encoder."""
    return output.key_frame_s > 0 and ENCODERS.get(encoder).goes_on is not None


def places(host: Host, plan: RunPlan, keys: Sequence[int]) -> int:
    """Windows that may wait for their encoder or be in it. This number does not change the bytes.

    - keys: numbers of the windows that begin with a key frame.

    A model that is as fast as n encoders is ahead of them by (n - 1) / 2 times the windows of one.
    """
    longest = max(end - start for start, end in zip(keys, [*keys[1:], len(plan.windows)], strict=True))
    at_once = min(host.encoders, len(keys))
    least = encoders_at_once(host, plan)
    return max(least, min(2 + (at_once - 1) * longest // 2, most_waiting(plan)))


def encoders(output: OutputConfig, plan: RunPlan, encoder: str, host: Host) -> int:
    """Windows that are encoded at the same time, if the model is fast enough."""
    if not goes_on(output, encoder):
        return encoders_at_once(host, plan)
    keys = key_windows(plan.windows, Fraction(plan.fps), output.key_frame_s, False)
    longest = -(-len(plan.windows) // len(keys))
    return max(1, min(host.encoders, len(keys), 1 + 2 * (places(host, plan, sorted(keys)) - 2) // longest))


def closed_segments(
    host: Host, output: OutputConfig, plan: RunPlan, encoder: str
) -> Callable[[Iterator[np.ndarray], Path], int]:
    """Encodes blocks of frames as one closed segment of the plan's video."""
    return partial(
        host.encode_segment,
        fps=Fraction(plan.fps),
        size=plan.size,
        crf=output.crf,
        preset=output.preset,
        threads=ENCODER_THREADS,
        encoder=encoder,
    )


def encode_once(
    frames: np.ndarray, folder: Path, output: OutputConfig, plan: RunPlan, encoder: str, host: Host
) -> None:
    """Encode a window's frames (n, H, W, 3) as `Segments` does, into files in `folder`, for a timing."""
    path = folder / "segment.mp4"
    if goes_on(output, encoder):
        from omniavatar.media.running import keep, yuv_pictures

        pictures = yuv_pictures([frames], plan.size)
        keep(pictures, folder / "frames.mp4", Fraction(plan.fps), plan.size)
        host.encode_segment(pictures, path, running=new_encoder(output, plan, encoder))
    else:
        closed_segments(host, output, plan, encoder)(iter([frames]), path)


def new_encoder(output: OutputConfig, plan: RunPlan, encoder: str) -> RunningEncoder:
    """An encoder that has encoded nothing yet."""
    from omniavatar.media.running import RunningEncoder

    return RunningEncoder(Fraction(plan.fps), plan.size, output.crf, output.preset, encoder)


def key_windows(windows: Sequence[Window], fps: Fraction, seconds: float, begun: bool) -> frozenset[int]:
    """Numbers of the windows that begin with a key frame.

    - begun: window 0 is a finished video, so the first encoder begins with window 1.
    """
    found = {0}
    since = 0
    for window in windows[1:]:
        frames = window.first_new_frame - since
        if (begun and window.index == 1) or frames >= seconds * fps:
            found.add(window.index)
            since = window.first_new_frame
    return frozenset(found)


class Segments:
    """Writes the segments of a job; its methods may be called from several threads.

    - begun: window 0 is a finished video, copied.

    `places` windows may wait for their encoder or be in it, and `ahead` may be queued and not yet computed.
    """

    def __init__(
        self, job: Job, plan: RunPlan, output: OutputConfig, encoder: str, host: Host, begun: bool = False
    ) -> None:
        self._job, self._plan = job, plan
        self._closed = closed_segments(host, output, plan, encoder)
        self._continued = host.encode_segment
        self._new = partial(new_encoder, output, plan, encoder)
        self._shared = goes_on(output, encoder)
        seconds = output.key_frame_s if self._shared else 0
        self._keys = sorted(key_windows(plan.windows, Fraction(plan.fps), seconds, begun))
        self.ahead = encoders_at_once(host, plan)
        self.places = places(host, plan, self._keys) if self._shared else self.ahead
        self._running: dict[int, RunningEncoder] = {}
        self._first = job.done
        self._written: dict[int, bool] = {}
        self._changed = threading.Condition()

    @property
    def kept_frames(self) -> int:
        """Most frames that are kept without loss at the same time, if the encoder keeps up with the model."""
        if not self._shared:
            return 0
        windows = self._plan.windows
        starts = [windows[key].first_new_frame for key in self._keys]
        ends = [*starts[1:], self._plan.frames]
        return max(end - start for start, end in zip(starts, ends, strict=True))

    def resume(self) -> str | None:
        """Bring the encoder to where the windows done left it; returns what is wrong if that fails.

        Then the next window begins with a key frame.
        """
        done = self._first = self._job.done
        if not self._shared or not done or done >= len(self._plan.windows) or done in self._keys:
            return None
        from omniavatar.media.running import begins_with_key_frame

        first = done - 1
        while first and not begins_with_key_frame(self._job.segment_path(first)):
            first -= 1
        running = self._new()
        for window in range(first, done):
            kept = self._job.frames_path(window)
            if not running.replay(kept, self._job.segment_path(window)):
                what = "does not give the same H.264 again" if kept.exists() else "is missing"
                return f"{kept} {what}; window {done + 1} begins with a key frame"
        self._running[self._key(done)] = running
        return None

    def _key(self, window: int) -> int:
        """The window with which the encoder of `window` begins."""
        return self._keys[bisect_right(self._keys, window) - 1]

    def _is_last(self, window: int) -> bool:
        """Whether no other window needs the encoder of this one."""
        return window + 1 in self._keys or window == len(self._plan.windows) - 1

    @contextmanager
    def turn(self, window: int) -> Iterator[Callable[[], None]]:
        """The time in which a window is written; gives a function that waits until `write` may be called.

        That is when the windows before it are written that have the same encoder. The function raises
        OutputError if one of them failed. Windows must take their turns in order.
        """
        before = None if window in self._keys or window == self._first else window - 1
        whole = False
        try:
            yield lambda: self._wait(before)
            whole = True
        finally:
            with self._changed:
                self._written[window] = whole
                self._changed.notify_all()

    def _wait(self, before: int | None) -> None:
        if before is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: before in self._written)
            if not self._written[before]:
                raise OutputError(f"{self._job.segment_path(before)} was not written")

    def pictures(self, window: int, frames: Sequence[np.ndarray]) -> Sequence[Any]:
        """The new frames of a window as `write` takes them; keeps them for a resumed run.

        Raises OutputError.
        """
        if not self._shared:
            return frames
        from omniavatar.media.running import keep, yuv_pictures

        pictures = yuv_pictures(frames, self._plan.size)
        if not self._is_last(window):
            keep(pictures, self._job.frames_path(window), Fraction(self._plan.fps), self._plan.size)
        return pictures

    def write(self, window: int, pictures: Sequence[Any]) -> None:
        """Encode what `pictures` gave, in the window's turn, into its segment. Raises OutputError."""
        path = self._job.segment_path(window)
        if not self._shared:
            self._closed(iter(pictures), path)
            return
        key = self._key(window)
        if key not in self._running:
            self._running[key] = self._new()
        running = self._running[key]
        self._continued(pictures, path, running=running)
        if self._is_last(window):
            del self._running[key]

    def appended(self, window: int) -> None:
        """Delete the pictures that no resumed run needs now that `window` is done."""
        if self._shared and window + 1 in self._keys:
            for each in range(window, -1, -1):
                self._job.frames_path(each).unlink(missing_ok=True)
                if each in self._keys:
                    return

    def write_alone(self, frames: Sequence[np.ndarray], path: Path) -> None:
        """Encode frames as a first window is, into any file."""
        if self._shared:
            from omniavatar.media.running import yuv_pictures

            self._continued(yuv_pictures(frames, self._plan.size), path, running=self._new())
        else:
            self._closed(iter(frames), path)
