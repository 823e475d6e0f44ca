"""The growing video: closed segments, and one playable file made of them.

A finished denoising window becomes one closed H.264 segment file (`encode_segment`). `GrowingVideo` copies
the segments unchanged into one fragmented MP4, which is complete on disk after every `append`. After `kill
-9`, even during an append, it plays up to the last complete append, in browsers too. `finish` copies the file
into an ordinary MP4 (index in front, so that it starts at once over a network) and renames it to its final
name. A resumed run appends the same segments again and ends with the same bytes.

How a fragment is made: FFmpeg's muxer writes each append into memory with `frag_discont`; timestamps continue
those of the last append. Only its `moof` and `mdat` boxes are added to the file. The first append also writes
the index, whose edit lists state where picture and sound start. H.264 packets get decode times of (number in
decode order - 2) frames. That fits every x264 reorder depth (at most 2; NVENC reorders nothing), so they rise
evenly over segments of any length.

Colour: yuv420p, BT.709 matrix, primaries and transfer, limited range, with matching tags.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import cast

import av
import av.error
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from omniavatar.errors import ResumeError
from omniavatar.media.atomic import atomic_path, atomic_write_bytes, translate_os_error
from omniavatar.media.h264 import ENCODERS, encoder_options
from omniavatar.media.open_file import new_media, own_video

_REORDER = 2
_SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
_BT709 = 1


def encode_segment(
    frames: Iterable[np.ndarray],
    path: str | Path,
    fps: Fraction,
    size: tuple[int, int],
    crf: float = 18,
    preset: str = "medium",
    threads: int = 1,
    encoder: str = "x264",
) -> int:
    """Encode blocks of frames (n, H, W, 3) uint8 RGB as one closed H.264 file; return the number of frames.

    - size: (H, W), both even.
    - threads: of x264.
    - encoder: a name of `media.h264.ENCODERS`.

    `path` is written completely or not at all. The same frames, settings and threads give the same bytes. It
    is safe to call from any thread. The encoded segment is in memory until it is written (some MB a window).
    Raises OutputError, and ConfigError for a bad crf or preset.
    """
    pictures = (yuv_picture(rgb) for rgb in rgb_frames(frames, size))
    data, count = encoded_file(pictures, fps, size, encoder_options(encoder, crf, preset), threads, encoder)
    atomic_write_bytes(path, data)
    return count


def encoded_file(
    pictures: Iterable[av.VideoFrame],
    fps: Fraction,
    size: tuple[int, int],
    options: dict[str, str],
    threads: int,
    encoder: str = "x264",
) -> tuple[bytes, int]:
    """The bytes of a closed H.264 file of yuv420p pictures, and their number."""
    buffer = io.BytesIO()
    count = 0
    with new_media(buffer) as container:
        stream = h264_stream(container, fps, size, options, threads, encoder)
        for picture in pictures:
            picture.pts, picture.time_base = count, 1 / fps
            container.mux(stream.encode(picture))
            count += 1
        if not count:
            raise ValueError("a segment needs at least one frame")
        container.mux(stream.encode(None))
    return buffer.getvalue(), count


def rgb_frames(blocks: Iterable[np.ndarray], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The single frames of blocks (n, H, W, 3) uint8. Raises ValueError for another size than (H, W)."""
    height, width = size
    if height % 2 or width % 2:
        raise ValueError(f"H.264 in yuv420p needs even sizes, not {width}x{height}")
    for block in blocks:
        if block.dtype != np.uint8 or block.shape[1:] != (height, width, 3):
            raise ValueError(f"frames are {block.dtype} {block.shape}, not uint8 (n, {height}, {width}, 3)")
        yield from block


def h264_stream(
    container: av.container.OutputContainer,
    fps: Fraction,
    size: tuple[int, int],
    options: dict[str, str],
    threads: int,
    encoder: str = "x264",
) -> av.VideoStream:
    """A new stream of `container` with an encoder of these settings."""
    backend = ENCODERS.get(encoder)
    stream = cast(av.VideoStream, container.add_stream(backend.codec, rate=fps))
    set_up(stream.codec_context, fps, size, options, threads if backend.threads else None)
    return stream


