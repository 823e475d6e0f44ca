"""What `omniavatar profile` costs: the same request with the ordinary recorder and with the profiling one.

    python -m benchmarks.profile_overhead [--config configs/nano.yaml] [--hp weights=random,scale=1.3B,...]

One pipeline, models loaded once, a warm-up of both, then the two recorders take turns, so that drift of the
machine falls on both. A table, then one line of JSON: medians and fastest of each, the overhead of both
figures, the mean of the turns' differences with its standard error (whole runs differ by more than what is
looked for), and the host's time inside the recorder in one more run, which tells without that noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from omniavatar import AvatarPipeline, AvatarRequest
from omniavatar.config.load import load_config
from omniavatar.engine.recorder import RunRecorder
from omniavatar.measure.ceilings import device_name
from omniavatar.measure.trace import TraceRecorder


class MeteredRecorder(TraceRecorder):
    """Adds up the host's time in its own calls, over all threads, in `spent`."""

    def __init__(self) -> None:
        super().__init__()
        self.spent, self.calls = 0.0, 0
        self._meter = threading.Lock()

    def _took(self, begun: float) -> None:
        with self._meter:
            self.spent += time.perf_counter() - begun
            self.calls += 1

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        stage = super().stage(name)
        stage.__enter__()
        self._took(begun)
        try:
            yield
        finally:
            begun = time.perf_counter()
            stage.__exit__(*sys.exc_info())
            self._took(begun)

    def event(self, name: str, /, **fields: Any) -> None:
        begun = time.perf_counter()
        super().event(name, **fields)
        self._took(begun)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/nano.yaml")
    parser.add_argument("--hp", action="append", default=[])
    parser.add_argument("--repeats", type=int, default=5, help="turns, 2 or more")
    parser.add_argument("--frames", type=int, default=100, help="of a silent video (seq_len)")
    arguments = parser.parse_args()
    config = load_config(arguments.config, [*arguments.hp, f"seq_len={arguments.frames}"]).config
    plain = AvatarPipeline.from_config(config)
    profiled = AvatarPipeline.from_config(config, recorder=TraceRecorder())
    meter = MeteredRecorder()
    metered = AvatarPipeline.from_config(config, recorder=meter)
    profiled.models = metered.models = plain.models
    times: dict[str, list[float]] = {"plain": [], "profiled": []}
    with as_file(files("omniavatar.assets")) as assets, tempfile.TemporaryDirectory() as folder:
        request = AvatarRequest("a person", assets / "portrait.png")
        output = Path(folder) / "video.mp4"
        for pipeline in (plain, profiled, metered):
            pipeline.generate(request, output, resume=False)
        for repeat in range(arguments.repeats):
            turns = [("plain", plain), ("profiled", profiled)]
            for name, pipeline in turns if repeat % 2 else reversed(turns):
                begun = time.perf_counter()
                pipeline.generate(request, output, resume=False)
                times[name].append(time.perf_counter() - begun)
        meter.spent, meter.calls = 0.0, 0
        begun = time.perf_counter()
        metered.generate(request, output, resume=False)
        whole = time.perf_counter() - begun
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = {name: min(values) for name, values in times.items()}
    overhead = medians["profiled"] / medians["plain"] - 1
    least = fastest["profiled"] / fastest["plain"] - 1
    differences = [late / early - 1 for early, late in zip(times["plain"], times["profiled"], strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    print("| recorder | median s | fastest s | slowest s |")
    print("|---|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {medians[name]:.3f} | {fastest[name]:.3f} | {max(values):.3f} |")
    print(f"overhead {overhead:+.2%} of the median, {least:+.2%} of the fastest")
    print(f"mean of the turns {mean:+.2%}, standard error {error:.2%}")
    print(f"in the recorder {meter.spent * 1e3:.2f} ms of {whole:.2f} s, {meter.calls} calls")
    device = plain.models.device
    about = {"device": device_name(device), "torch": torch.__version__, "config": arguments.config}
    result = {"times": times, "overhead_median": overhead, "overhead_fastest": least}
    result |= {"overhead_turns": mean, "standard_error": error}
    result |= {"inside_s": meter.spent, "inside_share": meter.spent / whole, "calls": meter.calls}
    recorders = {"recorders": [RunRecorder.__name__, TraceRecorder.__name__]}
    print(json.dumps({"benchmark": "profile_overhead", **about, **recorders, **result}))


if __name__ == "__main__":
    main()
