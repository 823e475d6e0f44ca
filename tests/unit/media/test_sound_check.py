"""What is wrong with a sound is said in one line, and the model hears the voice all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from media_files import tones, write_audio
from omniavatar.errors import InputError
from omniavatar.media.audio import AudioTrack, decode_mono, measure_audio
from omniavatar.types import Waveform

RATE = 16000


def heard(source: Path | Waveform, folder: Path) -> tuple[np.ndarray, AudioTrack]:
    track = decode_mono(source, folder / "mono.f32", lead_silence_s=0)
    assert measure_audio(source, lead_silence_s=0) == track
    assert all(note.startswith("audio: ") and "\n" not in note for note in track.notes)
    return np.fromfile(folder / "mono.f32", "<f4"), track


def voice(seconds: float = 2) -> np.ndarray:
    return tones(seconds, RATE, 1)[0]


NOISE = np.random.default_rng(0).normal(0, 0.01, 2 * RATE).astype(np.float32)

CANCELLING = {
    "inverted": lambda v: [v, -v],
    "inverted and louder": lambda v: [0.8 * v, -v],
    "inverted with noise": lambda v: [v + NOISE, -v],
    "two pairs": lambda v: [v, -v, v, -v],
    "inverted in 5.1": lambda v: [v, -v, 0 * v, 0 * v, 0 * v, 0 * v],
    "a third inverted": lambda v: [1.1 * v, np.where(np.arange(len(v)) < len(v) // 3, -v, v)],
    "inverted and mostly silent": lambda v: [v * (np.arange(len(v)) < RATE), -v * (np.arange(len(v)) < RATE)],
}


@pytest.mark.parametrize("case", CANCELLING)
def test_channels_that_cancel(tmp_path: Path, case: str) -> None:
    channels = np.stack(CANCELLING[case](voice())).astype(np.float32)
    samples, track = heard(Waveform(channels.T, RATE), tmp_path)
    loudest = int(np.square(channels).sum(1).argmax())
    assert np.array_equal(samples, channels[loudest])
    assert len(track.notes) == 1 and f"follows channel {loudest + 1} alone" in track.notes[0]


AVERAGED = {
    "the same": lambda v: [v, v],
    "one silent": lambda v: [v, 0 * v],
    "different": lambda v: list(tones(2, RATE, 2)),
    "one of six": lambda v: [0 * v, 0 * v, v, 0 * v, 0 * v, 0 * v],
    "one of eight": lambda v: [v] + [0 * v] * 7,
    "wide stereo": lambda v: [v + 3 * NOISE, v - 3 * NOISE],
    "half inverted": lambda v: [v, -0.3 * v],
}


@pytest.mark.parametrize("case", AVERAGED)
def test_other_channels_are_averaged(tmp_path: Path, case: str) -> None:
    channels = np.stack(AVERAGED[case](voice())).astype(np.float32)
    samples, track = heard(Waveform(channels.T, RATE), tmp_path)
    assert np.array_equal(samples, channels.mean(axis=0, dtype=np.float32)) and not track.notes


@pytest.mark.parametrize("level", [0, 1e-5, 5e-4])
@pytest.mark.parametrize("channels", [1, 2])
def test_silence_is_said(tmp_path: Path, level: float, channels: int) -> None:
    noise = np.random.default_rng(1).uniform(-level, level, (RATE, channels)).astype(np.float32)
    _, track = heard(Waveform(noise, RATE), tmp_path)
    assert len(track.notes) == 1 and "it is silent" in track.notes[0]


def test_clipping_and_too_loud_sounds_are_said(tmp_path: Path) -> None:
    clipped = np.clip(10 * voice(), -1, 1)
    assert "is clipped" in heard(Waveform(clipped, RATE), tmp_path)[1].notes[0]
    path = write_audio(tmp_path / "a.wav", clipped[None], RATE, "pcm_s16le", "mono")
    assert "is clipped" in heard(path, tmp_path)[1].notes[0]
    samples, track = heard(Waveform(10 * voice(), RATE), tmp_path)
    assert np.array_equal(samples, 10 * voice()) and "3.0 times full scale" in track.notes[-1]
    assert not heard(Waveform(3.3 * voice(), RATE), tmp_path)[1].notes, "just below full scale"


@pytest.mark.parametrize("scale", [127, 16000, 32767, 2**31, 1e30, 3e38])
@pytest.mark.parametrize("form", ["file", "memory"])
def test_samples_beyond_full_scale_are_refused(tmp_path: Path, scale: float, form: str) -> None:
    loud = (voice() / 0.3 * scale).astype(np.float32)
    source: Path | Waveform = Waveform(loud, RATE)
    if form == "file":
        source = write_audio(tmp_path / "a.wav", loud[None], RATE, "pcm_f32le", "mono")
    with pytest.raises(InputError, match="full scale of float samples is 1") as raised:
        decode_mono(source, tmp_path / "mono.f32")
    assert "\n" not in str(raised.value) and not (tmp_path / "mono.f32").exists()


def test_a_64_bit_sample_beyond_32_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="infinite"):
        decode_mono(Waveform(np.full(100, 1e300), RATE), tmp_path / "mono.f32")


def test_added_silence_is_said(tmp_path: Path) -> None:
    sound = tones(1, 48000, 1)
    late = write_audio(
        tmp_path / "late.mka", sound, 48000, "pcm_s16le", "mono", moved=lambda time: time + 0.5
    )
    samples, track = heard(late, tmp_path)
    assert (
        len(samples) == 24000 and np.abs(samples[:7900]).max() < 1e-3 and "starts at 0.50 s" in track.notes[0]
    )
    gap = write_audio(
        tmp_path / "gap.mka",
        sound,
        48000,
        "pcm_s16le",
        "mono",
        moved=lambda time: None if 0.4 < time < 0.7 else time,
    )
    assert "0.30 s without sound" in heard(gap, tmp_path)[1].notes[0]
    live = write_audio(
        tmp_path / "live.mka", sound, 48000, "pcm_s16le", "mono", moved=lambda time: time + 7200
    )
    samples, track = heard(live, tmp_path)
    assert len(samples) == 16000 and not track.notes, "the clock of a live stream"


def test_joined_parts_of_another_rate_and_layout(tmp_path: Path) -> None:
    parts = []
    for number, (rate, layout) in enumerate([(16000, "mono"), (48000, "stereo"), (44100, "mono")]):
        channels = 2 if layout == "stereo" else 1
        sound = np.repeat(tones(0.5, rate, 1), channels, axis=0)
        for suffix, codec in (("wav", "pcm_s16le"), ("ogg", "flac")):
            path = tmp_path / f"{number}.{suffix}"
            parts.append((suffix, write_audio(path, sound, rate, codec, layout).read_bytes()))
    for suffix in ("wav", "ogg"):
        path = tmp_path / f"joined.{suffix}"
        path.write_bytes(b"".join(data for kind, data in parts if kind == suffix))
        samples, track = heard(path, tmp_path)
        assert track.source_rate == 16000 and len(samples) == 24000
        expected = np.tile(tones(0.5, RATE, 1)[0], 3)
        assert np.abs(samples - expected)[np.r_[100:7900, 8100:15900, 16100:23900]].max() < 0.01


def test_several_data_chunks_and_chunks_between(tmp_path: Path) -> None:
    whole = write_audio(tmp_path / "a.wav", tones(1, RATE, 1), RATE, "pcm_s16le", "mono").read_bytes()
    at = whole.index(b"data")
    head, body = whole[:at], whole[at + 8 :]
    half = len(body) // 2

    def chunk(tag: bytes, data: bytes) -> bytes:
        return tag + len(data).to_bytes(4, "little") + data + b"\0" * (len(data) % 2)

    note = chunk(b"LIST", b"INFOINAM\x04\0\0\0abc\0")
    split = head + chunk(b"data", body[:half]) + note + chunk(b"data", body[half:]) + note
    (tmp_path / "b.wav").write_bytes(split)
    expected, _ = heard(tmp_path / "a.wav", tmp_path)
    assert np.array_equal(heard(tmp_path / "b.wav", tmp_path)[0], expected)
    tags = b"TAG" + b"x" * 125, b"ID3\x04" + b"y" * 3000, b"LIST\xff\xff\0\0" + b"z" * 2000
    for tail in (note, b"\0" * 5000, *tags):
        (tmp_path / "c.wav").write_bytes(whole + tail)
        assert np.array_equal(heard(tmp_path / "c.wav", tmp_path)[0], expected), tail[:8]
