"""The loop of one request for a block-causal model: its windows are blocks, which follow without an overlap.

Like `engine.window_loop` it only queues work; reading a `WindowResult` waits. What a window leaves for later
ones are its latents. A resumed run replays the last clean passes from them (`BlockVideo.go_on_after`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from omniavatar.device import arrival, download, upload
from omniavatar.engine.block_video import BlockVideo, Past
from omniavatar.engine.events import StepFinished, WindowStarted
from omniavatar.engine.numbers import WindowNumbers
from omniavatar.engine.retry import Retry, no_retry
from omniavatar.engine.shown import Shown
from omniavatar.engine.window_inputs import audio_slice
from omniavatar.engine.window_loop import WatchStep, WindowResult, end_if, to_uint8
from omniavatar.types import Recorder, Window


class BlockWindows:
    """Makes the windows of one request.

    - audio: (frames, D), a row a frame after the portrait; None for a silent video.
    - steps: denoising steps of a window.
    - stop: returns whether the run must end; called before each step.
    - remedy: what to try if a window's numbers are not finite, for the error.
    - watch: called after each step.
    """

    def __init__(
        self,
        video: BlockVideo,
        audio: np.ndarray | None,
        steps: int,
        recorder: Recorder,
        convert: Callable[[Tensor], np.ndarray] = to_uint8,
        retry: Retry = no_retry,
        arrival: Callable[[torch.device], Callable[[], None]] = arrival,
        stop: Callable[[], bool] | None = None,
        remedy: str = "check the weight files",
        watch: WatchStep | None = None,
    ) -> None:
        self._video, self._audio, self._steps, self._recorder = video, audio, steps, recorder
        self._convert, self._retry, self._arrival = convert, retry, arrival
        self._stop, self._remedy, self._watch = stop, remedy, watch

    def run(
        self,
        windows: Sequence[Window],
        first: int = 0,
        past: Past | None = None,
        shown: Shown | None = None,
    ) -> Iterator[WindowResult]:
        """Yield the results of `windows[first:]`.

        - past: latents of the blocks that `sampling.causal.BlockHandOvers` names; None if `first` is 0.

        - shown: what the pictures before window `first` left, as a result's `shown`.

        Raises StoppedError, and on the CPU NumbersError; elsewhere reading a result raises that.
        """
        try:
            if first:
                assert past is not None
                with self._recorder.stage("replay"):
                    self._retry(lambda: self._go_on(windows, first, past, shown))
            for window in windows[first:]:
                self._recorder.event(WindowStarted(window=window.index, windows=len(windows)))
                yield self._result(window, len(windows))
        finally:
            self._video.close()

    def _go_on(self, windows: Sequence[Window], first: int, past: Past, shown: Shown | None) -> None:
        self._video.go_on_after(past, first, lambda block: self._rows(windows[block]), shown)

    def _result(self, window: Window, count: int) -> WindowResult:
        started, device = time.perf_counter(), self._video.device
        where = f"window {window.index + 1} of {count}"
        numbers = WindowNumbers(where, self._remedy, device)
        with self._recorder.stage("denoise"):
            latent = self._retry(lambda: self._make(window, where))
            numbers.add("latents", latent)
        with self._recorder.stage("vae_decode"):
            frames = self._retry(lambda: self._decode(latent, window, numbers))
        last = window.index + 1 == count
        handed_over = None if last else download(latent)
        shown = self._video.shown.download() if not last and self._video.shown.tensors() else None
        numbers.send()
        wait = partial(_arrived, self._arrival(device), numbers)
        return WindowResult(window, latent, frames, handed_over, wait, started, shown)

    def _rows(self, window: Window) -> Tensor | None:
        """Audio vectors (1, n, D) of a window on the device; zeros for a silent video."""
        video = self._video
        if not video.audio_width:
            return None
        if self._audio is None:
            return torch.zeros(1, window.length, video.audio_width, device=video.device)
        return upload(audio_slice(self._audio, window), video.device)

    def _make(self, window: Window, where: str) -> Tensor:
        def before_step(step: int) -> None:
            if self._stop is not None:
                end_if(self._stop(), f"before step {step + 1} of {self._steps} of {where}")

        def on_step(step: int, sample: Tensor) -> None:
            self._recorder.event(
                StepFinished(window=window.index, step=step, steps=self._steps, action="compute", passes=1)
            )
            if self._watch is not None:
                self._watch(window, step, sample)

        return self._video.make(self._rows(window), on_step, before_step)

    @torch.inference_mode()
    def _decode(self, latent: Tensor, window: Window, numbers: WindowNumbers) -> list[np.ndarray]:
        """The window's frames, without those after the video's end."""
        frames: list[np.ndarray] = []
        left = window.new_frames
        for piece in self._video.decode(latent, numbers):
            frames.append(self._convert(piece[:, :, :left]))
            left -= piece.shape[2]
            if left <= 0 and window.new_frames < window.length:
                break
        return frames


def _arrived(wait: Callable[[], None], numbers: WindowNumbers) -> None:
    wait()
    numbers.check()