def set_up(
    context: av.VideoCodecContext,
    fps: Fraction,
    size: tuple[int, int],
    options: dict[str, str],
    threads: int | None,
) -> None:
    """Give an encoder its size (H, W), rate, colours and options; threads None: it has its own."""
    context.height, context.width = size
    context.pix_fmt, context.time_base = "yuv420p", 1 / fps
    if threads is not None:
        context.thread_count = threads
    tag_colours(context)
    context.options = options


def tag_colours(context: av.VideoCodecContext) -> None:
    """Tag an encoder's output as what `yuv_picture` gives."""
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    context.color_range = ColorRange.MPEG


def yuv_picture(rgb: np.ndarray) -> av.VideoFrame:
    """A frame (H, W, 3) uint8 RGB in yuv420p, tagged BT.709 and limited range."""
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=_SCALER,
        threads=1,
    )
    picture.colorspace = Colorspace.ITU709
    picture.color_range = ColorRange.MPEG
    return picture


class GrowingVideo:
    """One video file that grows by segments and is always playable. Use it as a context manager.

    - partial: the growing file; an existing one is replaced.
    - final: the path of the ordinary MP4 that `finish` writes.
    - audio_track: a track of `media.audio.encode_aac_track`, or None for a silent video. Each append adds the
      sound up to its last frame.
    - comment: in the index of the growing file; the finished one does not have it.

    Leaving the block without `finish` keeps the partial file.
    """

    def __init__(
        self,
        partial: str | Path,
        final: str | Path,
        fps: Fraction,
        audio_track: str | Path | None = None,
        comment: str = "",
    ) -> None:
        self.partial, self.final, self.fps = Path(partial), Path(final), Fraction(fps)
        self.frames = 0
        self._appends, self._comment = 0, comment
        self._parameters: tuple[int, int, bytes] | None = None
        self._open = ExitStack()
        with translate_os_error(self.partial):
            self._file = self._open.enter_context(self.partial.open("wb", buffering=0))
        self._sound = _SoundTrack(Path(audio_track), self._open) if audio_track is not None else None

    def __enter__(self) -> GrowingVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; the partial file is kept."""
        with suppress(OSError):  # append has already reported failed writes
            self._open.close()

    def append(self, segment: str | Path) -> int:
        """Add a segment and the sound up to its end, flush the file, and return the frames so far.

        Raises OutputError (the partial file is cut back to its length before), and ResumeError if the segment
        is damaged or was encoded with other settings.
        """
        segment = Path(segment)
        buffer = io.BytesIO()
        try:
            with own_video(segment) as source:
                added = self._write_fragment(buffer, source, segment)
        except (av.error.FFmpegError, OSError) as error:
            raise ResumeError(
                f"{segment} is damaged ({error.strerror}); delete it, or run again without resuming"
            ) from error
        data = buffer.getvalue()
        kept = ("moof", "mdat") if self._appends else ("ftyp", "moov", "moof", "mdat")
        self._commit([box for box in mp4_boxes(data) if box[0] in kept])
        self._appends += 1
        self.frames += added
        return self.frames

    def _commit(self, boxes: list[tuple[str, bytes]]) -> None:
        """Write the boxes with `moof` renamed to `free`, flush, then rename it back by four bytes.

        Players skip a `free` box even if it is cut, but FFmpeg refuses a file that ends in half a `moof`.
        """
        kinds = [kind for kind, _ in boxes]
        data = bytearray(b"".join(box for _, box in boxes))
        name_at = sum(len(box) for _, box in boxes[: kinds.index("moof")]) + 4
        data[name_at : name_at + 4] = b"free"
        before = self._file.seek(0, os.SEEK_END)
        with translate_os_error(self.partial):
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
                self._file.seek(before + name_at)
                self._file.write(b"moof")
                os.fsync(self._file.fileno())
            except OSError:
                with suppress(OSError):
                    os.truncate(self.partial, before)
                raise

    def finish(self, check: Callable[[Path], None] = lambda path: None, folder: Path | None = None) -> Path:
        """Copy the partial file into an ordinary MP4 at the final path, and remove it.

        check: called with the complete file before it gets its name; its errors end the call.
        folder: holds the file until then (default: the folder of the final path).

        Raises OutputError; then the partial file and the segments are kept, and the final path is unchanged.
        """
        if not self.frames:
            raise ValueError("a video needs at least one segment")
        if self._sound is not None and not self._sound.exhausted:
            raise ValueError(f"the sound continues after the last of {self.frames} frames")
        self.close()
        with atomic_path(self.final, folder) as temporary:
            with (
                own_video(self.partial) as source,
                new_media(temporary, {"movflags": "+faststart"}) as target,
            ):
                streams = [target.add_stream_from_template(stream) for stream in source.streams]
                for packet in source.demux():
                    if packet.size:
                        packet.stream = streams[packet.stream.index]
                        target.mux(packet)
            check(temporary)
        self.partial.unlink()
        return self.final

    def _write_fragment(self, buffer: io.BytesIO, source: av.container.InputContainer, segment: Path) -> int:
        first = not self._appends
        video_in = source.streams.video[0]
        self._check_same_encoding(video_in, segment)
        options = {
            "movflags": "+frag_custom+default_base_moof+delay_moov+skip_trailer"
            + ("" if first else "+frag_discont"),
            "fragment_index": str(self._appends + 1),
        }
        if not first:
            options |= {"use_editlist": "0", "avoid_negative_ts": "disabled"}
        with new_media(buffer, options) as target:
            if first and self._comment:
                target.metadata["comment"] = self._comment
            video_out = target.add_stream_from_template(video_in)
            sound_out = None if self._sound is None else target.add_stream_from_template(self._sound.stream)
            # The first fragment starts before zero, as its edit list states; later ones count from there.
            added = self._copy_picture(source, video_in, target, video_out, 0 if first else _REORDER)
            if self._sound is not None and sound_out is not None:
                end = (self.frames + added) / self.fps
                self._sound.copy_until(end, target, sound_out, 0 if first else self._sound.priming)
        return added

    def _copy_picture(
        self,
        source: av.container.InputContainer,
        video_in: av.VideoStream,
        target: av.container.OutputContainer,
        video_out: av.VideoStream,
        lead: int,
    ) -> int:
        """Copy all packets, numbered from `self.frames`, `lead` frames later; return their number."""
        count = 0
        for packet in source.demux(video_in):
            if packet.pts is None:
                continue
            shown = round(packet.pts * packet.time_base * self.fps)
            packet.stream, packet.time_base, packet.duration = video_out, 1 / self.fps, 1
            packet.pts = self.frames + shown + lead
            packet.dts = self.frames + count - _REORDER + lead
            target.mux(packet)
            count += 1
        return count

    def _check_same_encoding(self, stream: av.VideoStream, segment: Path) -> None:
        if stream.average_rate != self.fps:
            raise ResumeError(
                f"{segment} has {stream.average_rate} frames a second, not {self.fps}; "
                "delete it, or run again without resuming"
            )
        parameters = (stream.width, stream.height, bytes(stream.codec_context.extradata or b""))
        if self._parameters is None:
            self._parameters = parameters
        if parameters != self._parameters:
            raise ResumeError(
                f"{segment} was encoded with another size or settings than the segments before it; "
                "delete it, or run again without resuming"
            )


class _SoundTrack:
    """Packets of an encoded track, copied in step with the picture."""

    def __init__(self, path: Path, closing: ExitStack) -> None:
        container = closing.enter_context(own_video(path))
        self.stream = container.streams.audio[0]
        self._packets = (
            (packet.pts, packet) for packet in container.demux(self.stream) if packet.pts is not None
        )
        self._next = next(self._packets, None)
        self.priming = 0 if self._next is None else -self._next[0]

    @property
    def exhausted(self) -> bool:
        return self._next is None

    def copy_until(
        self, end: Fraction, target: av.container.OutputContainer, out: av.AudioStream, shift: int
    ) -> None:
        """Copy the remaining packets that start before `end` (seconds), `shift` samples later."""
        while self._next is not None and self._next[0] * self._next[1].time_base < end:
            begin, packet = self._next
            packet.stream = out
            packet.pts = packet.dts = begin + shift
            target.mux(packet)
            self._next = next(self._packets, None)


def mp4_boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The top-level boxes of an MP4 (ISO/IEC 14496-12): kind and whole content, header included."""
    position = 0
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, position + 8)
        yield kind.decode("latin-1"), data[position : position + length]
        position += length
