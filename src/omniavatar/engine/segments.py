"""The segments of a job: a closed one for each window, or several windows by one encoder that goes on.

With `key_frame_s`, windows share an encoder (`media.running`) until that time has passed. Then the
pictures since the last key frame lie beside the segments as `frames_0000k.mp4`, so that a resumed run has the
same encoder. Windows are encoded in order, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omniavatar.engine.host import Host
from omniavatar.engine.job import Job
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


def encoders_at_once(host: Host, plan: RunPlan) -> int:
    """Windows that may wait for their encoder or be in it. This number does not change the bytes."""
    height, width = plan.size
    largest = max(window.new_frames for window in plan.windows) * height * width * 3
    return max(2, min(host.encoders, MOST_WAITING // largest))


def goes_on(output: OutputConfig, encoder: str) -> bool:
    """Whether windows share an encoder."""
    return output.key_frame_s > 0 and ENCODERS.get(encoder).goes_on is not None


def encoders(output: OutputConfig, plan: RunPlan, encoder: str, host: Host) -> int:
    """Windows that are encoded at the same time."""
    return 1 if goes_on(output, encoder) else encoders_at_once(host, plan)


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
        running = new_encoder(output, plan, encoder)
        host.encode_segment(iter([frames]), path, running=running, kept=folder / "frames.mp4")
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
    """Writes the segments of a job.

    - begun: window 0 is a finished video, copied.

    `places` windows are encoded at the same time, and `waiting` may wait for it or be in it.
    """

    def __init__(
        self, job: Job, plan: RunPlan, output: OutputConfig, encoder: str, host: Host, begun: bool = False
    ) -> None:
        self._job, self._plan = job, plan
        self._closed = closed_segments(host, output, plan, encoder)
        self._continued = host.encode_segment
        self._new = partial(new_encoder, output, plan, encoder)
        self._shared = goes_on(output, encoder)
        self._keys = key_windows(plan.windows, Fraction(plan.fps), output.key_frame_s, begun)
        self.waiting = encoders_at_once(host, plan)
        self.places = encoders(output, plan, encoder, host)
        self._encoder: RunningEncoder | None = None

    @property
    def kept_frames(self) -> int:
        """Most frames that are kept without loss at the same time."""
        if not self._shared:
            return 0
        windows = self._plan.windows
        starts = [window.first_new_frame for window in windows if window.index in self._keys]
        ends = [*starts[1:], self._plan.frames]
        return max(end - start for start, end in zip(starts, ends, strict=True))

    def resume(self) -> str | None:
        """Bring the encoder to where the windows done left it; returns what is wrong if that fails.

        Then the next window begins with a key frame.
        """
        done = self._job.done
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
        self._encoder = running
        return None

    def write(self, window: int, frames: Sequence[np.ndarray]) -> None:
        """Encode the new frames of a window into its segment. Raises OutputError."""
        path = self._job.segment_path(window)
        if not self._shared:
            self._closed(iter(frames), path)
            return
        if window in self._keys or self._encoder is None:
            self._encoder = self._new()
        last = window + 1 in self._keys or window == len(self._plan.windows) - 1
        kept = None if last else self._job.frames_path(window)
        self._continued(iter(frames), path, running=self._encoder, kept=kept)

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
            self._continued(iter(frames), path, running=self._new())
        else:
            self._closed(iter(frames), path)
