"""Decodes one part of a sound file, packet by packet, onto its time line."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import av.error
import numpy as np

from omniavatar.errors import InputError
from omniavatar.media.containers import promises_length
from omniavatar.media.edits import Edit, track_edits
from omniavatar.media.open_file import MediaFile, Stopwatch
from omniavatar.media.resample import silence
from omniavatar.media.timeline import TimeLine

MAX_HOURS = 12
_EXACT_S = 0.0015

_TAGS = (b"ID3", b"TAG", b"APE")  # between the parts of MP3 files joined end to end

_log = logging.getLogger(__name__)


def too_long(name: str, seconds: float) -> InputError:
    """The error for a sound that is longer than the limit."""
    return InputError(
        f"{name} lasts at least {seconds / 3600:.1f} hours, and {MAX_HOURS} is the limit; cut it into parts"
    )


@dataclass(frozen=True)
class PartReader:
    """An opened part with its first audio stream; iterate over it once for float32 (channels, samples)."""

    source: MediaFile
    container: av.container.InputContainer
    stream: av.AudioStream
    time_line: TimeLine
    watch: Stopwatch
    edits: tuple[Edit, ...] = ()

    @classmethod
    def of(
        cls, source: MediaFile, container: av.container.InputContainer, watch: Stopwatch, offset: int
    ) -> PartReader:
        """A reader of the first audio stream. Raises InputError if no sound can be decoded.

        offset: of the part in the file.
        """
        if not container.streams.audio:
            raise InputError(f"{source.name} has no sound in it; give a file with an audio stream")
        stream = container.streams.audio[0]
        context = stream.codec_context
        if context is None or not context.sample_rate or not context.channels:
            raise InputError(
                f"{source.name} has sound in a format FFmpeg cannot decode; convert it to WAV or MP3"
            )
        start = container.start_time
        first = None if start is None else start / av.time_base
        time_line = TimeLine.of(container.format.name, context.sample_rate, first)
        edits: list[Edit] = []
        if container.format.name.startswith("mov"):
            edits = track_edits(source.file, offset, source.size, stream.id)
        while edits and edits[0].empty:  # FFmpeg follows these
            edits = edits[1:]
        # One edit only trims the ends, as FFmpeg does.
        return cls(source, container, stream, time_line, watch, tuple(edits) if len(edits) > 1 else ())

    def __iter__(self) -> Iterator[np.ndarray]:
        name, time_line, rate = self.source.name, self.time_line, self.stream.codec_context.sample_rate
        channels = self.stream.codec_context.channels
        declared = self._declared_seconds()
        if declared is not None and declared > MAX_HOURS * 3600:
            raise too_long(name, float(declared))
        padded = declared is not None and self.container.format.name.startswith("mov")
        last: deque[np.ndarray] = deque()  # what may be padding: a little more than two frames
        longest = 0
        failed_at: int | None = None
        interleave = av.AudioResampler(format="flt")
        for frame in self._decoded_frames():
            position = time_line.position
            if frame is None:
                if position and failed_at is not None:
                    raise self._breaks_off(failed_at / rate, declared)
                failed_at = position
                continue
            if failed_at:
                raise self._breaks_off(failed_at / rate, declared)
            if frame.sample_rate != rate or len(frame.layout.channels) != channels:
                raise InputError(f"{name} changes its rate or channels midway; convert it to WAV first")
            stamp = (
                None if frame.pts is None or frame.time_base is None else float(frame.pts * frame.time_base)
            )
            if self.edits and stamp is not None:
                self._cut_at_edit(last, stamp)
                position = time_line.position
            missing = time_line.silence_before(stamp)
            if position + missing > MAX_HOURS * 3600 * rate:
                raise too_long(name, (position + missing) / rate)
            if missing:
                yield from last
                last.clear()
                yield from silence(channels, missing)
                time_line.add(missing)
            # PyAV 18.1 reads past the planes of a planar frame of 8 channels, and reads no 64-bit integers.
            unreadable = frame.format.name in ("s64", "s64p") or (frame.format.is_planar and channels >= 8)
            packed = interleave.resample(frame) if unreadable else [frame]
            block = np.concatenate([to_float(part) for part in packed], axis=1)
            if stamp is not None and any(
                edit.empty and edit.start - _EXACT_S < stamp < edit.end for edit in self.edits
            ):
                block = np.zeros_like(block)
            time_line.add(block.shape[1])
            self.watch.allowed += block.shape[1] / rate
            if not padded:
                yield block
                continue
            longest = max(longest, block.shape[1])
            last.append(block)
            while sum(held.shape[1] for held in last) - last[0].shape[1] > 2 * longest:
                yield last.popleft()
        if declared is not None and padded:
            self._cut_padding(last, declared, 2 * longest)
        yield from last
        self._check_end(declared, failed_at)

    def _cut_padding(self, last: deque[np.ndarray], declared: Fraction, most: int) -> None:
        """Remove the padding of the last AAC frames from `last`: what exceeds the stated length a little."""
        rate = self.time_line.rate
        excess = self.time_line.position - round((declared + Fraction(self.time_line.late)) * rate)
        if 0 < excess <= most:
            self._cut(last, excess)

    def _cut_at_edit(self, last: deque[np.ndarray], stamp: float) -> None:
        """Remove what the last frame has beyond the end of its edit, if the next edit starts at `stamp`."""
        for edit in self.edits:
            if abs(edit.end - stamp) < _EXACT_S:
                excess = self.time_line.position - round((stamp - self.time_line.zero) * self.time_line.rate)
                self._cut(last, max(0, excess))

    def _cut(self, last: deque[np.ndarray], samples: int) -> None:
        """Remove samples from the end of the held blocks."""
        while samples and last:
            block = last.pop()
            removed = min(samples, block.shape[1])
            samples -= removed
            self.time_line.add(-removed)
            if removed < block.shape[1]:
                last.append(block[:, : block.shape[1] - removed])

    def _check_end(self, declared: Fraction | None, failed_at: int | None) -> None:
        seconds = self.time_line.position / self.time_line.rate
        if declared is not None and declared - seconds > max(0.1, 0.005 * declared):
            raise self._breaks_off(seconds, declared)
        if failed_at is not None:
            at = failed_at / self.time_line.rate
            _log.warning(
                "%s: the packet at %.2f s could not be decoded and is left out", self.source.name, at
            )

    def _breaks_off(self, at: float, declared: Fraction | None) -> InputError:
        promised = "" if declared is None else f" of {float(declared):.2f} s"
        return InputError(
            f"{self.source.name} is damaged or truncated at {at:.2f} s{promised}; export or download it again"
        )

    def _declared_seconds(self) -> Fraction | None:
        """Length that the container states for this stream, or None if it is only estimated."""
        if self.edits:
            return Fraction(self.edits[-1].end - self.edits[0].start)
        if not promises_length(self.source.file, self.container.format.name):
            return None
        if self.stream.duration is not None and self.stream.time_base is not None:
            return self.stream.duration * self.stream.time_base
        if self.container.duration is not None and len(self.container.streams) == 1:
            # This duration counts from zero, not from the first stamp.
            return Fraction(self.container.duration, av.time_base) - Fraction(self.time_line.zero)
        return None

    def _decoded_frames(self) -> Iterator[av.AudioFrame | None]:
        """Decoded frames in order; None for a packet that could not be decoded or read."""
        packets = self.container.demux(self.stream)
        while True:
            try:
                with self.watch:
                    packet = next(packets)
            except StopIteration:
                return
            except IndexError:
                # PyAV 18.1 has flushed this stream and fails at one that appeared later, as MPEG-TS allows.
                return
            except av.error.FFmpegError:
                yield None
                return
            self.watch.check()
            try:
                with self.watch:
                    frames = packet.decode()
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                if bytes(packet)[:3] not in _TAGS:
                    yield None
                continue
            yield from frames


def to_float(frame: av.AudioFrame) -> np.ndarray:
    """(channels, samples) float32; full scale of integers becomes [-1, 1)."""
    data: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, len(frame.layout.channels)).T
    if np.issubdtype(data.dtype, np.floating):
        return np.ascontiguousarray(data, dtype=np.float32)
    if data.dtype == np.uint8:
        return (data.astype(np.float32) - 128.0) / 128.0
    return np.ascontiguousarray((data / -float(np.iinfo(data.dtype).min)).astype(np.float32))
