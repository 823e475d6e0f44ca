"""Writing one video while it is made: segments, the growing file, the sidecar, output names.

`VideoWriter` waits for the device, encodes and muxes in threads of its own, two windows at a time: with few
steps on several GPUs one window takes x264 longer than the model. A window is recorded as done, in order,
only after its segment and its hand-over are on disk.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import safetensors.torch

from omniavatar.engine.events import WindowFinished
from omniavatar.engine.host import Host
from omniavatar.engine.job import Job
from omniavatar.errors import ResumeError
from omniavatar.media.audio import encode_aac_track
from omniavatar.media.video import GrowingVideo
from omniavatar.types import AudioInput, Recorder

if TYPE_CHECKING:
    from omniavatar.config.schema import OutputConfig
    from omniavatar.engine.window_loop import WindowResult
    from omniavatar.plan.run import RunPlan

ENCODER_THREADS = 4
"""Fixed, since x264's output depends on it and a resumed run must give the same video."""
ENCODERS = 2
"""Windows that are encoded at the same time; each is a file of its own, so the bytes are the same."""
MOST_PENDING = ENCODERS + 1
"""Windows the writer may be behind the model: those that are being encoded and one that is being computed."""


class VideoWriter:
    """Encodes finished windows and appends them to the growing video, in order, behind the model's back.

    A context manager: leaving it waits for the windows handed over, and leaves everything on disk.
    """

    def __init__(
        self,
        job: Job,
        plan: RunPlan,
        output: OutputConfig,
        audio: AudioInput | None,
        recorder: Recorder,
        encoder: str,
        host: Host,
    ) -> None:
        self._encoder, self._host = encoder, host
        self._job, self._plan, self._output, self._recorder = job, plan, output, recorder
        self._fps = Fraction(plan.fps)
        track: Path | None = None
        if audio is not None:
            track = job.folder / "sound.mp4"
            with recorder.stage("audio_encode"):
                encode_aac_track(audio, track, plan.audio_delay_s, plan.frames / self._fps)
        self._growing = GrowingVideo(job.partial, job.output, self._fps, track)
        self._pool = ThreadPoolExecutor(ENCODERS, thread_name_prefix="video-writer")
        self._pending: deque[Future[bool]] = deque()
        self._before: Future[bool] | None = None
        self._arrived = 0.0
        for index in range(job.done):
            segment = job.segment_path(index)
            if not segment.is_file():
                raise ResumeError(f"{segment} is missing; use --no-resume to start over")
            self._growing.append(segment)

    def submit(self, result: WindowResult) -> None:
        """Hand over a window that may still be computed; waits while `MOST_PENDING` are not written.

        Raises the error of an earlier window; no window is written after one that failed.
        """
        while self._pending and (len(self._pending) >= MOST_PENDING or self._pending[0].done()):
            self._pending.popleft().result()
        self._before = self._pool.submit(self._write, result, self._before)
        self._pending.append(self._before)

    def finish(self) -> None:
        """Wait for the last window and give the video its final name."""
        while self._pending:
            self._pending.popleft().result()
        with self._recorder.stage("video_finish"):
            self._growing.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        self._growing.close()

    def _write(self, result: WindowResult, before: Future[bool] | None) -> bool:
        """Encode a window and, after the one `before` it, append it; whether both were done."""
        frames, given = result.frames, result.next_given
        arrived = time.perf_counter()
        window = result.window
        with self._recorder.stage("video_write"):
            self._host.encode_segment(
                iter(frames),
                self._job.segment_path(window.index),
                fps=self._fps,
                size=self._plan.size,
                crf=self._output.crf,
                preset=self._output.preset,
                threads=ENCODER_THREADS,
                encoder=self._encoder,
            )
        if before is not None and (before.exception() is not None or not before.result()):
            return False
        seconds = arrived - max(result.started, self._arrived)
        self._arrived = arrived
        with self._recorder.stage("video_append"):
            self._job.finish_window(None if given is None else safetensors.torch.save({"given": given}))
            self._growing.append(self._job.segment_path(window.index))
        self._recorder.event(
            WindowFinished(
                window=window.index,
                windows=len(self._plan.windows),
                frames_done=window.first_new_frame + window.new_frames,
                seconds=seconds,
            )
        )
        return True
