"""`frames_to_video` and `video_to_frames`."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from media_files import pictures, read_audio, tones, write_audio
from omniavatar import OmniAvatarError, Waveform, frames_to_video, video_to_frames
from omniavatar.errors import InputError, OutputError
from omniavatar.media import frames as module
from omniavatar.media.inspect import probe_video
from omniavatar.media.video import encode_segment

SMALL = (32, 48)
FRAMES = pictures(0, 12, SMALL)


def made(tmp_path: Path, frames: object, **changes: object) -> bytes:
    return frames_to_video(frames, tmp_path / "x.mp4", preset="ultrafast", **changes).read_bytes()  # type: ignore[arg-type]


KINDS = {
    "list of arrays": list(FRAMES),
    "blocks": [FRAMES[:5], FRAMES[5:]],
    "generator": (frame for frame in FRAMES),
    "torch": torch.from_numpy(FRAMES),
    "torch on [0, 1]": torch.from_numpy(FRAMES).float() / 255,
    "half a torch": [torch.from_numpy(frame).double() / 255 for frame in FRAMES],
    "floats": FRAMES.astype(np.float32) / 255,
    "images": [PIL.Image.fromarray(frame) for frame in FRAMES],
    "images with alpha": [PIL.Image.fromarray(frame).convert("RGBA") for frame in FRAMES],
}


@pytest.mark.parametrize("frames", KINDS.values(), ids=KINDS.keys())
def test_every_kind_gives_the_same_file(tmp_path, frames):
    assert made(tmp_path, frames) == made(tmp_path, FRAMES)


def test_the_pictures_are_those_of_the_engines_encoder(tmp_path):
    made(tmp_path, FRAMES, crf=10)
    encode_segment(iter([FRAMES]), tmp_path / "engine.mp4", Fraction(25), SMALL, 10, "ultrafast", 4)
    assert np.array_equal(
        np.stack(list(video_to_frames(tmp_path / "x.mp4"))),
        np.stack(list(video_to_frames(tmp_path / "engine.mp4"))),
    )
    assert np.abs(np.stack(list(video_to_frames(tmp_path / "x.mp4"))).astype(int) - FRAMES).mean() < 4


def test_long_videos_are_encoded_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_FRAMES", 5)
    made(tmp_path, FRAMES, fps=30000 / 1001)
    info = probe_video(tmp_path / "x.mp4")
    assert (info.frames, info.fps, info.width, info.height) == (12, Fraction(30000, 1001), 48, 32)
    assert info.audio is None
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"], "no other file is left"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(tmp_path):
    def peak(count: int) -> int:
        tracemalloc.start()
        made(tmp_path, (FRAMES[number % 12] for number in range(count)))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(2000) < peak(500) + 200_000


@pytest.mark.parametrize("seconds", [0.2, 2.0])
def test_the_sound_is_as_long_as_the_picture(tmp_path, seconds):
    sound = Waveform(tones(seconds, 16000, 1).T, 16000)
    made(tmp_path, FRAMES, sound=sound)
    heard, rate, begin = read_audio(tmp_path / "x.mp4")
    assert rate == 16000 and heard.shape[1] == pytest.approx(0.48 * rate, abs=1100) and begin <= 0
    assert np.abs(heard[0, :2000]).max() > 0.1
    assert (np.abs(heard[0, 6000:7000]).max() < 0.01) == (seconds < 0.3)


def test_a_sound_file(tmp_path):
    path = write_audio(tmp_path / "s.wav", tones(0.5, 44100, 2), 44100, "pcm_s16le", "stereo")
    made(tmp_path, FRAMES, sound=path)
    audio = probe_video(tmp_path / "x.mp4").audio
    assert audio is not None and (audio.codec, audio.sample_rate, audio.channels) == ("aac", 44100, 2)


BAD = [
    ([], {}, "frames: are none"),
    ("x.png", {}, "are of type str"),
    (5, {}, "are of type int"),
    (FRAMES[:, :31], {}, "48x31; H.264 needs an even"),
    ([FRAMES[0], FRAMES[0, :16]], {}, "number 1 is 48x16, the first is 48x32"),
    (
        FRAMES.transpose(0, 3, 1, 2),
        {},
        r"the shape \(12, 3, 32, 48\), not \(H, W, 3\); the channels come last",
    ),
    (FRAMES[..., :1], {}, r"not \(H, W, 3\)$"),
    (FRAMES.astype(np.int32), {}, "are int32; give uint8"),
    (FRAMES.astype(np.float32), {}, "values from .* to 255; floats go from 0 to 1"),
    (np.full((1, 32, 48, 3), np.nan), {}, "values from nan to nan"),
    ([FRAMES[0], "nonsense"], {}, r"the shape \(\)"),
    (FRAMES, {"fps": 0}, "fps: must be a number from 1 to 240; got 0"),
    (FRAMES, {"fps": "25"}, "fps: must be a number"),
    (FRAMES, {"fps": float("nan")}, "fps: must be a number"),
    (FRAMES, {"crf": 99}, "crf: 99 is not between"),
    (FRAMES, {"preset": "best"}, "preset: 'best' is not one of"),
    (FRAMES, {"sound": "missing.wav"}, "missing.wav"),
]


@pytest.mark.parametrize("frames, changes, text", BAD)
def test_bad_frames_are_one_line_and_leave_nothing(tmp_path, frames, changes, text):
    with pytest.raises(InputError, match=text) as caught:
        frames_to_video(frames, tmp_path / "x.mp4", **{"preset": "ultrafast", **changes})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_error_keeps_the_old_file(tmp_path):
    before = made(tmp_path, FRAMES)

    def broken():
        yield FRAMES[0]
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        frames_to_video(broken(), tmp_path / "x.mp4")
    assert (tmp_path / "x.mp4").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name, text", [("x.gif", "ending"), ("no/x.mp4", "folder does not exist")])
def test_bad_paths(tmp_path, name, text):
    with pytest.raises(OutputError, match=text):
        frames_to_video(FRAMES, tmp_path / name)


def test_a_folder_of_that_name(tmp_path):
    (tmp_path / "x.mp4").mkdir()
    with pytest.raises(OmniAvatarError, match=r"x\.mp4"):
        frames_to_video(FRAMES, tmp_path / "x.mp4", preset="ultrafast")


def test_ranges_of_frames(tmp_path):
    made(tmp_path, FRAMES)
    path = tmp_path / "x.mp4"
    every = list(video_to_frames(path))
    assert len(every) == 12 and every[0].dtype == np.uint8 and every[0].shape == (32, 48, 3)
    assert np.array_equal(np.stack(list(video_to_frames(path, 3, 4))), np.stack(every[3:7]))
    assert len(list(video_to_frames(path, 10, 50))) == 2 and not list(video_to_frames(path, 0, 0))
    with pytest.raises(InputError, match="has 12 frames; start must be below that, not 12"):
        list(video_to_frames(path, 12))
    with pytest.raises(InputError, match="must not be negative"):
        list(video_to_frames(path, -1))
    with pytest.raises(InputError, match=r"no\.mp4"):
        list(video_to_frames(tmp_path / "no.mp4"))
