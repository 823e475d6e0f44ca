"""Streams that are encoded while their frames come: sync, gaps, fragments, key frames."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from omniavatar.errors import ConfigError
from omniavatar.media.streamed import FragmentSplitter, StreamForm, StreamWriter

SIZE, FPS, RATE = (64, 96), Fraction(25), 48000


def piece(frames: int, bright: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Dark frames with silence; frame `bright` is white and has a click at its start."""
    pictures, sound = np.full((frames, *SIZE, 3), 40, np.uint8), np.zeros(frames * RATE // 25, np.int16)
    if bright is not None:
        pictures[bright] = 250
        sound[bright * RATE // 25 :][:96] = 30000
    return pictures, sound


def decoded(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times and mean brightness of the frames, and the sound from time 0 at RATE."""
    times, light, sound = [], [], np.zeros(10 * RATE, np.float32)
    with av.open(io.BytesIO(data)) as container:
        for frame in container.decode():
            if isinstance(frame, av.VideoFrame):
                times.append(frame.time)
                light.append(frame.to_ndarray(format="gray").mean())
            else:
                values = frame.to_ndarray()[0]
                at = round(frame.time * RATE)
                sound[max(at, 0) : at + len(values)] = values[max(0, -at) :]
    return np.array(times), np.array(light), sound


@pytest.mark.parametrize("form", ["mp4", "mpegts"])
def test_picture_and_sound_are_at_one_time(form: StreamForm) -> None:
    with StreamWriter(SIZE, FPS, RATE, form) as writer:
        data = b"".join(writer.add(*piece(4, 2 if index == 5 else None)) for index in range(10))
        data += writer.finish()
    times, light, sound = decoded(data)
    assert len(times) == 40
    seen, heard = times[light.argmax()], np.abs(sound).argmax() / RATE
    assert abs(heard - seen) <= 0.005
    assert np.allclose(np.diff(times), 0.04, atol=1e-4)


def test_left_out_frames_keep_their_time_with_silence() -> None:
    with StreamWriter(SIZE, FPS, RATE) as writer:
        data = writer.add(*piece(4)) + writer.add(*piece(4), skipped=10) + writer.add(*piece(4, 0))
        data += writer.finish()
    times, light, sound = decoded(data)
    assert np.diff(times).max() == pytest.approx(11 * 0.04, abs=1e-3)
    assert abs(times[light.argmax()] - np.abs(sound).argmax() / RATE) <= 0.005


def test_bytes_come_with_the_frames() -> None:
    """A viewer gets a fragment at most 0.2 s after its frames were given."""
    with StreamWriter(SIZE, FPS, RATE) as writer:
        sizes = [len(writer.add(*piece(4))) for _ in range(10)]
        assert writer.mime.startswith('video/mp4; codecs="avc1.')
    assert all(sizes[2:])


def test_fragments_from_key_frame_to_key_frame_play_alone() -> None:
    splitter, fragments, noise = FragmentSplitter(), [], np.random.default_rng(0)
    with StreamWriter(SIZE, FPS, RATE, key_s=0.4, fragment_s=0) as writer:
        for _ in range(10):
            pictures = noise.integers(0, 255, (4, *SIZE, 3), np.uint8)  # cuts make no other key frames
            fragments += splitter.add(writer.add(pictures, piece(4)[1]))
        fragments += splitter.add(writer.finish())
    assert len(fragments) == 4
    times, _, _ = decoded(splitter.head + fragments[2])
    assert len(times) == 10


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="crf"):
        StreamWriter(SIZE, FPS, RATE, crf=99)
    with pytest.raises(ValueError, match="even"):
        StreamWriter((63, 64), FPS, RATE)
