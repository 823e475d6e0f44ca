"""Serve requests from a queue: warm models, pictures and sounds as bytes, progress, and a limit of time.

python examples/service.py --config pocket --seconds 600
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from queue import SimpleQueue

from omniavatar import AvatarPipeline, AvatarRequest, Event, OmniAvatarError, StepFinished, StoppedError

HERE = Path(__file__).parent
Jobs = SimpleQueue[tuple[bytes, bytes, Path] | None]


def show(event: Event) -> None:
    """Called in the thread that makes the video; an exception here would end the run."""
    if isinstance(event, StepFinished):
        print(f"window {event.window + 1}, step {event.step + 1} of {event.steps}")


def serve(config: str, jobs: Jobs, seconds: float) -> None:
    """Make the videos of `jobs` (picture, sound, output) until None comes, each within `seconds`."""
    with AvatarPipeline.from_config(config, on_event=show) as pipeline:  # frees the models at the end
        pipeline.warm_up()
        while (job := jobs.get()) is not None:
            picture, sound, output = job
            stop = threading.Event()
            timer = threading.Timer(seconds, stop.set)
            timer.start()
            try:
                request = AvatarRequest("A person is talking to the camera, still", picture, sound)
                print(pipeline.generate(request, output, should_stop=stop.is_set).output)
            except StoppedError as error:
                print(f"{output}: {error}")  # the same job goes on after its finished windows
            except OmniAvatarError as error:
                print(f"{output} failed: {error}")
            finally:
                timer.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the videos of a queue with one warm pipeline.")
    parser.add_argument("--config", default="pocket", help="a YAML file, or pocket for the packaged model")
    parser.add_argument("--audio", type=Path, default=HERE / "speech.flac")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit of each video")
    options = parser.parse_args()
    jobs: Jobs = SimpleQueue()
    for name, picture in (("first", (HERE / "head.png").read_bytes()), ("broken", b"no picture")):
        jobs.put((picture, options.audio.read_bytes(), Path(f"{name}.mp4")))
    jobs.put(None)
    serve(options.config, jobs, options.seconds)


if __name__ == "__main__":
    main()
