"""Inputs of the benchmarks that make whole videos: repeated speech, and pictures that are cheap to encode.

Random decoders paint noise, which costs x264 five times what a face does. `paint_faintly` cuts the contrast
of their pictures to a hundredth, noise of about one grey level.
"""

from __future__ import annotations

import os
import tempfile
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from omniavatar import Waveform
from omniavatar.assets import PORTRAIT, SPEECH
from omniavatar.checkpoint import tiny_decoder
from omniavatar.checkpoint.tiny_decoder import random_tiny_decoder
from omniavatar.checkpoint.vae import random_vae
from omniavatar.engine import loading
from omniavatar.media.audio import decode_mono
from omniavatar.media.image import load_image
from omniavatar.model.tiny_decoder import TinyDecoder
from omniavatar.model.vae import WanVAE

ROOT = Path(__file__).resolve().parents[2]
FAINT_COMMAND = "benchmarks.shared.faint_command"
RATE = 16000
CONTRAST = 0.01
CHUNKS_FIRST = 8
"""Chunks until a forward is captured (`accel.graphs.FORWARDS_FIRST`), with one step a chunk."""


def speech(seconds: float) -> Waveform:
    """The packaged speech, repeated to `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        decoded = Path(folder) / "speech.f32"
        decode_mono(SPEECH, decoded, RATE, 0.0)
        samples = np.fromfile(decoded, np.float32)
    return Waveform(np.resize(samples, round(seconds * RATE)), RATE)


@contextmanager
def speech_folder(minutes: float) -> Iterator[Path]:
    """A temporary folder that holds the packaged speech, repeated to `minutes`, as `speech.wav`."""
    with tempfile.TemporaryDirectory() as name:
        samples = (speech(minutes * 60).samples * 32767).astype(np.int16)
        with wave.open(str(Path(name) / "speech.wav"), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(RATE)
            sound.writeframes(samples.tobytes())
        yield Path(name)


def faint_portrait() -> np.ndarray:
    """The packaged portrait with as little contrast as the faint pictures, (H, W, 3) uint8.

    A model that matches colours would stretch its noise to the contrast of an ordinary portrait.
    """
    pixels = load_image(PORTRAIT).astype(np.float32)
    return (128.0 + (pixels - 128.0) * CONTRAST).round().astype(np.uint8)


def faint_vae(*args: Any, **options: Any) -> WanVAE:
    """A random VAE that decodes to faint pictures."""
    vae = random_vae(*args, **options)
    vae.decoder.head[2].weight.data.mul_(CONTRAST)
    return vae


def faint_tiny_decoder(*args: Any, **options: Any) -> TinyDecoder:
    """A random TAEHV that decodes to faint pictures."""
    made = random_tiny_decoder(*args, **options)
    last = made.decoder[-1]
    last.weight.data.mul_(CONTRAST)
    return made


def paint_faintly() -> None:
    """Let `weights: random` decode to faint pictures in this process."""
    loading.random_vae = faint_vae
    tiny_decoder.random_tiny_decoder = faint_tiny_decoder


def module_environment(**variables: str) -> dict[str, str]:
    """The environment for a child process that runs a module of `benchmarks`; `variables` are added."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **variables}
