"""Record every event of a run in a file and print where the time went.

python examples/custom_recorder.py --config pocket --log run.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from omniavatar import AvatarPipeline, AvatarRequest, Event, RunRecorder

HERE = Path(__file__).parent


class FileRecorder(RunRecorder):
    """Writes each event as one JSON line; stages are timed by `RunRecorder`."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log = log
        log.write_text("", encoding="utf-8")

    def event(self, event: Event) -> None:
        record = {"event": event.kind, "time": time.time(), **event.as_dict()}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")
        super().event(event)


def slowest(recorder: RunRecorder, count: int) -> list[tuple[str, float]]:
    """The `count` stages with most time of their own, as (name, seconds)."""
    times = [(name, stage.own_seconds) for name, stage in recorder.timings().items()]
    return sorted(times, key=lambda pair: pair[1], reverse=True)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the events and times of a run.")
    parser.add_argument("--config", default="pocket", help="a YAML file, or pocket for the packaged model")
    parser.add_argument("--image", type=Path, default=HERE / "head.png")
    parser.add_argument("--audio", type=Path, default=HERE / "speech.flac")
    parser.add_argument("--output", type=Path, default=Path("recorded.mp4"))
    parser.add_argument("--log", type=Path, default=Path("run.jsonl"))
    options = parser.parse_args()
    recorder = FileRecorder(options.log)
    pipeline = AvatarPipeline.from_config(options.config, recorder=recorder)
    request = AvatarRequest("A person is talking to the camera, still", options.image, options.audio)
    pipeline.generate(request, options.output)
    for name, seconds in slowest(recorder, 5):
        print(f"{seconds:7.2f} s  {name}")


if __name__ == "__main__":
    main()
