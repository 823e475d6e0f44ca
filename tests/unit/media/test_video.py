"""The growing video: exact frames, sound in time, playable at any moment, the same bytes after a resume."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from media_files import CHANNELS, FPS, SIZE, pictures, read_audio, segments, tones, write_audio
from omniavatar.errors import ConfigError, InputError, ResumeError
from omniavatar.media.audio import encode_aac_track
from omniavatar.media.h264 import PRESETS
from omniavatar.media.inspect import probe_video, read_frames
from omniavatar.media.video import GrowingVideo, encode_segment
from omniavatar.types import Waveform

LENGTHS = [13, 1, 2, 8, 4]


def grow(folder: Path, parts: list[Path], audio: Path | None = None, name: str = "out.mp4") -> Path:
    with GrowingVideo(folder / f"{name}.partial", folder / name, FPS, audio) as video:
        for part in parts:
            video.append(part)
        return video.finish()


def presentation_times(path: Path) -> list[Fraction]:
    with av.open(str(path)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def number_of(frame: np.ndarray) -> float:
    """The frame number `media_files.pictures` wrote into the grey of the lower part."""
    return float(frame[SIZE[0] // 2 :].mean() - 20) / 2


def boxes(data: bytes) -> list[str]:
    kinds, position = [], 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kinds.append(data[position + 4 : position + 8].decode())
        position += length
    assert position == len(data), "the last box is cut"
    return kinds


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), preset=st.sampled_from(PRESETS[:6]))
def test_any_lengths_give_every_frame_at_its_time(tmp_path: Path, lengths: list[int], preset: str) -> None:
    parts, start = [], 0
    for index, length in enumerate(lengths):
        parts.append(tmp_path / f"{index}.mp4")
        encode_segment([pictures(start, length)], parts[-1], FPS, SIZE, preset=preset)
        start += length
    path = grow(tmp_path, parts)
    assert presentation_times(path) == [i / FPS for i in range(start)]
    info = probe_video(path)
    assert (info.frames, info.fps, info.width, info.height) == (start, FPS, SIZE[1], SIZE[0])
    assert info.duration_s == pytest.approx(start / 25) and info.audio is None
    for index, frame in enumerate(read_frames(path)):
        assert number_of(frame) == pytest.approx(index, abs=0.9)
    with av.open(str(path)) as container:
        decode_times = [p.dts for p in container.demux(video=0) if p.dts is not None]
    assert all(a < b for a, b in itertools.pairwise(decode_times))


@pytest.mark.parametrize("fps", [Fraction(16), Fraction(30000, 1001), Fraction(47, 2), Fraction(60)])
def test_other_frame_rates(tmp_path: Path, fps: Fraction) -> None:
    parts = []
    for index, length in enumerate([1, 7, 3]):
        parts.append(tmp_path / f"{index}.mp4")
        encode_segment([pictures(0, length)], parts[-1], fps, SIZE)
    with GrowingVideo(tmp_path / "p.mp4", tmp_path / "f.mp4", fps) as video:
        assert [video.append(part) for part in parts] == [1, 8, 11]
        video.finish()
    assert presentation_times(tmp_path / "f.mp4") == [i / fps for i in range(11)]
    assert probe_video(tmp_path / "f.mp4").fps == fps


def test_the_file_plays_after_every_append(tmp_path: Path) -> None:
    parts = segments(tmp_path, LENGTHS)
    total = sum(LENGTHS)
    sound = encode_aac_track(
        Waveform(tones(2, 16000, 1)[0], 16000), tmp_path / "a.mp4", 0.34, total / FPS
    ).path
    partial = tmp_path / "growing.mp4"
    with GrowingVideo(partial, tmp_path / "out.mp4", FPS, sound) as video:
        for part in parts:
            frames = video.append(part)
            assert presentation_times(partial) == [i / FPS for i in range(frames)]
            info = probe_video(partial)
            assert info.audio is not None
            assert 0 <= info.audio.duration_s - frames / 25 + 1e-9 <= 1024 / 16000
            samples, rate, first = read_audio(partial)
            assert first == 0 and Fraction(samples.shape[1], rate) >= frames / FPS
            assert not (tmp_path / "out.mp4").exists()
        video.finish()
    assert not partial.exists()
    assert boxes((tmp_path / "out.mp4").read_bytes())[:2] == ["ftyp", "moov"]
    assert "moof" not in boxes((tmp_path / "out.mp4").read_bytes())


def test_killed_in_the_middle_of_an_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of the last fragment reached the disk, the file opens and shows the frames before."""
    parts = segments(tmp_path, [10, 10])
    partial, synced = tmp_path / "growing.mp4", []
    real_fsync = os.fsync

    def fsync(handle: int) -> None:
        real_fsync(handle)
        synced.append(partial.read_bytes())

    with GrowingVideo(partial, tmp_path / "out.mp4", FPS) as video:
        video.append(parts[0])
        whole = partial.stat().st_size
        monkeypatch.setattr(os, "fsync", fsync)
        video.append(parts[1])
    monkeypatch.undo()
    written, lifted = synced
    assert lifted == partial.read_bytes() and len(written) == len(lifted) and written != lifted
    for cut in (whole + 4, whole + 8, whole + 40, whole + 300, len(written) - 100, len(written)):
        partial.write_bytes(written[:cut])
        assert presentation_times(partial) == [i / FPS for i in range(10)]


