"""Audio to finished mp4: one whole video with full-size random weights, or its first windows projected.

    python benchmarks/whole_video.py --config configs/inference_1.3B_optimized.yaml --scale 1.3B
        [--minutes 5] [--windows 0] [--hp key=value ...]

The packaged speech, repeated to `--minutes`, drives the packaged portrait at 400x720. A video of two windows
before it loads the models and compiles the kernels (`ready_s`, not counted). Counted: reading the audio,
wav2vec 2.0, every window, encoding and writing, until the file has its name. With `--windows N` a shorter
video of N windows is made, and the whole is projected: what it took, and for each window left out the median
of its windows after the first. The file is checked: frames, length of both streams. Noise costs x264 five
times what a face does, so the random decoder's contrast is cut to a hundredth, noise of one level. One line
of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import where

from omniavatar import AvatarPipeline, AvatarRequest, Waveform
from omniavatar.checkpoint.vae import random_vae
from omniavatar.config.load import load_config
from omniavatar.engine import loading as vae_loading
from omniavatar.engine.recorder import RunRecorder
from omniavatar.media.audio import decode_mono
from omniavatar.media.inspect import probe_video
from omniavatar.model.vae import WanVAE
from omniavatar.plan.run import make_plan

SIZE = (400, 720)
RATE = 16000
CONTRAST = 0.01


def faint_vae(*args: Any, **options: Any) -> WanVAE:
    """A random VAE that decodes to faint pictures."""
    vae = random_vae(*args, **options)
    vae.decoder.head[2].weight.data.mul_(CONTRAST)
    return vae


def paint_faintly() -> None:
    """Let `weights: random` decode to faint pictures in this process."""
    vae_loading.random_vae = faint_vae


class Windows:
    """Listener: seconds of each finished window."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, name: str, fields: Mapping[str, Any]) -> None:
        if name == "window_finished":
            self.seconds.append(fields["seconds"])


def speech(folder: Path, seconds: float) -> Waveform:
    """The packaged speech, repeated."""
    with as_file(files("omniavatar.assets") / "speech.flac") as path:
        decode_mono(path, folder / "speech.f32", RATE, 0.0)
    samples = np.fromfile(folder / "speech.f32", np.float32)
    return Waveform(np.resize(samples, round(seconds * RATE)), RATE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--scale", required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--windows", type=int, default=0)
    parser.add_argument("--hp", nargs="*", default=[])
    arguments = parser.parse_args()
    values = ["weights=random", f"scale={arguments.scale}", f"image_sizes_720={[list(SIZE)]}"]
    config = load_config(arguments.config, [*values, *arguments.hp]).config
    lead = config.video.silence_duration_s
    whole = make_plan(config, round((arguments.minutes * 60 + lead) * RATE), SIZE)

    def seconds_of(windows: int) -> float:
        step = whole.windows[1].new_frames
        return (whole.windows[0].new_frames + (windows - 1) * step - 1) / config.video.fps - lead

    paint_faintly()
    watch = Windows()
    pipeline = AvatarPipeline.from_config(config, recorder=RunRecorder([watch]))
    with as_file(files("omniavatar.assets")) as assets, tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def make(seconds: float) -> tuple[float, Any]:
            request = AvatarRequest("a person speaks", assets / "portrait.png", speech(folder, seconds))
            watch.seconds.clear()
            begun = time.perf_counter()
            result = pipeline.generate(request, folder / "video.mp4", resume=False)
            return time.perf_counter() - begun, result

        ready, _ = make(seconds_of(2))
        length = seconds_of(arguments.windows) if arguments.windows else arguments.minutes * 60
        taken, result = make(length)
        sidecar = json.loads(result.sidecar.read_text())
        info = probe_video(result.output)
    expected = math.ceil(round((length + lead) * config.video.fps, 6)) + 1
    if info.frames != expected or info.audio is None or abs(info.audio.duration_s - info.duration_s) > 0.2:
        raise SystemExit(f"the file is wrong: {info}, {expected} frames expected")
    later = statistics.median(watch.seconds[1:])
    total = taken + (len(whole.windows) - result.windows) * later
    report = {
        "benchmark": "whole_video",
        "config": Path(arguments.config).name,
        "hp": arguments.hp,
        "scale": arguments.scale,
        "minutes": arguments.minutes,
        "seconds": total,
        "projected": bool(arguments.windows),
        "measured_s": taken,
        "ready_s": ready,
        "windows": len(whole.windows),
        "windows_measured": result.windows,
        "frames_measured": info.frames,
        "window_s": {"median": later, "min": min(watch.seconds[1:]), "max": max(watch.seconds[1:])},
        "forwards": whole.forwards,
        "real_time_factor": total / (arguments.minutes * 60),
        "attention": sidecar["attention"],
        "stages": sidecar["stages"],
        "gpu_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        **where(),
    }
    kind = f"projected from {result.windows} windows" if arguments.windows else "measured"
    print(f"{arguments.minutes:g} min: {total:.1f} s ({kind}), {len(whole.windows)} windows of {later:.3f} s")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
