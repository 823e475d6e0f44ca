"""Frames and sound as one stream of bytes, while they come: fragmented MP4 or MPEG-TS.

H.264 without reordered frames, and AAC. A picture that any player can start at (a key frame) comes every
`key_s` seconds. The encoder holds no frame back; AAC holds back up to two packets of 1,024 samples.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from types import TracebackType
from typing import Literal, Self, cast

import av
import av.error
import numpy as np

from omniavatar.errors import OutputError
from omniavatar.media.h264 import ENCODERS, encoder_options
from omniavatar.media.open_file import new_stream
from omniavatar.media.video import mp4_boxes, tag_colours, yuv_picture

StreamForm = Literal["mp4", "mpegts"]
_LOW_DELAY = {
    "x264": {"tune": "zerolatency", "sc_threshold": "0"},
    "nvenc": {"delay": "0", "zerolatency": "1", "no-scenecut": "1"},
}
"""No held-back frames, and key frames at even distances only."""
_SOUND_BITS = 96_000
_PRIMING = 1024
"""Samples of AAC before the first given one. All times are later by whole frames, so none is negative."""


class _Sink:
    """Collects what FFmpeg writes."""

    name = "live"

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data


class StreamWriter:
    """Encodes pieces of video with their sound; each call returns the bytes that are complete.

    - size: (H, W), both even.
    - rate: samples a second of the sound.
    - fragment_s: seconds of a fragment of MP4; 0: from one key frame to the next.
    - encoder: a name of `media.h264.ENCODERS`.

    Raises ConfigError for a bad crf or preset.
    """

    def __init__(
        self,
        size: tuple[int, int],
        fps: Fraction,
        rate: int,
        form: StreamForm = "mp4",
        crf: float = 23,
        preset: str = "veryfast",
        key_s: float = 1.0,
        fragment_s: float = 0.1,
        encoder: str = "x264",
    ) -> None:
        height, width = size
        if height % 2 or width % 2:
            raise ValueError(f"H.264 in yuv420p needs even sizes, not {width}x{height}")
        self.fps, self.rate = Fraction(fps), rate
        self._sink = _Sink()
        self._container = new_stream(self._sink, form, _muxer_options(form, fragment_s))
        self._video = cast(
            av.VideoStream, self._container.add_stream(ENCODERS.get(encoder).codec, rate=self.fps)
        )
        self._video.width, self._video.height, self._video.pix_fmt = width, height, "yuv420p"
        context = self._video.codec_context
        context.time_base, context.gop_size = 1 / self.fps, max(1, round(key_s * self.fps))
        context.thread_count = 1
        tag_colours(context)
        context.options = {**encoder_options(encoder, crf, preset), **_LOW_DELAY[encoder]}
        self._sound = self._container.add_stream("aac", rate=rate, layout="mono")
        self._sound.codec_context.bit_rate = _SOUND_BITS
        self._frames = self._samples = 0
        self._lead = ceil(_PRIMING * self.fps / rate)

    @property
    def mime(self) -> str:
        """The media type with codecs, for a browser's Media Source. Known after the first `add`."""
        sps = bytes(self._video.codec_context.extradata or b"")
        at = sps.find(b"\x67") + 1
        return f'video/mp4; codecs="avc1.{sps[at : at + 3].hex()}, mp4a.40.2"'

    def add(self, frames: np.ndarray, sound: np.ndarray, skipped: int = 0) -> bytes:
        """Append frames (n, H, W, 3) uint8 with their sound (m,) int16 at `rate`.

        skipped: frames left out before these; their time stays, with silence.

        Raises OutputError.
        """
        self._frames += skipped
        start = int(self._frames * self.rate / self.fps)
        silence = np.zeros(max(0, start - self._samples), np.int16)
        try:
            for rgb in frames:
                picture = yuv_picture(rgb)
                picture.pts, picture.time_base = self._lead + self._frames, 1 / self.fps
                self._frames += 1
                self._container.mux(self._video.encode(picture))
            self._add_sound(np.concatenate([silence, sound]))
        except av.error.FFmpegError as error:
            raise OutputError(
                f"live video: cannot be encoded ({error.strerror}); try another size"
            ) from error
        return self._sink.take()

    def _add_sound(self, samples: np.ndarray) -> None:
        if not len(samples):
            return
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate, frame.time_base = self.rate, Fraction(1, self.rate)
        frame.pts = round(self._lead * self.rate / self.fps) + self._samples
        self._samples += len(samples)
        self._container.mux(self._sound.encode(frame))

    def finish(self) -> bytes:
        """Close the stream and return its last bytes."""
        if self._frames:
            self._container.mux(self._video.encode(None))
            self._container.mux(self._sound.encode(None))
        self._container.close()
        return self._sink.take()

    def close(self) -> None:
        """Free the encoders, if `finish` was not called."""
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _muxer_options(form: StreamForm, fragment_s: float) -> dict[str, str]:
    if form == "mpegts":
        return {"flush_packets": "1", "pat_period": "0.5", "muxdelay": "0", "max_interleave_delta": "200000"}
    flags = "+empty_moov+default_base_moof+skip_trailer+frag_discont" + (
        "" if fragment_s else "+frag_keyframe"
    )
    options = {"movflags": flags, "flush_packets": "1", "max_interleave_delta": "200000"}
    options |= {"use_editlist": "0", "avoid_negative_ts": "disabled"}
    return {**options, "frag_duration": str(round(fragment_s * 1e6))} if fragment_s else options


class FragmentSplitter:
    """Splits a fragmented MP4 that comes in pieces: its head, then whole fragments (moof and mdat)."""

    def __init__(self) -> None:
        self._rest = b""
        self._fragment = b""
        self.head = b""

    def add(self, data: bytes) -> list[bytes]:
        """The fragments that `data` completes; `head` is filled before the first one."""
        self._rest += data
        fragments = []
        while (size := whole_box(self._rest)) is not None:
            ((kind, box),) = mp4_boxes(self._rest[:size])
            self._rest = self._rest[size:]
            if kind in ("ftyp", "moov"):
                self.head += box
                continue
            self._fragment += box
            if kind == "mdat":
                fragments.append(self._fragment)
                self._fragment = b""
        return fragments


def whole_box(data: bytes) -> int | None:
    """Bytes of the MP4 box that starts `data`; None if it is not whole."""
    if len(data) < 16:
        return None
    size = int.from_bytes(data[:4], "big")
    size = int.from_bytes(data[8:16], "big") if size == 1 else size
    return size if size <= len(data) else None
