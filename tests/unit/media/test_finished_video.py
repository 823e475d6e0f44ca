"""A finished video that differs from its plan in any way is found."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from media_files import FPS, segments
from omniavatar.errors import OutputError
from omniavatar.media.audio import encode_aac_track
from omniavatar.media.check import check_video
from omniavatar.media.video import GrowingVideo
from omniavatar.types import Waveform

LENGTHS = [13, 8, 4]
FRAMES = sum(LENGTHS)
SECONDS = Fraction(FRAMES, FPS)


def sound(folder: Path, seconds: Fraction, rate: int = 16000) -> Path:
    samples = np.random.default_rng(0).normal(0, 0.1, round(seconds * rate)).astype(np.float32)
    encode_aac_track(Waveform(samples, rate), folder / "sound.mp4", 0, seconds)
    return folder / "sound.mp4"


def make(folder: Path, lengths: list[int], track: Path | None) -> Path:
    with GrowingVideo(folder / "partial", folder / "out.mp4", FPS, track) as video:
        for part in segments(folder, lengths):
            video.append(part)
        return video.finish()


@pytest.fixture(scope="module")
def with_sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with_sound")
    return make(folder, LENGTHS, sound(folder, SECONDS))


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("silent"), LENGTHS, None)


def problem_of(
    path: Path, frames: int = FRAMES, seconds: Fraction | None = SECONDS, fps: Fraction = FPS
) -> str:
    with pytest.raises(OutputError) as raised:
        check_video(path, frames, fps, seconds)
    message = str(raised.value)
    assert "\n" not in message and str(path) in message and "the same command again" in message
    return message


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("lengths", [[1], [13, 8, 4], [2] * 10])
def test_whole_videos_pass(tmp_path: Path, rate: int, lengths: list[int]) -> None:
    seconds = Fraction(sum(lengths), FPS)
    check_video(make(tmp_path, lengths, sound(tmp_path, seconds, rate)), sum(lengths), FPS, seconds)


def test_a_silent_video_passes(silent: Path) -> None:
    check_video(silent, FRAMES, FPS, None)


@pytest.mark.parametrize("frames", [FRAMES - 1, FRAMES + 1, 59])
def test_another_number_of_frames(with_sound: Path, silent: Path, frames: int) -> None:
    assert f"has {FRAMES} frames instead of {frames}" in problem_of(with_sound, frames)
    assert f"has {FRAMES} frames instead of {frames}" in problem_of(silent, frames, None)


@pytest.mark.parametrize("change", [-1, 1])
def test_sound_of_another_duration(with_sound: Path, change: int) -> None:
    seconds = SECONDS + change * Fraction(1025 * 2, 16000)
    assert "s of sound" in problem_of(with_sound, seconds=seconds)


def test_missing_and_unplanned_sound(with_sound: Path, silent: Path) -> None:
    assert "1 picture and 0 sound tracks instead of 1 and 1" in problem_of(silent)
    assert "1 picture and 1 sound tracks instead of 1 and 0" in problem_of(with_sound, seconds=None)


def test_another_frame_rate(silent: Path) -> None:
    assert "shows frame 13 at 0.520 s instead of 0.542 s" in problem_of(
        silent, seconds=None, fps=Fraction(24)
    )


def test_frames_at_the_wrong_time(tmp_path: Path, silent: Path) -> None:
    path = remuxed(
        silent, tmp_path / "gap.mp4", lambda index, video: Fraction(3, 4) if 10 < index < 14 else 0
    )
    assert "shows frame" in problem_of(path, seconds=None)


@pytest.mark.parametrize(("frames", "says"), [(10, "sound"), (-1, "")])
def test_late_sound(tmp_path: Path, with_sound: Path, frames: int, says: str) -> None:
    if frames < 0:
        path = remuxed(with_sound, tmp_path / "same.mp4", lambda index, video: 0)
        check_video(path, FRAMES, FPS, SECONDS)
    else:
        path = remuxed(with_sound, tmp_path / "late.mp4", lambda index, video: 0 if video else frames)
        assert says in problem_of(path)


def remuxed(source: Path, target: Path, later: Callable[[int, bool], Fraction | int]) -> Path:
    """A copy whose packets come `later(index, is_video)` frames later."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        streams = [new.add_stream_from_template(stream) for stream in old.streams]
        counts = [0] * len(streams)
        for packet in old.demux():
            if not packet.size:
                continue
            index = packet.stream.index
            shift = later(counts[index], packet.stream.type == "video")
            counts[index] += 1
            ticks = round(shift / FPS / packet.time_base)
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
            packet.stream = streams[index]
            new.mux(packet)
    return target


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95, 0.999])
def test_a_file_that_was_cut(tmp_path: Path, with_sound: Path, share: float) -> None:
    data = with_sound.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * share)])
    assert "out.mp4" not in problem_of(tmp_path / "cut.mp4")


@pytest.mark.parametrize("track", ["video", "audio"])
@pytest.mark.parametrize("number", [0, 3, 7])
def test_a_damaged_packet(tmp_path: Path, with_sound: Path, track: str, number: int) -> None:
    with av.open(str(with_sound)) as container:
        stream = container.streams.video[0] if track == "video" else container.streams.audio[0]
        packet = [packet for packet in container.demux(stream) if packet.size][number]
        start, content = packet.pos, bytes(packet)
    data = with_sound.read_bytes()
    assert data[start : start + len(content)] == content
    damaged = data[:start] + b"\xff" * len(content) + data[start + len(content) :]
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    problem_of(tmp_path / "damaged.mp4")


@pytest.mark.parametrize("content", [b"", b"no video", bytes(1000)])
def test_what_is_no_video(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "none.mp4").write_bytes(content)
    assert "cannot be decoded" in problem_of(tmp_path / "none.mp4")


def test_a_missing_file(tmp_path: Path) -> None:
    assert "cannot be decoded" in problem_of(tmp_path / "missing.mp4")


def test_the_message_names_the_output(tmp_path: Path, silent: Path) -> None:
    with pytest.raises(OutputError, match=r"talk\.mp4: the finished video has 25 frames"):
        check_video(silent, 24, FPS, None, output=tmp_path / "talk.mp4")
