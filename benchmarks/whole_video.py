"""Audio to finished mp4: one whole video with full-size random weights, or its first windows projected.

    python -m benchmarks whole_video --config configs/inference_1.3B_optimized.yaml --scale 1.3B
        [--minutes 5] [--windows 0] [--size 400x720] [--hp key=value ...]
    python -m benchmarks whole_video --config configs/flashhead.yaml --scale 1.3B --size 512x512
        --hp quantize=fp8 [--hp decoder=taehv]
    python -m benchmarks whole_video --config configs/livetalk.yaml --scale 1.3B --size 512x512
        --hp quantize=fp8 [--hp decoder=taehv]

The packaged speech, repeated to `--minutes`, drives the packaged portrait. A video of two windows (of a
block-causal model: until its cache is full and its passes are captured; of FlashHead and LeapTalk: eight)
first loads the models and compiles the kernels (`ready_s`, not counted), in two steps where their number
can be chosen. Counted are reading the audio, wav2vec 2.0, every window, encoding and writing, until the file
has its final name. With `--windows N` only N windows are made; the projection adds the median of the windows
after the first for each window left out.
The file is checked: number of frames, length of both streams. Pictures are faint (`shared/inputs.py` says
why). Prints the result, then one line of JSON.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.inputs import CHUNKS_FIRST, RATE, faint_portrait, paint_faintly, speech
from benchmarks.shared.options import add_config, add_hp, make_parser, size_of
from benchmarks.shared.report import print_result
from omniavatar import AvatarPipeline, AvatarRequest
from omniavatar.assets import PORTRAIT
from omniavatar.config.load import load_config
from omniavatar.engine.events import WindowFinished
from omniavatar.engine.recorder import RunRecorder
from omniavatar.media.inspect import probe_video
from omniavatar.plan.run import plan_run
from omniavatar.types import Event, SamplingParams

WARM_STEPS = (
    2  # of the first video where the steps can be chosen: a dense and a sparse one compile every kernel
)


class Windows:
    """Listener: of each finished window, its seconds and the bytes of live tensors on the GPU."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.held: list[int] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, WindowFinished):
            self.seconds.append(event.seconds)
            self.held.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)

    def clear(self) -> None:
        self.seconds.clear()
        self.held.clear()

    def held_gib(self) -> list[float]:
        """The most of the second and of the last quarter."""
        return [max(part) / 2**30 for part in quarters(self.held)]


def quarters(values: list[Any]) -> tuple[list[Any], list[Any]]:
    """The second and the last quarter."""
    quarter = max(1, len(values) // 4)
    return values[quarter : 2 * quarter + 1], values[-quarter:]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    add_config(parser)
    parser.add_argument("--scale", required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--windows", type=int, default=0, help="windows to make; 0: all")
    parser.add_argument("--size", type=size_of, default="400x720", help="height x width")
    add_hp(parser)
    options = parser.parse_args(arguments)
    size = list(options.size)
    values = ["weights=random", f"scale={options.scale}", f"image_sizes_720={[size]}"]
    config = load_config(options.config, [*values, *options.hp]).config
    lead = config.video.silence_duration_s
    portrait = 0 if config.family.chunk is not None else 1
    whole = plan_run(config, config.video.sizes[0], round((options.minutes * 60 + lead) * RATE))
    if len(whole.windows) < 2:
        raise SystemExit("error: the video has one window only; give more --minutes")

    def seconds_of(windows: int) -> float:
        step = whole.windows[1].new_frames
        shown = whole.windows[0].new_frames + (windows - 1) * step - portrait
        return shown / config.video.fps - lead

    paint_faintly()
    prompt = "a person speaks" if config.family.text else ""
    image = faint_portrait() if config.video.color_match else PORTRAIT
    watch = Windows()
    pipeline = AvatarPipeline.from_config(config, recorder=RunRecorder([watch]))
    with tempfile.TemporaryDirectory() as name:

        def make(seconds: float, sampling: SamplingParams) -> tuple[float, Any]:
            request = AvatarRequest(prompt, image, speech(seconds), sampling)
            watch.clear()
            begun = time.perf_counter()
            result = pipeline.generate(request, Path(name) / "video.mp4", resume=False)
            return time.perf_counter() - begun, result

        causal = whole.causal
        warming = 2 if causal is None else causal.slots + causal.rolling + 1
        quick = SamplingParams(
            num_steps=None if config.sampling.timesteps else min(config.sampling.num_steps, WARM_STEPS)
        )
        ready, _ = make(seconds_of(warming if whole.chunk is None else CHUNKS_FIRST), quick)
        length = seconds_of(options.windows) if options.windows else options.minutes * 60
        taken, result = make(length, SamplingParams())
        sidecar = json.loads(result.sidecar.read_text())
        info = probe_video(result.output)
    expected = math.ceil(round((length + lead) * config.video.fps, 6)) + portrait
    if info.frames != expected or info.audio is None or abs(info.audio.duration_s - info.duration_s) > 0.2:
        raise SystemExit(f"error: {expected} frames and sound of the same length expected, got {info}")
    later = statistics.median(watch.seconds[1:])
    total = taken + (len(whole.windows) - result.windows) * later
    kind = f"projected from {result.windows} windows" if options.windows else "measured"
    print(f"{options.minutes:g} min: {total:.1f} s ({kind}), {len(whole.windows)} windows of {later:.3f} s")
    print_result(
        "whole_video",
        config=Path(options.config).name,
        hp=options.hp,
        scale=options.scale,
        size=size,
        minutes=options.minutes,
        seconds=total,
        projected=bool(options.windows),
        measured_s=taken,
        ready_s=ready,
        windows=len(whole.windows),
        windows_measured=result.windows,
        frames_measured=info.frames,
        window_s={"median": later, "min": min(watch.seconds[1:]), "max": max(watch.seconds[1:])},
        quarters_s=[statistics.median(part) for part in quarters(watch.seconds)],
        forwards=whole.forwards,
        real_time_factor=total / (options.minutes * 60),
        attention=sidecar["attention"],
        stages=sidecar["stages"],
        held_gib=watch.held_gib(),
        gpu_peak_gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    )
