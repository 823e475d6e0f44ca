"""Compares a finished video with its plan, by decoding it from end to end.

Every packet of picture and sound goes through its decoder, and a damaged one is an error. A minute of 400x720
takes 2.5 s of CPU time, shared by all cores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import av.container
import av.error

from omniavatar.errors import OutputError
from omniavatar.media.open_file import own_video

AAC_FRAME = 1024
"""Samples of an AAC frame, the tolerance of the sound."""

_STRICT = {"err_detect": "explode"}


@dataclass
class _Seen:
    """What the decoders gave so far; times in seconds."""

    frames: int = 0
    misplaced: tuple[int, Fraction] | None = None
    samples: int = 0
    sound_start: Fraction | None = None
    sound_end: Fraction = field(default_factory=Fraction)


def check_video(
    path: str | Path,
    frames: int,
    fps: Fraction | int,
    audio_seconds: Fraction | float | None,
    *,
    output: str | Path | None = None,
) -> None:
    """Raise OutputError unless the MP4 at `path` decodes whole and is what was planned.

    - frames: number of frames; frame i must be shown at i / fps, within half a frame.
    - audio_seconds: duration of the sound, within one AAC frame; None for a silent video.
    - output: the video's name in the message, if `path` is a temporary file.
    """
    problem = _problem(Path(path), frames, Fraction(fps), audio_seconds)
    if problem:
        raise OutputError(
            f"{output or path}: the finished video {problem}; run the same command again, "
            "and check the disk if this comes back"
        )


def _problem(path: Path, frames: int, fps: Fraction, audio_seconds: Fraction | float | None) -> str:
    """How the file differs from its plan; empty if it does not."""
    seen = _Seen()
    try:
        with own_video(path) as container:
            pictures, sounds = container.streams.video, container.streams.audio
            expected = 0 if audio_seconds is None else 1
            if len(pictures) != 1 or len(sounds) != expected:
                return (
                    f"has {len(pictures)} picture and {len(sounds)} sound tracks instead of 1 and {expected}"
                )
            _decode(container, fps, seen)
            rate = sounds[0].rate if sounds else 1
    except (av.error.FFmpegError, OSError) as error:
        second = float(seen.frames / fps)
        return f"cannot be decoded after {seen.frames} frames, {second:.2f} s ({error.strerror})"
    if seen.frames != frames:
        return f"has {seen.frames} frames instead of {frames}"
    if seen.misplaced is not None:
        number, time = seen.misplaced
        return f"shows frame {number} at {float(time):.3f} s instead of {float(number / fps):.3f} s"
    if audio_seconds is None:
        return ""
    return _sound_problem(seen, rate, audio_seconds)


def _decode(container: av.container.InputContainer, fps: Fraction, seen: _Seen) -> None:
    """Decode all packets in the order of the file."""
    video = container.streams.video[0]
    video.thread_type = "AUTO"
    video.codec_context.options = _STRICT
    for stream in container.streams.audio:
        stream.codec_context.options = _STRICT
    for packet in container.demux(video, *container.streams.audio):
        for frame in packet.decode():
            if isinstance(frame, av.VideoFrame | av.AudioFrame):
                _count(frame, fps, seen)


def _count(frame: av.VideoFrame | av.AudioFrame, fps: Fraction, seen: _Seen) -> None:
    if frame.pts is None or frame.time_base is None or frame.is_corrupt:
        raise av.error.InvalidDataError(0, "a damaged frame")
    time = frame.pts * frame.time_base
    if isinstance(frame, av.VideoFrame):
        if seen.misplaced is None and abs(time - seen.frames / fps) > 1 / (2 * fps):
            seen.misplaced = (seen.frames, time)
        seen.frames += 1
    else:
        seen.samples += frame.samples
        seen.sound_start = time if seen.sound_start is None else seen.sound_start
        seen.sound_end = time + Fraction(frame.samples, frame.sample_rate)


def _sound_problem(seen: _Seen, rate: int, audio_seconds: Fraction | float) -> str:
    tolerance = Fraction(AAC_FRAME, rate)
    planned = Fraction(audio_seconds)
    heard = Fraction(seen.samples, rate)
    if abs(heard - planned) > tolerance or abs(seen.sound_end - planned) > tolerance:
        found = f"{float(heard):.3f} s of sound that end at {float(seen.sound_end):.3f} s"
        return f"has {found} instead of {float(planned):.3f} s"
    if seen.sound_start is None or abs(seen.sound_start) > tolerance:
        return f"starts its sound at {float(seen.sound_start or 0):.3f} s instead of 0 s"
    return ""
