"""Writes one video while it is made: a segment for each window, and the growing file.

`VideoWriter` waits for the device, encodes and muxes in its own threads, several windows at a time: with few
steps, x264 takes longer for a window than the model. The sound is encoded beside the first windows, which
wait for it as encoded segments, so that it never holds up the model. Windows are recorded as done in order,
each only after its segment and its hand-over are on disk.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import safetensors.torch

from omniavatar.engine.events import Message, WindowFinished
from omniavatar.engine.job import Job
from omniavatar.engine.marks import PREVIEW_MARK
from omniavatar.engine.shown import left
from omniavatar.errors import ResumeError
from omniavatar.media.video import GrowingVideo
from omniavatar.types import LocalAudio, Recorder, Window

if TYPE_CHECKING:
    from torch import Tensor

    from omniavatar.engine.segments import Segments
    from omniavatar.engine.window_loop import WindowResult
    from omniavatar.plan.run import RunPlan

HELD_SHARE, HELD_WINDOWS = 0.9, 4
"""The video encoder holds back the model if all its places are busy for this part of the time, over this many
windows for each place."""
MOST_UNWRITTEN = 256
"""Windows that may wait, encoded, for the sound; each holds its hand-over, at most a few MB."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A window whose segment is on disk.

    - left: what it leaves for later windows, by name; None after the last.
    - started, arrived: host times at which it was queued, and at which its frames were on the host.
    """

    window: Window
    left: dict[str, Tensor] | None
    started: float
    arrived: float


class VideoWriter:
    """Encodes windows in the background and appends them to the growing video in order.

    As a context manager, it waits at the end until all windows handed over are on disk.
    """

    def __init__(
        self,
        job: Job,
        plan: RunPlan,
        segments: Segments,
        audio: LocalAudio | None,
        recorder: Recorder,
    ) -> None:
        self._segments, self._has_sound = segments, audio is not None
        self._job, self._plan, self._recorder = job, plan, recorder
        self._fps = Fraction(plan.fps)
        done = [job.segment_path(index) for index in range(job.done)]
        for segment in done:
            if not segment.is_file():
                raise ResumeError(f"{segment} is missing; use --no-resume to start over")
        self._pool = ThreadPoolExecutor(segments.places, thread_name_prefix="video-writer")
        self._open_first = ThreadPoolExecutor(1, thread_name_prefix="video-open")
        self._in_order = ThreadPoolExecutor(1, thread_name_prefix="video-append")
        self._abandoned = threading.Event()
        self._opening = self._open_first.submit(self._open, audio, done)
        self._encoding: deque[Future[Encoded]] = deque()
        self._queued: deque[threading.Event] = deque()
        self._appending: deque[Future[None]] = deque()
        self._failed = False
        self._first = self._arrived = 0.0
        self._busy: list[float] = []

    def _open(self, audio: LocalAudio | None, done: list[Path]) -> GrowingVideo:
        """The growing file with its sound and the windows of earlier runs."""
        track: Path | None = None
        if audio is not None:
            from omniavatar.media.audio import encode_aac_track

            track = self._job.folder / "sound.mp4"
            length = self._plan.frames / self._fps
            with self._recorder.stage("audio_encode"):
                encode_aac_track(audio, track, self._plan.audio_delay_s, length, self._abandoned.is_set)
        growing = GrowingVideo(self._job.partial, self._job.output, self._fps, track, PREVIEW_MARK)
        for segment in done:
            growing.append(segment)
        return growing

    def submit(self, result: WindowResult) -> None:
        """Queue a window, finished or not.

        It waits while more windows are not yet encoded than have a place, or while too many are not computed.

        Raises the error of the sound or of an earlier window. No window is written after one that failed.
        """
        if self._opening.done():
            self._opening.result()
        _wait(self._encoding, self._segments.places + 1)
        _wait(self._appending, MOST_UNWRITTEN)
        while len(self._queued) > self._segments.ahead:
            self._queued.popleft().wait()
        self._queued.append(threading.Event())
        encoded = self._pool.submit(self._encode_window, [result], self._queued[-1])
        self._encoding.append(encoded)
        self._appending.append(self._in_order.submit(self._append, encoded))

    def finish(self, sign: Callable[[Path], None] | None = None) -> None:
        """Wait for the last window, check the video against its plan, sign it, and give it its final name.

        sign: signs the checked file in place; None for a video without a manifest.

        Raises OutputError if the written file is not what was planned, and what `sign` raises.
        """
        _wait(self._encoding, 1)
        _wait(self._appending, 1)
        self._say_if_held()
        growing = self._opening.result()
        with self._recorder.stage("video_finish"):
            growing.finish(partial(self._check, sign), self._job.folder)

    def _say_if_held(self) -> None:
        """Emit one line if all places of the encoder were busy all the time."""
        places = self._segments.places * (self._arrived - self._first)
        share = sum(self._busy) / places if places else 0.0
        if share > HELD_SHARE and len(self._busy) >= HELD_WINDOWS * self._segments.places:
            self._recorder.event(
                Message(
                    f"the video encoder was busy {min(share, 1.0):.0%} of the time and holds back the model; "
                    "set preset to veryfast or ultrafast, or encoder to nvenc on a GPU with an encoder unit"
                )
            )

    def _check(self, sign: Callable[[Path], None] | None, path: Path) -> None:
        from omniavatar.media.check import check_video

        frames = self._plan.frames
        sound = frames / self._fps if self._has_sound else None
        check_video(path, frames, self._fps, sound, output=self._job.output)
        if sign is not None:
            sign(path)
        self._job.before_naming(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandoned.set()
        self._pool.shutdown(wait=True)
        self._open_first.shutdown(wait=True)
        self._in_order.shutdown(wait=True)
        if self._opening.exception() is None:
            self._opening.result().close()

    def _encode_window(self, handed: list[WindowResult], computed: threading.Event) -> Encoded:
        """Wait for a window and encode it.

        - handed: the window, which is taken out, so that its memory is free before its encoder is.
        - computed: set when it is there or has failed.
        """
        result = handed.pop()
        window, started = result.window, result.started
        with self._segments.turn(window.index) as wait:
            try:
                frames, after = result.frames, left_by(result)
            finally:
                computed.set()
            del result
            arrived = time.perf_counter()
            with self._recorder.stage("video_write"):
                pictures = self._segments.pictures(window.index, frames)
            del frames
            wait()
            with self._recorder.stage("video_write"):
                self._segments.write(window.index, pictures)
        self._busy.append(time.perf_counter() - arrived)
        return Encoded(window, after, started, arrived)

    def _append(self, encoding: Future[Encoded]) -> None:
        """Record a window as done and append it, in the order of the calls; not after one that failed."""
        if self._failed:
            return
        try:
            self._append_encoded(encoding.result())
        except BaseException:
            self._failed = True
            raise

    def _append_encoded(self, encoded: Encoded) -> None:
        window, left = encoded.window, encoded.left
        seconds = encoded.arrived - max(encoded.started, self._arrived)
        self._first, self._arrived = self._first or encoded.arrived, encoded.arrived
        with self._recorder.stage("video_append"):
            self._job.finish_window(None if left is None else safetensors.torch.save(left))
            self._segments.appended(window.index)
            self._opening.result().append(self._job.segment_path(window.index))
        self._recorder.event(
            WindowFinished(
                window=window.index,
                windows=len(self._plan.windows),
                frames_done=window.first_new_frame + window.new_frames,
                seconds=seconds,
            )
        )


def left_by(result: WindowResult) -> dict[str, Tensor] | None:
    """What a window leaves for later ones, by the names of its hand-over file."""
    if result.next_given is None:
        return None
    return left(result.next_given, result.shown)


def _wait(futures: deque[Future[Any]], most: int) -> None:
    """Wait until fewer than `most` are not done; raises the error of one that failed."""
    while futures and (len(futures) >= most or futures[0].done()):
        futures.popleft().result()
