"""A long video as a sequence of overlapping windows, in integer arithmetic.

Video frame 0 is the portrait; video frame f >= 1 takes audio row f-1. Window k starts at frame k*(L -
overlap), so its first `overlap` frames are the last ones of window k-1; window 0 is given only the portrait
frame. Every window is denoised at full length L; surplus frames of the last one are cut.
Source: OmniAvatar's inference loop (described in its paper, arXiv 2506.18866, section on long videos).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Protocol

from omniavatar.errors import ConfigError
from omniavatar.types import Window

TOKEN_PIXELS = 1024
KEPT = 16
"""Windows that a damaged job can go back by."""


class HandOvers(Protocol):
    """Which hand-over files of a job a window starts from, and which are kept.

    File number k holds what window k-1 left for later ones.
    """

    def needed(self, window: int) -> Sequence[int]:
        """Numbers of the files that window number `window`, above 0, starts from."""
        ...

    def outdated(self, done: int) -> int | None:
        """Number of the file that goes when `done` windows are done; None if all stay."""
        ...


class WindowHandOvers:
    """A window starts from one file. The last `KEPT` stay, and every 16th of those before.

    anchor_every: every window of such a number starts from the portrait, so from no file; 0 for none.
    """

    def __init__(self, anchor_every: int = 0) -> None:
        self._anchor_every = anchor_every

    def needed(self, window: int) -> Sequence[int]:
        return () if is_anchor(window, self._anchor_every) else (window,)

    def outdated(self, done: int) -> int | None:
        old = done - KEPT
        return old if old > 0 and old % KEPT else None


def frames_for(samples: int, fps: float | Fraction, sample_rate: int = 16000) -> int:
    """Video frames for the duration of `samples`, rounded up, in exact arithmetic.

    The original divides floats, which gives one frame too many for some lengths.
    """
    exact = Fraction(samples) * Fraction(fps) / sample_rate
    return -(-exact.numerator // exact.denominator)


def window_length(max_tokens: int, height: int, width: int) -> int:
    """Frames of a window, 1+4n, that `max_tokens` allow (a token covers 1024 pixels of all frames)."""
    length = max_tokens * TOKEN_PIXELS // (height * width)
    length = length // 4 * 4 + 1 if length % 4 else length - 3
    if length < 5:
        raise ConfigError(
            f"max_tokens={max_tokens} leaves {max(length, 0)} frames a window at {height}x{width}; "
            f"raise it to at least {-(-6 * height * width // TOKEN_PIXELS)} or choose a smaller size"
        )
    return length


def overlap_error(overlap: int, length: int) -> str | None:
    """What is wrong with an overlap for windows of `length` frames; None if it is valid."""
    if overlap % 4 != 1 or overlap < 1:
        nearest = max(1, round((overlap - 1) / 4) * 4 + 1)
        return f"must be 1 + 4n (1, 5, 9, 13, ...), the nearest is {nearest}"
    return "must be smaller than the window; lower it or raise max_tokens" if overlap >= length else None


def count_windows(audio_frames: int, length: int, overlap: int) -> int:
    """Number of windows for `audio_frames` (frames after the portrait)."""
    return 1 + -(-max(0, audio_frames - (length - 1)) // (length - overlap))


def padded_audio_frames(windows: int, length: int, overlap: int) -> int:
    """Number of audio rows that fill the windows completely."""
    return length - 1 + (windows - 1) * (length - overlap)


def plan_windows(audio_frames: int, length: int, overlap: int, begun: int = 0) -> tuple[Window, ...]:
    """Windows that cover the portrait frame and `audio_frames` frames after it.

    begun: frames that are there already. They are window 0, and the others follow it.

    Raises ConfigError unless length and overlap are 1+4n and overlap < length.
    """
    if length % 4 != 1:
        raise ConfigError(
            f"overlap_frame={overlap}, window of {length} frames: windows must have 1 + 4n frames"
        )
    if error := overlap_error(overlap, length):
        raise ConfigError(f"overlap_frame={overlap}: {error}; windows have {length} frames")
    total = audio_frames + 1
    if begun:
        return _windows_after(begun, total, length, overlap)
    windows = []
    for index in range(count_windows(audio_frames, length, overlap)):
        start = index * (length - overlap)
        given = 1 if index == 0 else overlap
        first_new = start if index == 0 else start + overlap
        new = min(start + length, total) - first_new
        windows.append(Window(index, start, length, given, new))
    return tuple(windows)


def plan_blocks(audio_frames: int, latents: int) -> tuple[Window, ...]:
    """Blocks of `latents` latents of a block-causal video, as windows that do not overlap.

    They cover the portrait frame and `audio_frames` frames after it. A latent stands for four frames, the
    first one for the portrait alone. The last block is made whole; its surplus frames are cut.
    """
    windows: list[Window] = []
    start = 0
    while start <= audio_frames:
        index = len(windows)
        length = block_frames(index, latents)
        new = min(length, audio_frames + 1 - start)
        windows.append(Window(index, start, length, given_frames=0 if index else 1, new_frames=new))
        start += length
    return tuple(windows)


def block_frames(block: int, latents: int) -> int:
    """Frames of block number `block`."""
    return 4 * latents - (0 if block else 3)


def is_anchor(index: int, every: int) -> bool:
    """Whether window number `index` starts from the portrait again; `every` 0: none does but window 0."""
    return every > 0 and index > 0 and index % every == 0


def anchor(window: Window, every: int) -> Window:
    """`window`; every `every`-th starts from the portrait again, as window 0 does; 0: none.

    Such a window lies where it lay and shows the same frames. It makes the frames that it shares with the
    window before from the portrait, and hides them: there the head comes from the portrait's pose to speech.
    """
    if not is_anchor(window.index, every):
        return window
    return replace(window, given_frames=1, hidden_frames=window.skipped_frames, anchored=True)


def anchored(windows: Iterable[Window], every: int) -> tuple[Window, ...]:
    """`windows`, each as of `anchor`."""
    return tuple(anchor(each, every) for each in windows)


def frames_encoded(following: Window | None, hand_over: str) -> int:
    """Frames that a window encodes for the one that follows it; `hand_over` is the setting."""
    if following is None or following.anchored or hand_over == "latents":
        return 0
    return 1 if hand_over == "clean" else following.given_frames


def _windows_after(begun: int, total: int, length: int, overlap: int) -> tuple[Window, ...]:
    """The frames that are there as one window, then as many as `total` frames need; each has the overlap."""
    windows = [Window(0, 0, begun, 1, begun)]
    while (done := windows[-1].first_new_frame + windows[-1].new_frames) < total:
        new = min(length - overlap, total - done)
        windows.append(Window(len(windows), done - overlap, length, overlap, new))
    return tuple(windows)
