"""H.264 encoders by name: x264 on the CPU, or NVENC, the encoder unit of a GPU.

NVENC in FFmpeg says nothing about the GPU: an H100 or A100 has no encoder unit, and a driver may be missing.
So one frame of the video's size is encoded to find out. Settings are in x264's terms. For NVENC `crf` becomes
the constant quantiser (the same scale of 0 to 51; at equal numbers x264's files are smaller) and `preset` one
of p1 to p7. No frames are reordered, so every NVENC that can do H.264 works.

`create` takes crf and preset and returns FFmpeg's options. `unavailable` takes the picture size (H, W).
"""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from omniavatar.device import Backend, Registry
from omniavatar.errors import ConfigError

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
"""x264's names, which the configuration uses for both encoders."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class H264Encoder(Backend):
    """An encoder.

    - codec: its name in FFmpeg.
    - threads: it uses the number of threads that the run sets.
    - goes_on: options, besides `create`'s, with which it gives each frame's packet before it takes the next
      frame, so that one encoder can write several segments; None if it cannot.
    """

    codec: str
    threads: bool = False
    goes_on: Mapping[str, str] | None = None


def _x264_options(crf: float, preset: str) -> dict[str, str]:
    # With mbtree, x264 gives other bytes for the same frames on a busy machine (seen in 3 of 10 encodes with
    # FFmpeg 8.1.2), and a resumed video would not equal an uninterrupted one. Without it the files are about
    # 28 % larger at the same crf.
    return {"crf": str(crf), "preset": preset, "mbtree": "0"}


def _nvenc_options(crf: float, preset: str) -> dict[str, str]:
    return {"rc": "constqp", "qp": str(round(crf)), "preset": NVENC_PRESETS[preset], "bf": "0"}


def try_nvenc(size: tuple[int, int]) -> str | None:
    """None if NVENC can encode a frame of `size` (H, W) on this machine, else the reason why not."""
    import av
    import av.codec
    import av.error

    from omniavatar.media.open_file import new_media

    name = "h264_nvenc"
    if name not in av.codec.codecs_available:
        return f"PyAV's FFmpeg has no {name}"
    height, width = size
    try:
        with new_media(io.BytesIO()) as container:
            stream = cast("av.VideoStream", container.add_stream(name, rate=25))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.options = _nvenc_options(18, "medium")
            container.mux(stream.encode(av.VideoFrame(width, height, "yuv420p")))
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        return f"NVENC does not open here: {error.strerror}"
    return None


ENCODERS: Registry[H264Encoder] = Registry(
    "output.encoder",
    H264Encoder(
        name="x264",
        create=_x264_options,
        exact=True,
        doc="x264 on the CPU: the smallest files.",
        rank=1,
        codec="libx264",
        threads=True,
        goes_on=MappingProxyType(
            {
                "bf": "0",
                "x264-params": "keyint=infinite:scenecut=0:force-cfr=1:rc-lookahead=0:sync-lookahead=0"
                ":sliced-threads=1",
            }
        ),
    ),
    H264Encoder(
        name="nvenc",
        create=_nvenc_options,
        exact=True,
        doc="The GPU's encoder unit: no CPU time, larger files at equal quality.",
        needs="NVIDIA GPU with an encoder unit",
        unavailable=try_nvenc,
        rank=2,
        codec="h264_nvenc",
    ),
    words=("auto",),
)


def encoder_options(encoder: str, crf: float, preset: str) -> dict[str, str]:
    """FFmpeg's options for `crf` and `preset`. Raises ConfigError for a value that does not exist."""
    if preset not in PRESETS:
        raise ConfigError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
    if not 0 <= crf <= 51:
        raise ConfigError(f"crf: {crf} is not between 0 (lossless) and 51 (worst)")
    options: dict[str, str] = ENCODERS.get(encoder).create(crf, preset)
    return options


def choose_encoder(value: str, size: tuple[int, int], encoders: Registry[H264Encoder] = ENCODERS) -> str:
    """Name of the encoder for `value` (`auto` or a name) and frames of `size` (H, W).

    `auto` takes NVENC if it works, else x264; the choice is logged. Raises ConfigError for an unknown name,
    ResourceError for an encoder that cannot be used.
    """
    if value == "auto":
        reasons = encoders.reasons(size)  # each encoder is tried once
        ranked = [each for each in encoders if each.rank is not None]
        ranked.sort(key=lambda each: each.rank or 0, reverse=True)
        refused = itertools.takewhile(lambda each: reasons[each.name] is not None, ranked)
        notes = [f"{each.name}: {reasons[each.name]}" for each in refused]
        if len(notes) < len(ranked):
            chosen = ranked[len(notes)]
            _log.info("video encoder: %s (%s)", chosen.name, chosen.codec)
            for note in notes:
                _log.debug("video encoder: not %s", note)
            return chosen.name
    chosen = encoders.resolve(value, size)
    if chosen.codec != "libx264":
        _log.info("video encoder: %s (%s)", chosen.name, chosen.codec)
    return chosen.name
