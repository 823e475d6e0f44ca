"""The cost of `omniavatar profile`: the same request with the ordinary recorder and with the profiling one.

    python -m benchmarks profile_overhead [--config configs/nano.yaml] [--hp weights=random,scale=1.3B,...]

One pipeline, models loaded once, a warm-up of both recorders. Then the recorders take turns, so that drift of
the machine affects both alike. Reports medians and fastest runs of each, the overhead by both figures, and
the mean of the turns' differences with its standard error, because whole runs differ by more than the
overhead. One more run meters the host's time inside the recorder, which is free of that noise.
Prints a table, then one line of JSON.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.shared.options import add_config, add_hp, add_repeats, make_parser
from benchmarks.shared.report import print_result, print_table
from omniavatar import AvatarPipeline, AvatarRequest
from omniavatar.assets import PORTRAIT
from omniavatar.config.load import load_config
from omniavatar.engine.recorder import RunRecorder
from omniavatar.measure.trace import TraceRecorder
from omniavatar.types import Event


class MeteredRecorder(TraceRecorder):
    """Adds up the host's seconds inside the recorder, over all threads, in `spent`."""

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

    def event(self, event: Event) -> None:
        begun = time.perf_counter()
        super().event(event)
        self._took(begun)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    add_config(parser, "configs/nano.yaml")
    add_hp(parser)
    add_repeats(parser)
    parser.add_argument("--frames", type=int, default=100, help="of a silent video (seq_len)")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error("--repeats: a standard error needs 2 or more")
    config = load_config(options.config, [*options.hp, f"seq_len={options.frames}"]).config
    plain = AvatarPipeline.from_config(config)
    profiled = AvatarPipeline.from_config(config, recorder=TraceRecorder())
    meter = MeteredRecorder()
    metered = AvatarPipeline.from_config(config, recorder=meter)
    profiled.models = metered.models = plain.models
    times: dict[str, list[float]] = {"plain": [], "profiled": []}
    with tempfile.TemporaryDirectory() as folder:
        request = AvatarRequest("a person", PORTRAIT)
        output = Path(folder) / "video.mp4"

        def seconds(pipeline: AvatarPipeline) -> float:
            begun = time.perf_counter()
            pipeline.generate(request, output, resume=False)
            return time.perf_counter() - begun

        for pipeline in (plain, profiled, metered):
            seconds(pipeline)
        for repeat in range(options.repeats):
            turns = [("plain", plain), ("profiled", profiled)]
            for name, pipeline in turns if repeat % 2 else reversed(turns):
                times[name].append(seconds(pipeline))
        meter.spent, meter.calls = 0.0, 0
        whole = seconds(metered)
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = {name: min(values) for name, values in times.items()}
    overhead = medians["profiled"] / medians["plain"] - 1
    least = fastest["profiled"] / fastest["plain"] - 1
    differences = [late / early - 1 for early, late in zip(times["plain"], times["profiled"], strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    print_table(
        ["recorder", "median s", "fastest s", "slowest s"],
        [
            [name, f"{medians[name]:.3f}", f"{fastest[name]:.3f}", f"{max(values):.3f}"]
            for name, values in times.items()
        ],
    )
    print(f"overhead {overhead:+.2%} of the median, {least:+.2%} of the fastest")
    print(f"mean of the turns {mean:+.2%}, standard error {error:.2%}")
    print(f"in the recorder {meter.spent * 1e3:.2f} ms of {whole:.2f} s, {meter.calls} calls")
    print_result(
        "profile_overhead",
        plain.models.device,
        config=options.config,
        recorders=[RunRecorder.__name__, TraceRecorder.__name__],
        times=times,
        overhead_median=overhead,
        overhead_fastest=least,
        overhead_turns=mean,
        standard_error=error,
        inside_s=meter.spent,
        inside_share=meter.spent / whole,
        calls=meter.calls,
    )
