"""What the writer of a video can do on this machine's CPU, without a model: frames a second of H.264.

    python -m benchmarks writer [--size 512x512] [--window 28] [--at-once 1,2,4,8] [--threads 1,4]
        [--seconds 3] [--hp crf=18 preset=medium]
    python -m benchmarks writer --video 40 [--model-fps 0] [--size 512x512] [--window 28] [--hp ...]

Windows of frames are encoded as `engine.writer` does, so many at a time, each by so many threads of x264.
Two kinds of picture: `faint` is what the benchmarks with random weights paint (noise of about one level), and
`face` the packaged portrait that moves, with such noise. `CPU`: milliseconds of CPU time a frame. `to YUV`:
those of them that turn RGB into yuv420p. Prints a table, then one line of JSON.

With `--video`, a silent video of so many seconds is written by the engine's writer and its settings, with
`key_frame_s` as it is configured and with 0. The model is a clock of `--model-fps` frames a second; 0: it is
never late. `rest`: seconds from the last window's frames to the finished video.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from benchmarks.shared.options import add_hp, make_parser, size_of
from benchmarks.shared.report import print_result, print_table
from omniavatar.assets import PORTRAIT
from omniavatar.config.load import load_config
from omniavatar.device import usable_cores
from omniavatar.engine.host import Host
from omniavatar.engine.job import Job
from omniavatar.engine.recorder import RunRecorder
from omniavatar.engine.segments import Segments
from omniavatar.engine.window_loop import WindowResult
from omniavatar.engine.writer import VideoWriter
from omniavatar.media.image import load_image
from omniavatar.media.video import encode_segment, yuv_picture
from omniavatar.sampling.windows import plan_windows

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


def wait_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


def whole(painted: np.ndarray, window: int, seconds: float, model_fps: float, output: Any) -> dict[str, Any]:
    """Write a video of windows of so many frames of `painted`, as the engine does."""
    windows = plan_windows(round(seconds * 25), window + 1, 1)
    count = sum(each.new_frames for each in windows)
    size = (painted.shape[1], painted.shape[2])
    plan = cast(Any, SimpleNamespace(size=size, fps=25.0, windows=windows, frames=count, audio_delay_s=0))
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder) / "out.mp4")
        with job.owned(), job.opened({}, False):
            segments = Segments(job, plan, output, "x264", Host())
            begun, cpu = time.perf_counter(), time.process_time()
            made = begun
            with VideoWriter(job, plan, segments, None, RunRecorder()) as writer:
                for each in windows:
                    left = None if each is windows[-1] else torch.zeros(1)
                    queued = time.perf_counter()
                    made = max(made, queued) + (each.new_frames / model_fps if model_fps else 0.0)
                    frames = [painted[: each.new_frames]]
                    wait = partial(wait_until, made)
                    writer.submit(WindowResult(each, torch.zeros(1), frames, left, wait, queued))
                writer.finish()
            taken, cpu = time.perf_counter() - begun, time.process_time() - cpu
            data = job.output.read_bytes()
    return {
        "key_frame_s": output.key_frame_s,
        "frames_per_second": count / taken,
        "rest_s": begun + taken - made,
        "cpu_ms": cpu / count * 1e3,
        "bytes_per_frame": len(data) / count,
        "sha256": hashlib.sha256(data).hexdigest(),
        "frames": count,
    }


def conversion_ms(frames: np.ndarray) -> float:
    """CPU milliseconds of turning a frame into yuv420p."""
    begun = time.thread_time()
    for frame in frames:
        yuv_picture(frame)
    return (time.thread_time() - begun) / len(frames) * 1e3


def write_videos(options: argparse.Namespace, output: Any) -> None:
    """Time whole videos, print a table and the result."""
    rows = []
    for name, paint in (("faint", faint), ("face", face)):
        painted = paint(options.window + 1, options.size)
        for key_frame_s in dict.fromkeys((output.key_frame_s, 0.0)):
            changed = output.model_copy(update={"key_frame_s": key_frame_s})
            found = whole(painted, options.window, options.video, options.model_fps, changed)
            rows.append({"picture": name, **found})
    columns = {
        "picture": ("picture", ""),
        "key_frame_s": ("key_frame_s", "g"),
        "frames a second": ("frames_per_second", ".0f"),
        "rest, s": ("rest_s", ".2f"),
        "CPU, ms": ("cpu_ms", ".1f"),
        "bytes a frame": ("bytes_per_frame", ".0f"),
    }
    report(options, columns, rows, model_fps=options.model_fps, videos=rows)


def report(
    options: argparse.Namespace,
    columns: dict[str, tuple[str, str]],
    measured: list[dict[str, Any]],
    **found: object,
) -> None:
    """Print the table of `columns` (by head: key of a row, and format), and the line of JSON."""
    print_table(
        list(columns), [[format(row[key], form) for key, form in columns.values()] for row in measured]
    )
    size, cores = list(options.size), usable_cores()
    print_result("writer", size=size, window=options.window, hp=options.hp, cores=cores, **found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--size", type=size_of, default="512x512", help="height x width")
    parser.add_argument("--window", type=int, default=28, help="frames of a window")
    parser.add_argument("--at-once", default="1,2,4,8")
    parser.add_argument("--threads", default="1,4")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement, about")
    parser.add_argument("--video", type=float, help="seconds of a whole video by the engine's writer")
    parser.add_argument(
        "--model-fps", type=float, default=0.0, help="frames a second of the model, with --video"
    )
    add_hp(parser)
    options = parser.parse_args(arguments)
    output = load_config("pocket", options.hp).config.output
    if options.video:
        write_videos(options, output)
        return
    rows = []
    for name, paint in (("faint", faint), ("face", face)):
        frames = paint(options.window, options.size)
        yuv = conversion_ms(frames)
        for threads in map(int, options.threads.split(",")):
            for at_once in map(int, options.at_once.split(",")):
                found = measure(frames, at_once, threads, options.seconds, output)
                rows.append({"picture": name, "threads": threads, "at_once": at_once, "yuv_ms": yuv, **found})
    columns = {
        "picture": ("picture", ""),
        "threads": ("threads", ""),
        "at once": ("at_once", ""),
        "frames a second": ("frames_per_second", ".0f"),
        "a window, s": ("window_s", ".3f"),
        "CPU, ms": ("cpu_ms", ".1f"),
        "to YUV, ms": ("yuv_ms", ".2f"),
    }
    report(options, columns, rows, rows=rows)


if __name__ == "__main__":
    main()
