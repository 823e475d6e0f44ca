"""Files and folders of live video, from chunks that have gaps."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from omniavatar.live.chunk import LiveChunk
from omniavatar.live.outputs import HEAD, LIST, HlsOutput
from omniavatar.media.streamed import StreamWriter

FPS, RATE = Fraction(16), 16000


def chunk(first: int, frames: int) -> LiveChunk:
    """Frames that differ from each other, from frame `first` on."""
    pictures = np.stack([np.full((64, 64, 3), 10 + 3 * (first + at) % 200, np.uint8) for at in range(frames)])
    sound = np.zeros(round(frames * RATE / FPS), np.int16)
    return LiveChunk(pictures, sound, float(first / FPS), FPS, RATE, False)


def hls(folder: Path, chunks: list[LiveChunk]) -> list[tuple[float, Path]]:
    """The segments of the list that was written, with their stated lengths."""
    output = HlsOutput(folder, partial(StreamWriter, (64, 64), FPS, RATE))
    for each in chunks:
        output.add(each)
    output.finish()
    lines = (folder / LIST).read_text().splitlines()
    return [
        (float(line[8:-1]), folder / after) for line, after in pairwise(lines) if line.startswith("#EXTINF")
    ]


def pictures_of(folder: Path, segment: Path) -> list[tuple[float, float]]:
    """Time and brightness of the pictures of a segment."""
    whole = folder / "one.mp4"
    whole.write_bytes((folder / HEAD).read_bytes() + segment.read_bytes())
    with av.open(str(whole)) as container:
        return [
            (float(each.time), each.to_ndarray(format="gray").mean()) for each in container.decode(video=0)
        ]


@pytest.mark.parametrize("gap", [1, 5, 100])
def test_segments_last_as_long_as_stated_where_frames_were_left_out(tmp_path: Path, gap: int) -> None:
    chunks = [chunk(start, 4) for start in range(0, 40, 4)]
    chunks += [chunk(start, 4) for start in range(40 + gap, 112 + gap, 4)]
    segments = hls(tmp_path, chunks)
    shown = [pictures_of(tmp_path, path) for _, path in segments]
    begins = [pictures[0][0] for pictures in shown]
    ends = [*begins[1:], shown[-1][-1][0] + 1 / 16]
    real = [end - begin for begin, end in zip(begins, ends, strict=True)]
    assert [seconds for seconds, _ in segments] == pytest.approx(real, abs=1e-3)
    assert {seconds for seconds, _ in segments[:-1]} == {2.0}
    assert sum(real) == pytest.approx((112 + gap) / 16, abs=1e-3)
    light = [bright for pictures in shown for _, bright in pictures]
    assert np.ptp(light[40 : 40 + gap]) < 2 and light[39] == pytest.approx(light[40], abs=2)
    assert abs(light[40 + gap] - light[39 + gap]) > 2, "then the picture goes on"


@pytest.mark.parametrize("frames", [1, 31, 32, 33, 36, 64])
def test_the_last_segment_has_the_rest(tmp_path: Path, frames: int) -> None:
    segments = hls(tmp_path, [chunk(start, min(4, frames - start)) for start in range(0, frames, 4)])
    assert [round(16 * seconds) for seconds, _ in segments] == [
        len(pictures_of(tmp_path, path)) for _, path in segments
    ]
    assert sum(seconds for seconds, _ in segments) == pytest.approx(frames / 16, abs=1e-3)
