"""Segments of a job: which begin with a key frame, what is kept to go on, and what happens without it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from engine import interrupt_in, make_pipeline, request
from omniavatar import AvatarPipeline
from omniavatar.engine.events import Message
from omniavatar.engine.segments import key_windows
from omniavatar.media.inspect import probe_video
from omniavatar.media.running import begins_with_key_frame
from omniavatar.sampling.windows import plan_windows

SECONDS = 1.4
"""Five windows: 13 frames, then 8 each."""


@pytest.mark.parametrize(
    ("seconds", "begun", "expected"),
    [
        (0.0, False, {0, 1, 2, 3, 4}),
        (0.5, False, {0, 1, 3}),
        (0.84, False, {0, 2}),
        (0.85, False, {0, 3}),
        (10.0, False, {0}),
        (10.0, True, {0, 1}),
    ],
)
def test_key_frames_come_after_so_many_seconds(seconds: float, begun: bool, expected: set[int]) -> None:
    windows = plan_windows(44, 13, 5)
    assert key_windows(windows, Fraction(25), seconds, begun) == expected


def stopped_at(pipeline: AvatarPipeline, output: Path, window: int) -> Path:
    """The job folder of a run that was interrupted in `window`."""
    interrupt_in(window, pipeline, request(SECONDS), output)
    return output.with_name("out.mp4.job")


@pytest.fixture(scope="module")
def made(nano_checkpoint, cache, tmp_path_factory) -> tuple[AvatarPipeline, Path]:
    """A pipeline with a key frame every two windows, and its uninterrupted video."""
    pipeline = make_pipeline(nano_checkpoint, cache, num_steps=1, key_frame_s=0.5)
    output = tmp_path_factory.mktemp("whole") / "out.mp4"
    assert pipeline.generate(request(SECONDS), output).windows == 5
    return pipeline, output


@pytest.mark.parametrize("window", [2, 3])
def test_a_resumed_video_has_the_same_bytes(made, tmp_path: Path, window: int) -> None:
    """Pictures are kept since the last key frame only."""
    pipeline, whole = made
    job = stopped_at(pipeline, tmp_path / "out.mp4", window)
    done = len(list(job.glob("segment_*")))
    assert [begins_with_key_frame(job / f"segment_{k:05d}.mp4") for k in range(done)] == [
        k in {0, 1, 3} for k in range(done)
    ]
    kept = ["frames_00001.mp4"] if done == 2 else []
    assert [path.name for path in sorted(job.glob("frames_*"))] == kept
    assert pipeline.generate(request(SECONDS), tmp_path / "out.mp4").resumed_windows == done
    assert (tmp_path / "out.mp4").read_bytes() == whole.read_bytes()


def test_without_its_pictures_a_run_goes_on_with_a_key_frame(made, tmp_path: Path) -> None:
    pipeline, _ = made
    job = stopped_at(pipeline, tmp_path / "out.mp4", 2)
    (job / "frames_00001.mp4").unlink()
    said: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, Message):
            said.append(event.text)

    listening = AvatarPipeline.from_config(pipeline.config, on_event=listen)
    result = listening.generate(request(SECONDS), tmp_path / "out.mp4")
    assert result.resumed_windows == 2
    assert [text for text in said if "frames_00001.mp4 is missing; window 3 begins with a key frame" in text]
    assert probe_video(result.output).frames == result.frames


def test_closed_windows_keep_no_pictures(made, tmp_path: Path, nano_checkpoint, cache) -> None:
    pipeline = make_pipeline(nano_checkpoint, cache, num_steps=1, key_frame_s=0)
    job = stopped_at(pipeline, tmp_path / "out.mp4", 3)
    segments = sorted(job.glob("segment_*"))
    assert segments and all(map(begins_with_key_frame, segments))
    assert not list(job.glob("frames_*"))
