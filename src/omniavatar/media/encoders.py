"""Which H.264 encoder makes the picture: x264 on the CPU, or NVENC, the encoder unit of a GPU.

Having NVENC in FFmpeg says nothing about the GPU (an H100 or A100 has no encoder unit, and a driver may be
missing), so it is tried: one frame of the video's size. Settings are given in x264's terms. For NVENC `crf`
becomes the constant quantiser (same scale of 0 to 51; at equal numbers x264's files are smaller), `preset`
one of p1 to p7; no frames are reordered, so every NVENC that knows H.264 can do it.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, cast

import av
import av.codec
import av.error

from omniavatar.errors import ConfigError, ResourceError

Encoder = Literal["x264", "nvenc"]
Probe = Callable[[tuple[int, int]], str | None]

CODECS: Mapping[Encoder, str] = MappingProxyType({"x264": "libx264", "nvenc": "h264_nvenc"})
NVENC_PRESETS: Mapping[str, str] = MappingProxyType(
    {
        "ultrafast": "p1",
        "superfast": "p1",
        "veryfast": "p2",
        "faster": "p3",
        "fast": "p4",
        "medium": "p4",
        "slow": "p5",
        "slower": "p6",
        "veryslow": "p7",
    }
)
PRESETS = tuple(NVENC_PRESETS)
"""x264's names, which the configuration uses for both."""

_log = logging.getLogger(__name__)


def encoder_options(encoder: Encoder, crf: float, preset: str) -> dict[str, str]:
    """FFmpeg's options for `crf` and `preset`. Raises ConfigError for one that does not exist."""
    if preset not in PRESETS:
        raise ConfigError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
    if not 0 <= crf <= 51:
        raise ConfigError(f"crf: {crf} is not between 0 (lossless) and 51 (worst)")
    if encoder == "x264":
        return {"crf": str(crf), "preset": preset}
    return {"rc": "constqp", "qp": str(round(crf)), "preset": NVENC_PRESETS[preset], "bf": "0"}


def try_nvenc(size: tuple[int, int]) -> str | None:
    """None if a frame of `size` (H, W) can be encoded by NVENC here, else why not."""
    name = CODECS["nvenc"]
    if name not in av.codec.codecs_available:
        return f"PyAV's FFmpeg has no {name}"
    height, width = size
    try:
        with av.open(io.BytesIO(), "w", format="mp4") as container:
            stream = cast(av.VideoStream, container.add_stream(name, rate=25))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.options = encoder_options("nvenc", 18, "medium")
            container.mux(stream.encode(av.VideoFrame(width, height, "yuv420p")))
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        return f"NVENC does not open here: {error.strerror}"
    return None


def choose_encoder(wanted: str, size: tuple[int, int], probe: Probe = try_nvenc) -> Encoder:
    """The encoder that `wanted` (auto, x264, nvenc) stands for with frames of `size` (H, W).

    auto: NVENC where it works, else x264; the choice is logged. Raises ResourceError for an NVENC that does
    not work, ConfigError for an unknown name.
    """
    if wanted == "x264":
        return "x264"
    if wanted not in ("auto", "nvenc"):
        raise ConfigError(f"encoder: {wanted!r} is not one of auto, x264, nvenc")
    reason = probe(size)
    if wanted == "nvenc" and reason is not None:
        raise ResourceError(f"encoder: nvenc cannot be used ({reason}); use encoder=x264 or auto")
    if reason is None:
        _log.info("video encoder: NVENC (h264_nvenc)")
        return "nvenc"
    _log.info("video encoder: x264 (%s)", reason)
    return "x264"
