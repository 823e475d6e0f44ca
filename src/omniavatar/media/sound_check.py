"""Notices what is wrong with a sound while its blocks pass: silence, channels that cancel, clipping, gaps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from omniavatar.media.timeline import TimeLine

SILENT_PEAK = 1e-3
"""-60 dB of full scale. Dithered silence of 16 bits has 3e-5, whispered speech some hundredths."""
_CANCELS = 0.1
"""The energy of uncorrelated channels' mean is 1/n of a channel's. Below a tenth of that, they cancel."""
_CANCELLED_SHARE = 0.1
_WINDOW_S = 0.25
_CLIPPED_AT, _CLIPPED_SHARE = 0.999, 0.002
_OVER_FULL_SCALE = 1.26  # 2 dB; lossy codecs overshoot by less
_SHORTEST_NOTE_S = 0.1


class SoundCheck:
    """Passes blocks (channels, samples) on and collects what `notes` reports."""

    def __init__(self, rate: int, channels: int) -> None:
        self.samples = 0
        self._channels, self._window = channels, round(rate * _WINDOW_S)
        self._peak = self._mean_peak = 0.0
        self._clipped = 0
        self._energies = np.zeros(channels)
        self._window_energies, self._window_mean, self._window_samples = np.zeros(channels), 0.0, 0
        self._windows: list[tuple[float, float]] = []

    def watched(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same blocks, each checked."""
        for block in blocks:
            for start in range(0, block.shape[1], self._window):
                self._add(block[:, start : start + self._window])
            yield block
        self._end_window()

    @property
    def loudest_channel(self) -> int | None:
        """The channel to use instead of the mean of all, or None if the mean does not cancel.

        Speech is lost where the mean cancels, so a tenth of the time with sound is enough.
        """
        if self._channels < 2 or not self._windows:
            return None
        energies = np.array(self._windows)
        sounding = energies[energies[:, 0] > max(SILENT_PEAK**2 / 100, 1e-4 * energies[:, 0].max())]
        cancelled = sounding[:, 1] < _CANCELS / self._channels * sounding[:, 0]
        if not len(sounding) or cancelled.mean() < _CANCELLED_SHARE:
            return None
        return int(self._energies.argmax())

    def notes(self, time_lines: Iterable[TimeLine] = ()) -> tuple[str, ...]:
        """One sentence for each thing that the user should know."""
        found = []
        channel = self.loudest_channel
        if channel is not None:
            found.append(
                "the channels cancel each other (one is the other inverted), so the mouth follows "
                f"channel {channel + 1} alone; repair the recording if that is not the voice"
            )
        elif self._mean_peak < SILENT_PEAK:
            level = f" (at most {20 * math.log10(self._mean_peak):.0f} dB)" if self._mean_peak else ""
            found.append(f"it is silent{level}, so the mouth stays shut; check that it is the right file")
        clipped = self._clipped / max(1, self.samples * self._channels)
        if clipped > _CLIPPED_SHARE:
            found.append(f"{clipped:.1%} of it is clipped; a recording with a lower level gives better lips")
        if self._peak > _OVER_FULL_SCALE:
            found.append(f"it reaches {self._peak:.1f} times full scale and clips in the video; lower it")
        found += _time_notes(list(time_lines))
        return tuple(f"audio: {text}" for text in found)

    def _add(self, block: np.ndarray) -> None:
        self.samples += block.shape[1]
        peak = float(np.abs(block).max())
        self._peak = max(self._peak, peak)
        mean = block.mean(axis=0, dtype=np.float32) if self._channels > 1 else block[0]
        self._mean_peak = max(self._mean_peak, float(np.abs(mean).max()))
        if peak >= _CLIPPED_AT:
            full = np.abs(block) >= _CLIPPED_AT
            self._clipped += int((full[:, 2:] & full[:, 1:-1] & full[:, :-2]).sum())
        if self._channels > 1:
            energies = np.square(block, dtype=np.float64).sum(axis=1)
            self._energies += energies
            self._window_energies += energies
            self._window_mean += float(np.square(mean, dtype=np.float64).sum())
            self._window_samples += block.shape[1]
            if self._window_samples >= self._window:
                self._end_window()

    def _end_window(self) -> None:
        if self._window_samples:
            energy = float(self._window_energies.mean()) / self._window_samples
            self._windows.append((energy, self._window_mean / self._window_samples))
        self._window_energies, self._window_mean, self._window_samples = np.zeros(self._channels), 0.0, 0


def _time_notes(time_lines: list[TimeLine]) -> list[str]:
    found = []
    late = time_lines[0].late if time_lines else 0.0
    gaps = sum(line.gaps for line in time_lines) + sum(line.late for line in time_lines[1:])
    jumps = sum(line.jumps for line in time_lines)
    if late > _SHORTEST_NOTE_S:
        found.append(f"its sound starts at {late:.2f} s of the file; there is silence until then")
    if gaps > _SHORTEST_NOTE_S:
        found.append(f"{gaps:.2f} s without sound between its time stamps are silence")
    if jumps:
        found.append(f"its time stamps jump {jumps} times; the sound goes on without a pause there")
    return found
