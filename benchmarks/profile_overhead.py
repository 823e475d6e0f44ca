"""What `omniavatar profile` costs: the same request with the ordinary recorder and with the profiling one.

    python -m benchmarks.profile_overhead [--config configs/nano.yaml] [--hp weights=random,scale=1.3B,...]

One pipeline, models loaded once, a warm-up of both, then the two recorders take turns, so that drift of the
machine falls on both. A table, then one line of JSON: medians, fastest of each, and the overhead of both
figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path

import torch

from omniavatar import AvatarPipeline, AvatarRequest
from omniavatar.config_load import load_config
from omniavatar.profiling.ceilings import device_name
from omniavatar.profiling.recorder import RunRecorder
from omniavatar.profiling.trace import TraceRecorder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/nano.yaml")
    parser.add_argument("--hp", action="append", default=[])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--frames", type=int, default=100, help="of a silent video (seq_len)")
    arguments = parser.parse_args()
    config = load_config(arguments.config, [*arguments.hp, f"seq_len={arguments.frames}"]).config
    plain = AvatarPipeline.from_config(config)
    profiled = AvatarPipeline.from_config(config, recorder=TraceRecorder())
    profiled.components = plain.components
    times: dict[str, list[float]] = {"plain": [], "profiled": []}
    with as_file(files("omniavatar.assets")) as assets, tempfile.TemporaryDirectory() as folder:
        request = AvatarRequest("a person", assets / "portrait.png")
        output = Path(folder) / "video.mp4"
        for pipeline in (plain, profiled):
            pipeline.generate(request, output, resume=False)
        for repeat in range(arguments.repeats):
            turns = [("plain", plain), ("profiled", profiled)]
            for name, pipeline in turns if repeat % 2 else reversed(turns):
                begun = time.perf_counter()
                pipeline.generate(request, output, resume=False)
                times[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = {name: min(values) for name, values in times.items()}
    overhead = medians["profiled"] / medians["plain"] - 1
    least = fastest["profiled"] / fastest["plain"] - 1
    print("| recorder | median s | fastest s | slowest s |")
    print("|---|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {medians[name]:.3f} | {fastest[name]:.3f} | {max(values):.3f} |")
    print(f"overhead {overhead:+.2%} of the median, {least:+.2%} of the fastest")
    device = plain.components.device
    about = {"device": device_name(device), "torch": torch.__version__, "config": arguments.config}
    result = {"times": times, "overhead_median": overhead, "overhead_fastest": least}
    recorders = {"recorders": [RunRecorder.__name__, TraceRecorder.__name__]}
    print(json.dumps({"benchmark": "profile_overhead", **about, **recorders, **result}))


if __name__ == "__main__":
    main()
