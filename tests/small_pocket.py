"""The packaged model made small enough for tests, and a voice of a few words' length."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

from omniavatar.assets import pocket

FRAMES = 24
"""Frames of a video of `write_voice`: the portrait, 0.3 s of silence and 0.6 s of voice at 25 per second."""
SMALLER = {
    "num_steps: 4": "num_steps: 1",
    "[[192, 192]]": "[[64, 64]]",
    "max_tokens: 1476": "max_tokens: 164\nseq_len: 20\npreset: ultrafast\ndevice: cpu",
}


def write_config(path: Path) -> Path:
    """Write configs/pocket.yaml with the changes of SMALLER: 64x64 pixels, one step."""
    text = pocket.CONFIG.read_text()
    for old, new in SMALLER.items():
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(f"{text}\ntext_cache_dir: {path.parent / 'text_cache'}\n")
    return path


def write_voice(path: Path, seconds: float = 0.6) -> Path:
    """Write noise as WAV; FFmpeg reads a sound file by its content, whatever its ending."""
    samples = np.random.default_rng(0).integers(-3000, 3000, round(seconds * 16000), dtype=np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.tobytes())
    return path
