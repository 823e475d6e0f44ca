"""The times of one model's parts on this machine, as a file, and the seconds of any plan from them.

`python -m omniavatar.measure.times` reads a pickled configuration and prints them as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
import threading
import time
from dataclasses import asdict, dataclass

from omniavatar import __version__
from omniavatar.config.identity import flat_values
from omniavatar.config.schema import PipelineConfig
from omniavatar.device import choose_device, device_name
from omniavatar.measure.benchmark.parts import PartTimer, counts_of, start_costs, window_costs
from omniavatar.measure.projection import StartCosts, WindowCosts, video_seconds
from omniavatar.plan.run import RunPlan
from omniavatar.sampling.step_cache import compute_all

SECONDS = 10.0
"""Of the video whose parts are timed: several full windows."""


@dataclass(frozen=True)
class PartTimes:
    """Medians of the parts, in seconds. tokens, pixels: of the window that was timed."""

    window: WindowCosts
    start: StartCosts
    tokens: int
    pixels: int

    def seconds(self, plan: RunPlan) -> float:
        """Of a plan with windows of about this size; every step counts as computed where that is open."""
        more, larger = plan.tokens / self.tokens, _pixels(plan) / self.pixels
        window = WindowCosts(
            forward=self.window.forward * more,
            skipped_forward=self.window.skipped_forward * more,
            decode=self.window.decode * larger,
            encode=self.window.encode * larger,
            write=self.window.write * larger,
            writers=self.window.writers,
        )
        decided = plan if plan.step_plan is not None else plan.decided(compute_all(plan.steps))
        return video_seconds(window, self.start, counts_of(decided))

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> PartTimes:
        """Raises ValueError, KeyError or TypeError for a text that is not one of `text`."""
        values = json.loads(text)
        window, start = WindowCosts(**values["window"]), StartCosts(**values["start"])
        return cls(window, start, int(values["tokens"]), int(values["pixels"]))


def times_name(config: PipelineConfig) -> str:
    """A file name for the times of this configuration and version on its device."""
    values = [__version__, device_name(choose_device(config.runtime.device)), flat_values(config)]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
    return f"times-{digest[:16]}.json"


def measure_times(config: PipelineConfig) -> PartTimes:
    """Load the model and time its parts. Raises as loading the pipeline does."""
    timer = PartTimer(config, warm_up=1, repeats=2)
    timer.load()
    plan = timer.plan(config, SECONDS)
    window = window_costs(timer.window_timings(plan), plan, config.output)
    return PartTimes(window, start_costs(timer.start_timings()), plan.tokens, _pixels(plan))


def _pixels(plan: RunPlan) -> int:
    return plan.size[0] * plan.size[1] * plan.window_length


def _end_with(parent: int) -> None:
    """End this process when the one that started it has died."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    print(measure_times(pickle.load(sys.stdin.buffer)).text())


if __name__ == "__main__":
    main()
