import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniavatar.errors import ConfigError
from omniavatar.sampling.windows import (
    count_windows,
    frames_for,
    padded_audio_frames,
    plan_windows,
    window_length,
)

lengths = st.integers(1, 30).map(lambda n: 4 * n + 1)


@pytest.mark.parametrize(("max_tokens", "frames"), [(30000, 105), (20000, 69), (15000, 53)])
def test_published_window_lengths(max_tokens, frames):
    assert window_length(max_tokens, 400, 720) == frames


@given(st.integers(1, 100_000), st.sampled_from([(400, 720), (720, 720), (96, 160), (720, 1280)]))
def test_window_length_is_one_plus_four_n(max_tokens, size):
    try:
        length = window_length(max_tokens, *size)
    except ConfigError as error:
        need = int(str(error).split("at least ")[1].split()[0])
        assert need > max_tokens
        assert window_length(need, *size) >= 5
        return
    assert length % 4 == 1
    assert length <= max_tokens * 1024 // (size[0] * size[1])


@given(st.data(), st.integers(0, 3000), lengths)
def test_windows_cover_every_frame_once(data, audio_frames, length):
    overlap = data.draw(st.integers(0, (length - 5) // 4).map(lambda n: 4 * n + 1))
    windows = plan_windows(audio_frames, length, overlap)
    covered = [f for w in windows for f in range(w.first_new_frame, w.first_new_frame + w.new_frames)]
    assert covered == list(range(audio_frames + 1))
    assert all(w.new_frames > 0 for w in windows)
    assert len(windows) == count_windows(audio_frames, length, overlap)
    for before, after in itertools.pairwise(windows):
        assert after.start + overlap == before.start + length
        assert after.given_latents == (3 + overlap) // 4
    rows = padded_audio_frames(len(windows), length, overlap)
    assert windows[-1].start + length == rows + 1
    assert rows >= audio_frames


@pytest.mark.parametrize(("length", "overlap"), [(53, 4), (52, 5), (53, 53), (53, 57), (53, -3)])
def test_impossible_windows(length, overlap):
    with pytest.raises(ConfigError, match="overlap_frame"):
        plan_windows(100, length, overlap)


def test_five_minutes_at_the_guides_settings():
    """7,500 frames and 0.3 s of silence: the counts the guide's configurations lead to."""
    frames = frames_for((300 * 16000) + 4800, 25)
    assert frames == 7508
    assert count_windows(frames, 105, 13) == 82
    assert count_windows(frames, 53, 5) == 157


def test_frames_are_counted_exactly():
    """Fault of the original: float division gives one frame too many for some lengths."""
    by_floats = []
    for frames in range(1, 4000):
        samples = frames * 640
        assert frames_for(samples, 25) == frames
        assert frames_for(samples + 1, 25) == frames + 1
        import math

        if math.ceil(samples / 16000 * 25) != frames:
            by_floats.append(frames)
    assert by_floats, "the float formula has become exact: this regression test proves nothing any more"


@given(st.integers(0, 10**8), st.integers(1, 60))
def test_frames_for_is_the_smallest_cover(samples, fps):
    frames = frames_for(samples, fps)
    assert Fraction(frames, fps) >= Fraction(samples, 16000)
    assert frames == 0 or Fraction(frames - 1, fps) < Fraction(samples, 16000)
