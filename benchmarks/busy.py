"""Share of the time from the first to the last window in which the GPU runs a kernel, in an ordinary run.

    python -m benchmarks busy [--scale 1.3B] [--max-tokens 15000] [--windows 6] [--hp key=value ...]

Full-size random weights, 4 steps, guidance 1, float8 layers, 400x720, a silent video written to disk as
always, in faint pictures (`shared/inputs.py` says why). It is made twice to load and warm up, then under
torch.profiler, which records kernels and copies only (no CPU activity). Reports the union of the kernels'
intervals over the time from the first kernel to the last, the longest gaps, and the seconds of both runs,
which show what the profiler costs. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.shared.inputs import paint_faintly
from benchmarks.shared.options import add_hp, make_parser
from benchmarks.shared.report import print_result, print_table
from benchmarks.shared.timing import require_cuda
from omniavatar import AvatarPipeline, AvatarRequest
from omniavatar.assets import PORTRAIT
from omniavatar.config.change import changed
from omniavatar.config.load import load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.engine.events import WindowStarted
from omniavatar.engine.recorder import RunRecorder
from omniavatar.sampling.windows import window_length
from omniavatar.types import Event

SIZE = (400, 720)
Interval = tuple[float, float]
KERNEL = "kernel"
COPIES = ("gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Busy:
    """How much of a trace the GPU was busy.

    seconds: from the start of the first kernel to the end of the last.
    kernels, with_copies: shares of it in which a kernel ran, or a kernel or a copy.
    gaps: the longest stretches without a kernel, (seconds after the first kernel, seconds long).
    """

    seconds: float
    kernels: float
    with_copies: float
    gaps: tuple[Interval, ...]


def united(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of some intervals, as disjoint intervals in order; touching ones become one."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def busy(events: Iterable[Mapping[str, Any]], longest: int = 5) -> Busy:
    """The figures of a Chrome trace's `traceEvents` (microseconds). Raises ValueError if it has no kernels.

    Kernels on several streams overlap, so their union counts, not their sum. A copy between host and device
    is no kernel.
    """
    kernels: list[Interval] = []
    copies: list[Interval] = []
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in (KERNEL, *COPIES):
            start, length = float(event["ts"]) / 1e6, float(event["dur"]) / 1e6
            (kernels if event["cat"] == KERNEL else copies).append((start, start + length))
    if not kernels:
        raise ValueError("the trace has no kernels")
    running = united(kernels)
    first, last = running[0][0], running[-1][1]
    inside = [(max(start, first), min(end, last)) for start, end in copies if start < last and end > first]
    gaps = [(before[1] - first, after[0] - before[1]) for before, after in itertools.pairwise(running)]
    return Busy(
        seconds=last - first,
        kernels=_length(running) / (last - first),
        with_copies=_length(united([*running, *inside])) / (last - first),
        gaps=tuple(sorted(gaps, key=lambda gap: -gap[1])[:longest]),
    )


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


class Trace:
    """Listener: starts the profiler at the first window of the run it is armed for."""

    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CUDA])
        self.armed = False

    def __call__(self, event: Event) -> None:
        if self.armed and isinstance(event, WindowStarted):
            self.armed = False
            torch.cuda.synchronize()
            self.profiler.start()


def configure(options: argparse.Namespace) -> PipelineConfig:
    """The configuration of a silent video of `--windows` windows."""
    values = [
        "weights=random",
        f"scale={options.scale}",
        "num_steps=4",
        "guidance_scale=1",
        "quantize=fp8",
        f"image_sizes_720={[list(SIZE)]}",
        f"max_tokens={options.max_tokens}",
    ]
    config = load_config(None, [*values, *options.hp]).config
    length = window_length(config.video.max_tokens, *SIZE)
    frames = length + (options.windows - 1) * (length - config.video.overlap_frame)
    return changed(config, video={"seq_len": frames})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--scale", default="1.3B")
    parser.add_argument("--max-tokens", type=int, default=15000)
    parser.add_argument("--windows", type=int, default=6)
    add_hp(parser)
    options = parser.parse_args(arguments)
    require_cuda()
    config = configure(options)
    paint_faintly()
    trace = Trace()
    pipeline = AvatarPipeline.from_config(config, recorder=RunRecorder([trace]))
    with tempfile.TemporaryDirectory() as folder:
        request = AvatarRequest("a person", PORTRAIT)
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
    print_table(
        ["windows", "first to last kernel, s", "kernels", "with copies", "run s", "profiled s"],
        [
            [
                result.windows,
                f"{figures.seconds:.3f}",
                f"{figures.kernels:.2%}",
                f"{figures.with_copies:.2%}",
                f"{seconds[1]:.3f}",
                f"{seconds[2]:.3f}",
            ]
        ],
    )
    for at, length in figures.gaps:
        print(f"gap of {length * 1e3:.2f} ms at {at:.3f} s")
    print_result(
        "busy",
        scale=options.scale,
        max_tokens=config.video.max_tokens,
        hp=options.hp,
        windows=result.windows,
        frames=result.frames,
        attention=pipeline.models.attention_name,
        run_s=seconds[1],
        profiled_run_s=seconds[2],
        stages=stages,
        **asdict(figures),
    )
