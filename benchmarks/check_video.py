"""Checks a finished video against the sound it was made from: length, sound, alignment.

    python -m benchmarks check_video out.mp4 speech.mp3 [--silence 0.3]

Prints one line of JSON. Fails if the length is off by more than a frame or the sound by more than 5 ms.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.shared.options import make_parser
from omniavatar.media.audio import decode_mono
from omniavatar.media.inspect import probe_video

RATE = 48000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("sound", type=Path)
    parser.add_argument(
        "--silence", type=float, default=0.3, help="seconds before the sound (silence_duration_s)"
    )
    options = parser.parse_args(arguments)
    info = probe_video(options.video)
    with tempfile.TemporaryDirectory() as folder:
        waves = []
        for number, source in enumerate((options.video, options.sound)):
            out = Path(folder) / f"{number}.f32"
            decode_mono(source, out, RATE, 0.0)
            waves.append(np.fromfile(out, np.float32))
    inside, original = waves
    size = 1 << (len(inside) + len(original)).bit_length()
    correlation = np.fft.irfft(np.fft.rfft(inside, size) * np.fft.rfft(original, size).conj(), size)
    delay = int(correlation.argmax()) / RATE
    expected_delay = options.silence + 1 / float(info.fps)
    seconds = len(original) / RATE + options.silence
    report = {
        "video": options.video.name,
        "frames": info.frames,
        "expected_frames": int(np.ceil(round(seconds * float(info.fps), 6))) + 1,
        "size": [info.width, info.height],
        "sound": info.audio and f"{info.audio.codec} {info.audio.sample_rate} Hz x{info.audio.channels}",
        "delay_s": round(delay, 5),
        "delay_error_ms": round((delay - expected_delay) * 1000, 3),
    }
    print(json.dumps(report))
    if abs(report["frames"] - report["expected_frames"]) > 1 or abs(report["delay_error_ms"]) > 5:
        raise SystemExit("error: the video does not match its sound")