def test_resumed_is_uninterrupted_byte_for_byte(tmp_path: Path) -> None:
    parts = segments(tmp_path, LENGTHS)
    wave = Waveform(tones(1.1, 44100, 2).T, 44100)
    sound = encode_aac_track(wave, tmp_path / "a.mp4", 0.34, sum(LENGTHS) / FPS).path
    once = grow(tmp_path, parts, sound, "once.mp4")

    with GrowingVideo(tmp_path / "p.mp4", tmp_path / "twice.mp4", FPS, sound) as video:
        for part in parts[:3]:
            video.append(part)
    again = tmp_path / "again"
    again.mkdir()
    sound = encode_aac_track(wave, again / "a.mp4", 0.34, sum(LENGTHS) / FPS).path
    for part in segments(again, LENGTHS)[3:]:
        os.replace(part, tmp_path / part.name)  # the later windows, encoded by the second run
    with GrowingVideo(tmp_path / "p.mp4", tmp_path / "twice.mp4", FPS, sound) as video:
        for part in parts:
            video.append(part)
        twice = video.finish()
    assert once.read_bytes() == twice.read_bytes()


@pytest.mark.slow
def test_kill_minus_nine(tmp_path: Path) -> None:
    parts = segments(tmp_path, [13, 1, 8])
    code = (
        "import os, signal, sys\nfrom fractions import Fraction\n"
        "from omniavatar.media.video import GrowingVideo\n"
        "video = GrowingVideo(sys.argv[1], sys.argv[2], Fraction(25))\n"
        "for part in sys.argv[3:]: video.append(part)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    partial = tmp_path / "growing.mp4"
    run = subprocess.run(
        [sys.executable, "-c", code, str(partial), str(tmp_path / "out.mp4"), *map(str, parts)]
    )
    assert run.returncode == -signal.SIGKILL
    assert presentation_times(partial) == [i / FPS for i in range(22)]
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 96000, 192000])
@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
def test_sound_is_in_time_with_the_picture(tmp_path: Path, rate: int, layout: str) -> None:
    channels = CHANNELS[layout]
    impulse_s = 0.5
    source = np.zeros((channels, rate), np.float32)
    click = np.hanning(max(4, rate // 2000)) * 0.9
    at = round(impulse_s * rate) - len(click) // 2
    for channel in range(channels):
        if layout != "5.1" or channel != 3:
            source[channel, at : at + len(click)] = click
    path = write_audio(tmp_path / "click.wav", source, rate, "pcm_f32le", layout)
    frames = 40
    delay = Fraction(3, 10) + 1 / FPS
    track = encode_aac_track(path, tmp_path / "a.mp4", delay, frames / FPS)
    assert track.sample_rate == min(rate, 48000) and track.channels == channels
    video = grow(tmp_path, segments(tmp_path, [13, 20, 7]), track.path)
    samples, out_rate, first = read_audio(video)
    assert first == 0 and out_rate == track.sample_rate and len(samples) == channels
    expected = impulse_s + float(delay)
    for channel in range(channels):
        if layout != "5.1" or channel != 3:
            found = np.abs(samples[channel]).argmax() / out_rate
            assert abs(found - expected) < 0.001, f"{(found - expected) * 1000:.2f} ms off"
    info = probe_video(video)
    assert info.audio is not None and info.audio.codec == "aac"
    assert info.audio.duration_s == pytest.approx(frames / 25, abs=1 / out_rate)


def test_the_silence_in_front_is_silent(tmp_path: Path) -> None:
    track = encode_aac_track(Waveform(tones(1, 16000, 1)[0], 16000), tmp_path / "a.mp4", 0.34, 1.5)
    samples, rate, _ = read_audio(track.path)
    assert np.abs(samples[0, : int(0.30 * rate)]).max() < 1e-3
    assert np.abs(samples[0, int(0.36 * rate) : rate]).max() > 0.25
    assert np.abs(samples[0, int(1.42 * rate) :]).max() < 1e-3  # filled up to 1.5 s


@pytest.mark.parametrize(
    ("channels", "rate", "kept", "kept_rate", "bit_rate"),
    [
        (1, 44100, 1, 44100, 96_000),
        (2, 44100, 2, 44100, 192_000),
        (6, 48000, 6, 48000, 576_000),
        (8, 48000, 6, 48000, 576_000),
        (4, 48000, 2, 48000, 192_000),
        (2, 192000, 2, 48000, 192_000),
        (2, 96000, 2, 48000, 192_000),
        (1, 88200, 1, 48000, 96_000),
        (2, 64000, 2, 48000, 192_000),
        (1, 10000, 1, 11025, 66_150),
        (1, 8000, 1, 8000, 48_000),
    ],
)
def test_rates_and_channels_of_the_track(
    tmp_path: Path, channels: int, rate: int, kept: int, kept_rate: int, bit_rate: int
) -> None:
    wave = Waveform(tones(0.3, rate, channels).T, rate)
    track = encode_aac_track(wave, tmp_path / "a.mp4", 0, 0.4)
    assert (track.channels, track.sample_rate, track.bit_rate) == (kept, kept_rate, bit_rate)
    assert track.samples == round(0.4 * kept_rate)
    samples, out_rate, _ = read_audio(track.path)
    assert (len(samples), out_rate) == (kept, kept_rate)


def test_the_sound_keeps_its_quality(tmp_path: Path) -> None:
    source = tones(2, 44100, 2)
    track = encode_aac_track(Waveform(source.T, 44100), tmp_path / "a.mp4", 0, 2)
    samples, _, _ = read_audio(track.path)
    error = samples[:, 4096:80000] - source[:, 4096:80000]
    assert 10 * np.log10((source**2).mean() / (error**2).mean()) > 30, "signal to noise below 30 dB"


@pytest.mark.parametrize(
    "colour",
    [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (224, 172, 140)],
)
def test_colours_are_bt709(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    frames = np.broadcast_to(np.array(colour, np.uint8), (3, *SIZE, 3))
    path = tmp_path / "flat.mp4"
    encode_segment([frames], path, FPS, SIZE, crf=10)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        tags = (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc)
        planes = frame.to_ndarray()[: SIZE[0]]
    assert tags == (1, 1, 1, 1)
    red, green, blue = (value / 255 for value in colour)
    luma = 16 + 219 * (0.2126 * red + 0.7152 * green + 0.0722 * blue)
    assert abs(planes.mean() - luma) < 1.01
    shown = next(read_frames(path))
    assert np.abs(shown.astype(int) - colour).max() <= 4


def test_the_same_frames_give_the_same_bytes_from_any_thread(tmp_path: Path) -> None:
    def encode(index: int) -> bytes:
        path = tmp_path / f"{index}.mp4"
        encode_segment([pictures(0, 9)], path, FPS, SIZE)
        return path.read_bytes()

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(encode, range(6)))) == 1


def test_frames_may_come_in_blocks(tmp_path: Path) -> None:
    frames = pictures(0, 11)
    assert encode_segment(iter([frames[:4], frames[4:4], frames[4:]]), tmp_path / "a.mp4", FPS, SIZE) == 11
    encode_segment([frames], tmp_path / "b.mp4", FPS, SIZE)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_bad_encoder_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(ConfigError, match=r"preset.*medium"):
        encode_segment([pictures(0, 1)], path, FPS, SIZE, preset="quick")
    with pytest.raises(ConfigError, match="crf"):
        encode_segment([pictures(0, 1)], path, FPS, SIZE, crf=60)
    with pytest.raises(ValueError, match="even"):
        encode_segment([pictures(0, 1)], path, FPS, (95, 128))
    with pytest.raises(ValueError, match="uint8"):
        encode_segment([pictures(0, 1).astype(float)], path, FPS, SIZE)
    with pytest.raises(ValueError, match="at least one frame"):
        encode_segment([], path, FPS, SIZE)
    assert not list(tmp_path.iterdir())


def test_segments_that_do_not_fit(tmp_path: Path) -> None:
    (first,) = segments(tmp_path, [5])
    small, fast, cut = (tmp_path / name for name in ("small.mp4", "fast.mp4", "cut.mp4"))
    encode_segment([pictures(0, 5, (64, 64))], small, FPS, (64, 64), preset="veryfast")
    encode_segment([pictures(0, 5)], fast, Fraction(50), SIZE, preset="veryfast")
    cut.write_bytes(first.read_bytes()[:300])
    with GrowingVideo(tmp_path / "p.mp4", tmp_path / "f.mp4", FPS) as video:
        video.append(first)
        for bad, says in ((small, "another size"), (fast, "50 frames"), (cut, "damaged")):
            with pytest.raises(ResumeError) as raised:
                video.append(bad)
            assert str(bad) in str(raised.value) and says in str(raised.value)
        assert video.append(first) == 10
        video.finish()
    assert presentation_times(tmp_path / "f.mp4") == [i / FPS for i in range(10)]


def test_finishing_too_early_is_a_bug_of_the_caller(tmp_path: Path) -> None:
    (part,) = segments(tmp_path, [5])
    sound = encode_aac_track(Waveform(tones(1, 16000, 1)[0], 16000), tmp_path / "a.mp4", 0, 2).path
    with GrowingVideo(tmp_path / "p.mp4", tmp_path / "f.mp4", FPS, sound) as video:
        with pytest.raises(ValueError, match="at least one segment"):
            video.finish()
        video.append(part)
        with pytest.raises(ValueError, match="sound continues"):
            video.finish()


def test_looking_into_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    sound = write_audio(tmp_path / "sound.m4a", tones(1, 16000, 1), 16000, "aac", "mono")
    for path, says in (
        (tmp_path / "text.mp4", "cannot be read"),
        (tmp_path / "none.mp4", "does not exist"),
        (sound, "no picture"),
    ):
        with pytest.raises(InputError, match=says):
            probe_video(path)
        with pytest.raises(InputError, match=says):
            next(read_frames(path))
