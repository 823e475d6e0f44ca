"""Share of the time from the first to the last window in which the GPU runs a kernel, in an ordinary run.

    python benchmarks/busy.py [--scale 1.3B] [--max-tokens 15000] [--windows 6] [--hp key=value ...]

Full-size random weights, 4 steps, guidance 1, float8 layers, 400x720, a silent video written to disk as
always, in faint pictures (`whole_video.py` says why). It is made twice to load and warm up, then under
torch.profiler, which records kernels and copies only (no CPU activity). The union of the kernels' intervals
over the time from the first kernel to the last; the longest gaps; wall-clock seconds of both runs, so that
the profiler's own cost shows.
A table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from whole_video import paint_faintly

from omniavatar import AvatarPipeline, AvatarRequest
from omniavatar.config.load import load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.engine.recorder import RunRecorder
from omniavatar.profiling.busy import busy
from omniavatar.sampling.windows import window_length

SIZE = (400, 720)


class Trace:
    """Listener: starts the profiler at the first window of the run it is armed for."""

    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CUDA])
        self.armed = False

    def __call__(self, name: str, fields: Mapping[str, Any]) -> None:
        if self.armed and name == "window_started":
            self.armed = False
            torch.cuda.synchronize()
            self.profiler.start()


def configure(arguments: argparse.Namespace) -> PipelineConfig:
    values = [
        "weights=random",
        f"scale={arguments.scale}",
        "num_steps=4",
        "guidance_scale=1",
        "quantize=fp8",
        f"image_sizes_720={[list(SIZE)]}",
        f"max_tokens={arguments.max_tokens}",
    ]
    config = load_config(None, [*values, *arguments.hp]).config
    length = window_length(config.video.max_tokens, *SIZE)
    frames = length + (arguments.windows - 1) * (length - config.video.overlap_frame)
    video = config.video.model_copy(update={"seq_len": frames})
    return config.model_copy(update={"video": video})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", default="1.3B")
    parser.add_argument("--max-tokens", type=int, default=15000)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--hp", action="append", default=[])
    arguments = parser.parse_args()
    config = configure(arguments)
    paint_faintly()
    trace = Trace()
    pipeline = AvatarPipeline.from_config(config, recorder=RunRecorder([trace]))
    with as_file(files("omniavatar.assets")) as assets, tempfile.TemporaryDirectory() as folder:
        request = AvatarRequest("a person", assets / "portrait.png")
        output = Path(folder) / "video.mp4"
        seconds = []
        for profiled in (False, False, True):
            trace.armed = profiled
            begun = time.perf_counter()
            result = pipeline.generate(request, output, resume=False)
            seconds.append(time.perf_counter() - begun)
        trace.profiler.stop()
        stages = json.loads(result.sidecar.read_text())["stages"]
        path = Path(folder) / "trace.json"
        trace.profiler.export_chrome_trace(str(path))
        figures = busy(json.loads(path.read_text())["traceEvents"])
    print("| windows | first to last kernel, s | kernels | with copies | run s | profiled s |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {result.windows} | {figures.seconds:.3f} | {figures.kernels:.2%} | {figures.with_copies:.2%} "
        f"| {seconds[1]:.3f} | {seconds[2]:.3f} |"
    )
    for at, length in figures.gaps:
        print(f"gap of {length * 1e3:.2f} ms at {at:.3f} s")
    summary = {
        "benchmark": "busy",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "scale": arguments.scale,
        "max_tokens": config.video.max_tokens,
        "hp": arguments.hp,
        "windows": result.windows,
        "frames": result.frames,
        "attention": pipeline.models.attention_name,
        "run_s": seconds[1],
        "profiled_run_s": seconds[2],
        "stages": stages,
    }
    print(json.dumps({**summary, **asdict(figures)}))


if __name__ == "__main__":
    main()
