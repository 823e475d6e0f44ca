"""What the writer of a video can do on this machine's CPU, without a model: frames a second of H.264.

    python -m benchmarks writer [--size 512x512] [--window 28] [--at-once 1,2,4,8] [--threads 1,4]
        [--seconds 3] [--hp crf=18 preset=medium]

Windows of frames are encoded as `engine.writer` does, so many at a time, each by so many threads of x264.
Two kinds of picture: `faint` is what the benchmarks with random weights paint (noise of about one level), and
`face` the packaged portrait that moves, with such noise. `CPU`: milliseconds of CPU time a frame. `to YUV`:
those of them that turn RGB into yuv420p. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.shared.options import add_hp, make_parser, size_of
from benchmarks.shared.report import print_result, print_table
from omniavatar.assets import PORTRAIT
from omniavatar.config.load import load_config
from omniavatar.device import usable_cores
from omniavatar.media.image import load_image
from omniavatar.media.video import encode_segment, yuv_picture

NOISE = 1.2
"""Spread of the noise, in levels of 255."""
MARGIN = 16
"""Pixels that the face moves by, at most."""


def faint(count: int, size: tuple[int, int]) -> np.ndarray:
    """Grey frames (count, H, W, 3) uint8 with noise."""
    noise = np.random.default_rng(0).standard_normal((count, *size, 3), dtype=np.float32)
    return (128.0 + NOISE * noise).round().astype(np.uint8)


def face(count: int, size: tuple[int, int]) -> np.ndarray:
    """The portrait, which moves, with noise."""
    height, width = size
    large = Image.fromarray(load_image(PORTRAIT)).resize((width + MARGIN, height + MARGIN))
    pixels = np.asarray(large).astype(np.float32)
    noise = np.random.default_rng(0)
    frames = []
    for number in range(count):
        down, right = (round(MARGIN / 2 * (1 + turn(number / 6.0))) for turn in (np.sin, np.cos))
        shown = pixels[down : down + height, right : right + width]
        shown = shown + NOISE * noise.standard_normal(shown.shape, dtype=np.float32)
        frames.append(shown.round().clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def measure(frames: np.ndarray, at_once: int, threads: int, seconds: float, output: Any) -> dict[str, float]:
    """Encode windows of `frames`, `at_once` at a time, for about `seconds`."""
    size = (frames.shape[1], frames.shape[2])
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(at_once) as pool:

        def encode(number: int) -> float:
            begun = time.perf_counter()
            path = Path(name) / f"{number}.mp4"
            encode_segment(
                [frames], path, Fraction(25), size, output.crf, output.preset, threads, output.encoder
            )
            return time.perf_counter() - begun

        output = output.model_copy(update={"encoder": "x264"})
        one = encode(-1)
        windows = max(2 * at_once, round(seconds / one) * at_once)
        begun, cpu = time.perf_counter(), time.process_time()
        spent = list(pool.map(encode, range(windows)))
        taken, cpu = time.perf_counter() - begun, time.process_time() - cpu
    count = windows * len(frames)
    return {
        "frames_per_second": count / taken,
        "window_s": sum(spent) / windows,
        "cpu_ms": cpu / count * 1e3,
        "frames": count,
    }


def conversion_ms(frames: np.ndarray) -> float:
    """CPU milliseconds of turning a frame into yuv420p."""
    begun = time.thread_time()
    for frame in frames:
        yuv_picture(frame)
    return (time.thread_time() - begun) / len(frames) * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--size", type=size_of, default="512x512", help="height x width")
    parser.add_argument("--window", type=int, default=28, help="frames of a window")
    parser.add_argument("--at-once", default="1,2,4,8")
    parser.add_argument("--threads", default="1,4")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement, about")
    add_hp(parser)
    options = parser.parse_args(arguments)
    output = load_config("pocket", options.hp).config.output
    rows = []
    for name, paint in (("faint", faint), ("face", face)):
        frames = paint(options.window, options.size)
        yuv = conversion_ms(frames)
        for threads in map(int, options.threads.split(",")):
            for at_once in map(int, options.at_once.split(",")):
                found = measure(frames, at_once, threads, options.seconds, output)
                rows.append({"picture": name, "threads": threads, "at_once": at_once, "yuv_ms": yuv, **found})
    heads = ("picture", "threads", "at once", "frames a second", "a window, s", "CPU, ms", "to YUV, ms")
    shown = [
        (
            row["picture"],
            row["threads"],
            row["at_once"],
            f"{row['frames_per_second']:.0f}",
            f"{row['window_s']:.3f}",
            f"{row['cpu_ms']:.1f}",
            f"{row['yuv_ms']:.2f}",
        )
        for row in rows
    ]
    print_table(heads, shown)
    size = list(options.size)
    print_result("writer", size=size, window=options.window, hp=options.hp, cores=usable_cores(), rows=rows)


if __name__ == "__main__":
    main()
