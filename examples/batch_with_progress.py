"""Make several videos with models loaded once, show the progress, and go on after a bad picture.

python examples/batch_with_progress.py jobs.csv videos --config pocket

jobs.csv has the columns name, image, audio and prompt. On several GPUs use `omniavatar batch` instead.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import omniavatar
from omniavatar import AvatarPipeline, AvatarRequest, Event, OmniAvatarError, RunRecorder


def show_progress(event: Event) -> None:
    """Print one line for each video and each finished window."""
    match event:
        case omniavatar.RequestStarted():
            print(f"{event.name}: {event.frames} frames in {event.windows} windows")
        case omniavatar.WindowFinished():
            done = (event.window + 1) / event.windows
            print(f"  {done:4.0%}, {event.seconds:.1f} s for this window")
        case omniavatar.Message(level="warning"):
            print(f"  warning: {event.text}")


def make_videos(jobs: Path, folder: Path, config: str) -> list[str]:
    """Make a video for each row of `jobs`; returns the names of those that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = AvatarPipeline.from_config(config, recorder=RunRecorder([show_progress]))
    failed = []
    with open(jobs, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            request = AvatarRequest(row["prompt"], row["image"], row["audio"])
            try:
                pipeline.generate(request, folder / f"{row['name']}.mp4")
            except OmniAvatarError as error:
                print(f"{row['name']} failed: {error}")
                failed.append(row["name"])
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a video for each row of a CSV file.")
    parser.add_argument("jobs", type=Path, help="CSV file with the columns name, image, audio, prompt")
    parser.add_argument("folder", type=Path, help="folder of the videos")
    parser.add_argument("--config", default="pocket", help="a YAML file, or pocket for the packaged model")
    options = parser.parse_args()
    failed = make_videos(options.jobs, options.folder, options.config)
    print(f"failed: {', '.join(failed)}" if failed else "all videos are made")


if __name__ == "__main__":
    main()
