"""A video that goes on from a finished one with more sound.

The finished video is the new one's first window: its pictures are copied, not made again. The next window is
given the last `overlap` frames, as any window is; they are read from the file, so they have been through
H.264 once. The sound is the finished video's, decoded, and then the new one. The speech encoder hears both.

Making a longer video from the joined sound would not do: the encoder attends to the whole sound, so every
frame that a viewer has seen already would change a little, and the last window would be made again.
"""

from __future__ import annotations

import wave
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch
import torch

from omniavatar.engine.hold import cells
from omniavatar.engine.shown import Shown, left
from omniavatar.errors import InputError
from omniavatar.media.atomic import atomic_path
from omniavatar.media.audio_source import open_audio
from omniavatar.media.inspect import encoding, probe_video, read_frames
from omniavatar.media.resample import resample, silence
from omniavatar.media.temporary import temporary_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from omniavatar.config.schema import VideoConfig
    from omniavatar.engine.job import Job
    from omniavatar.engine.models import Models
    from omniavatar.types import LocalAudio

JOINED = "joined_sound.wav"
"""File in a request's folder: the finished video's sound, then the new one."""
_LAYOUTS = {1: "mono", 2: "stereo"}


@dataclass(frozen=True)
class Begun:
    """The finished video that a request goes on from. size: (height, width)."""

    path: Path
    frames: int
    size: tuple[int, int]
    has_sound: bool


def read_begun(path: str | Path, video: VideoConfig) -> Begun:
    """The finished video at `path`. Raises InputError if the configuration cannot go on from it."""
    info = probe_video(path)
    size = (info.height, info.width)
    if size not in video.sizes:
        known = ", ".join(f"{width}x{height}" for height, width in video.sizes)
        raise InputError(
            f"video {path}: is {info.width}x{info.height}; go on with a configuration of that size "
            f"(this one has {known})"
        )
    if info.fps != Fraction(video.fps):
        raise InputError(f"video {path}: has {info.fps} frames a second, not {video.fps}; set fps")
    if info.frames < video.overlap_frame:
        raise InputError(
            f"video {path}: has {info.frames} frames, fewer than overlap_frame={video.overlap_frame}; "
            "make a longer video first"
        )
    return Begun(Path(path), info.frames, size, info.audio is not None)


def join_sounds(begun: Begun, fps: float, sound: LocalAudio, path: Path) -> Path:
    """Write the finished video's sound after its first frame, and then `sound`, as a WAV file; returns it.

    It has the rate and the channels of the new sound, two at most. Raises InputError, OutputError.
    """
    with open_audio(sound) as new, atomic_path(path) as temporary:
        rate, channels = new.sample_rate, min(new.channels, 2)
        with temporary.open("wb") as raw, wave.open(raw, "wb") as out:
            out.setparams((channels, 2, rate, 0, "NONE", "not compressed"))
            first, last = (round(Fraction(count) / Fraction(fps) * rate) for count in (1, begun.frames))
            for block in _between(_old_blocks(begun, channels, rate, last), first, last):
                out.writeframes(_pcm(block))
            for block in resample(new.blocks, new.layout, rate, _LAYOUTS[channels], rate):
                out.writeframes(_pcm(block))
    return path


def begin(
    job: Job, models: Models, begun: Begun, overlap: int, encode: Callable[[list[np.ndarray], Path], None]
) -> None:
    """Record the finished video as the first window of the job.

    overlap: frames that the next window is given.
    encode: writes frames as a segment, with the settings of the job.

    Raises InputError, OutputError.
    """
    with temporary_folder() as folder:
        sample = folder / "sample.mp4"
        encode([np.stack(list(islice(read_frames(begun.path), 2)))], sample)
        if encoding(sample) != encoding(begun.path):
            raise InputError(
                f"video {begun.path}: was encoded with other settings; set crf, preset, encoder and "
                "key_frame_s as it was made (key_frame_s to 0 for a video of an earlier version)"
            )
    with atomic_path(job.segment_path(0)) as temporary:
        temporary.write_bytes(begun.path.read_bytes())
    frames = last_frames(begun, overlap)
    given = models.residency.retry(lambda: latents_of(models, frames)).cpu()
    video = models.config.video
    shown = shown_last(frames, bool(video.blend_frames), bool(video.hold_background))
    job.finish_window(safetensors.torch.save(left(given, shown)))


def last_frames(begun: Begun, overlap: int) -> Tensor:
    """The last frames of the finished video, (1, 3, overlap, H, W) uint8."""
    frames = np.stack(deque(read_frames(begun.path), maxlen=overlap))
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None]


def shown_last(frames: Tensor, last: bool, held: bool) -> Shown:
    """What these frames leave for the next window. The background is held at the last one, where it rests."""
    frame = frames[:, :, -1:].contiguous()
    weight = torch.ones(1, 1, *cells(*frame.shape[3:])) if held else None
    return Shown(frame if last else None, frame.clone() if held else None, weight)


@torch.inference_mode()
def latents_of(models: Models, frames: Tensor) -> Tensor:
    """Frames (1, 3, n, H, W) uint8 as given latents (1, 16, G, h, w) float32."""
    pixels = frames.to(models.device, torch.float32)
    with models.recorder.stage("vae_encode"):
        return models.vae.encode(pixels / 127.5 - 1.0).float()


def _old_blocks(begun: Begun, channels: int, rate: int, samples: int) -> Iterator[np.ndarray]:
    """The finished video's sound, or silence if it has none; at least `samples` samples."""
    if begun.has_sound:
        with open_audio(begun.path) as old:
            yield from resample(old.blocks, old.layout, old.sample_rate, _LAYOUTS[channels], rate)
    yield from silence(channels, samples)


def _between(blocks: Iterable[np.ndarray], first: int, last: int) -> Iterator[np.ndarray]:
    """The samples from number `first` to before `last`."""
    position = 0
    for block in blocks:
        low, high = max(first - position, 0), min(last - position, block.shape[1])
        if low < high:
            yield block[:, low:high]
        position += block.shape[1]
        if position >= last:
            return


def _pcm(block: np.ndarray) -> bytes:
    """16-bit samples of a block (channels, samples)."""
    return (np.clip(block, -1.0, 1.0) * 32767.0).round().astype("<i2").T.tobytes()
