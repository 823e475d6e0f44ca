"""Segments of a job: which begin with a key frame, what is kept to go on, and what happens without it."""

from __future__ import annotations

import json
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

from engine import interrupt_in, make_pipeline, request
from omniavatar import AvatarPipeline
from omniavatar.config.load import load_config
from omniavatar.engine.events import Message
from omniavatar.engine.host import Host
from omniavatar.engine.segments import encoders, key_windows, places
from omniavatar.errors import OutputError
from omniavatar.media.inspect import probe_video
from omniavatar.media.running import begins_with_key_frame
from omniavatar.plan.run import plan_run
from omniavatar.sampling.windows import plan_windows

SECONDS = 1.4
"""Five windows: 13 frames, then 8 each."""
SETTINGS = {"num_steps": 1, "key_frame_s": 0.5, "blend_frames": 3}
"""Key frames in windows 0, 1 and 3."""


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
    pipeline = make_pipeline(nano_checkpoint, cache, **SETTINGS)
    output = tmp_path_factory.mktemp("whole") / "out.mp4"
    assert pipeline.generate(request(SECONDS), output).windows == 5
    return pipeline, output


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_a_resumed_video_has_the_same_bytes(made, tmp_path: Path, window: int) -> None:
    """Pictures are kept since the last key frame only."""
    pipeline, whole = made
    job = stopped_at(pipeline, tmp_path / "out.mp4", window)
    done = len(list(job.glob("segment_*")))
    assert [begins_with_key_frame(job / f"segment_{k:05d}.mp4") for k in range(done)] == [
        k in {0, 1, 3} for k in range(done)
    ]
    kept = {2: ["frames_00001.mp4"], 4: ["frames_00003.mp4"]}.get(done, [])
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


class ManyCores(Host):
    """A host with cores for eight encoders, which encodes a window when `first` lets it."""

    encoders = 8

    def __init__(self) -> None:
        self.written: dict[str, threading.Event] = {
            f"segment_{k:05d}.mp4": threading.Event() for k in range(5)
        }
        self.order: list[str] = []

    def encode_segment(self, frames, path, **options):
        self.first(path.name)
        count = super().encode_segment(frames, path, **options)
        self.order.append(path.name)
        self.written[path.name].set()
        return count

    def first(self, name: str) -> None:
        """What happens before a window is encoded."""


def test_encoders_work_beside_each_other_and_give_the_same_bytes(
    made, tmp_path: Path, nano_checkpoint, cache
) -> None:
    """The encoder that began in window 3 is there before the one of window 1 is done."""

    class SlowEncoder(ManyCores):
        def first(self, name: str) -> None:
            if name in ("segment_00000.mp4", "segment_00001.mp4"):
                assert self.written["segment_00004.mp4"].wait(60)
            elif name == "segment_00003.mp4":
                time.sleep(0.2)

    host = SlowEncoder()
    result = make_pipeline(nano_checkpoint, cache, host=host, **SETTINGS).generate(
        request(SECONDS), tmp_path / "out.mp4"
    )
    assert host.order[:2] == ["segment_00003.mp4", "segment_00004.mp4"]
    assert host.order.index("segment_00001.mp4") < host.order.index("segment_00002.mp4")
    assert result.output.read_bytes() == made[1].read_bytes()


def test_a_run_goes_on_where_an_encoder_failed_behind_a_later_one(
    made, tmp_path: Path, nano_checkpoint, cache
) -> None:
    """The windows of the later encoder are made again; those after the failed one were not written."""

    class FullDisk(ManyCores):
        def first(self, name: str) -> None:
            if name == "segment_00001.mp4":
                assert self.written["segment_00004.mp4"].wait(60)
                raise OutputError("disk full")

    host = FullDisk()
    pipeline = make_pipeline(nano_checkpoint, cache, host=host, **SETTINGS)
    with pytest.raises(OutputError, match="disk full"):
        pipeline.generate(request(SECONDS), tmp_path / "out.mp4")
    job = tmp_path / "out.mp4.job"
    assert json.loads((job / "job.json").read_text())["done"] == 1
    assert sorted(host.order) == ["segment_00000.mp4", "segment_00003.mp4", "segment_00004.mp4"]
    pipeline, whole = made
    assert pipeline.generate(request(SECONDS), tmp_path / "out.mp4").resumed_windows == 1
    assert (tmp_path / "out.mp4").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("cores", "side", "seconds", "at_once", "waiting"),
    [
        (1, 512, 60, 1, 2),
        (2, 512, 60, 2, 5),
        (8, 512, 60, 6, 17),
        (8, 512, 600, 8, 23),
        (8, 512, 9, 1, 8),
        (8, 1024, 600, 2, 6),
    ],
)
def test_a_fast_model_has_as_many_encoders_as_cores_memory_and_length_allow(
    cores: int, side: int, seconds: int, at_once: int, waiting: int
) -> None:
    class Cores(Host):
        encoders = cores

    values = ["weights=random", "scale=nano", f"image_sizes_720=[[{side},{side}]]", "overlap_frame=1"]
    config = load_config(None, [*values, f"max_tokens={13 * side * side // 256}"]).config
    made = plan_run(config, (side, side), seconds * 16000)
    output = load_config(None, []).config.output
    keys = sorted(key_windows(made.windows, Fraction(made.fps), output.key_frame_s, False))
    assert (encoders(output, made, "x264", Cores()), places(Cores(), made, keys)) == (at_once, waiting)
