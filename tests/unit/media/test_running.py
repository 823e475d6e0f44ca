"""One encoder over several segments: a single key frame, and the same bytes when it is made again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest

from media_files import FPS, SIZE, pictures
from omniavatar.errors import ConfigError
from omniavatar.media.inspect import read_frames
from omniavatar.media.running import (
    RunningEncoder,
    begins_with_key_frame,
    keep,
    packet_count,
    yuv_pictures,
)
from omniavatar.media.video import GrowingVideo

LENGTHS = (9, 8, 5)
LARGE, LARGER = (384, 352), (512, 512)
"""Encoded in four and eight slices."""


def write(
    folder: Path, size: tuple[int, int], crf: float = 18, preset: str = "veryfast"
) -> tuple[list[Path], list[Path]]:
    """Segments of `LENGTHS` and their kept pictures."""
    encoder, start = RunningEncoder(FPS, size, crf, preset), 0
    paths, kept = [], []
    for number, length in enumerate(LENGTHS):
        paths.append(folder / f"segment_{number:05d}.mp4")
        kept.append(folder / f"frames_{number:05d}.mp4")
        shown = yuv_pictures([pictures(start, length, size)], size)
        keep(shown, kept[-1], FPS, size)
        assert encoder.write(shown, paths[-1]) == length
        start += length
    return paths, kept


@pytest.mark.parametrize("size", [SIZE, LARGE])
def test_segments_join_to_a_video_with_one_key_frame(tmp_path: Path, size: tuple[int, int]) -> None:
    paths, _ = write(tmp_path, size)
    with GrowingVideo(tmp_path / "p.mp4", tmp_path / "out.mp4", FPS) as video:
        shown = []
        for path in paths:
            video.append(path)
            shown.append(sum(1 for _ in read_frames(video.partial)))
        video.finish()
    assert shown == list(np.cumsum(LENGTHS))
    assert [packet_count(path) for path in paths] == list(LENGTHS)
    assert [begins_with_key_frame(path) for path in paths] == [True, False, False]
    with av.open(str(tmp_path / "out.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [packet.is_keyframe for packet in packets] == [True] + [False] * (sum(LENGTHS) - 1)
    decoded = np.stack(list(read_frames(tmp_path / "out.mp4")))
    difference = decoded.astype(float) - pictures(0, sum(LENGTHS), size)
    assert np.abs(difference).mean() < 6


@pytest.mark.parametrize("size", [SIZE, LARGE, LARGER])
def test_the_same_bytes_are_made_again(tmp_path: Path, size: tuple[int, int]) -> None:
    """Also by an encoder that saw the first segments only as kept pictures."""
    paths, kept = write(tmp_path, size)
    again = RunningEncoder(FPS, size, 18, "veryfast")
    assert again.replay(kept[0], paths[0]) and again.replay(kept[1], paths[1])
    last = pictures(sum(LENGTHS[:2]), LENGTHS[2], size)
    assert again.write(yuv_pictures([last[:2], last[2:]], size), tmp_path / "last.mp4") == LENGTHS[2]
    assert (tmp_path / "last.mp4").read_bytes() == paths[2].read_bytes()


def test_encoders_beside_each_other_give_the_same_bytes(tmp_path: Path) -> None:
    """Five on few cores: threads of an encoder wait for each other at other times than alone."""
    folders = [tmp_path / str(number) for number in range(6)]
    for folder in folders:
        folder.mkdir()
    alone, _ = write(folders[0], LARGE, preset="medium")
    with ThreadPoolExecutor(5) as pool:
        made = list(pool.map(lambda folder: write(folder, LARGE, preset="medium")[0], folders[1:]))
    for paths in made:
        assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in alone]


def test_a_replay_says_what_is_not_the_same(tmp_path: Path) -> None:
    paths, kept = write(tmp_path, SIZE)
    other = RunningEncoder(FPS, SIZE, 30, "veryfast")
    assert not other.replay(kept[0], paths[0])
    kept[0].write_bytes(kept[0].read_bytes()[:500])
    assert not RunningEncoder(FPS, SIZE, 18, "veryfast").replay(kept[0], paths[0])
    kept[0].unlink()
    assert not RunningEncoder(FPS, SIZE, 18, "veryfast").replay(kept[0], paths[0])


def test_what_cannot_be_encoded() -> None:
    with pytest.raises(ValueError, match="nvenc cannot go on"):
        RunningEncoder(FPS, SIZE, 18, "medium", "nvenc")
    with pytest.raises(ConfigError, match="preset"):
        RunningEncoder(FPS, SIZE, 18, "quick")
    with pytest.raises(ValueError, match="even sizes"):
        yuv_pictures([pictures(0, 1)], (95, 128))
    with pytest.raises(ValueError, match="at least one frame"):
        RunningEncoder(FPS, SIZE, 18, "medium").write([], Path("s.mp4"))
