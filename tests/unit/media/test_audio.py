"""Any sound becomes 16 kHz mono of an exact length, or one clear line."""

from __future__ import annotations

import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from media_files import CHANNELS, tones, write_audio
from omniavatar.errors import InputError, OutputError
from omniavatar.media.audio import AudioTrack, decode_mono, measure_audio
from omniavatar.media.containers import missing_tail
from omniavatar.types import Waveform

LEAD = 4800


def mono(source: str | Path | Waveform, folder: Path) -> tuple[np.ndarray, AudioTrack]:
    """Decoded samples without the leading silence, which is checked here."""
    out = folder / "mono.f32"
    track = decode_mono(source, out)
    samples = np.fromfile(out, "<f4")
    assert len(samples) == track.samples and track.lead_samples == LEAD
    assert not samples[:LEAD].any()
    assert measure_audio(source) == track
    return samples[LEAD:], track


def strongest(samples: np.ndarray, count: int, rate: int = 16000) -> list[int]:
    """The `count` strongest frequencies in Hz, rising, read off bins of 1 Hz."""
    spectrum = np.abs(np.fft.rfft(samples[:rate] * np.hanning(min(rate, len(samples))), rate))
    peaks = [i for i in range(1, len(spectrum) - 1) if spectrum[i - 1] < spectrum[i] >= spectrum[i + 1]]
    return sorted(sorted(peaks, key=lambda i: -spectrum[i])[:count])


LOSSLESS = [
    ("wav", "pcm_u8", 8000, "mono"),
    ("wav", "pcm_s16le", 16000, "mono"),
    ("wav", "pcm_s16le", 44100, "stereo"),
    ("wav", "pcm_s24le", 96000, "stereo"),
    ("wav", "pcm_f32le", 48000, "5.1"),
    ("wav", "pcm_f64le", 192000, "stereo"),
    ("wav", "pcm_s32le", 192000, "5.1"),
    ("wav", "pcm_s64le", 16000, "stereo"),
    ("wav", "pcm_s16le", 48000, "7.1"),
    ("flac", "flac", 44100, "stereo"),
    ("flac", "flac", 96000, "5.1"),
    ("mka", "pcm_s16le", 22050, "stereo"),
    ("aiff", "pcm_s16be", 22050, "mono"),
]


@pytest.mark.parametrize(("suffix", "codec", "rate", "layout"), LOSSLESS)
def test_lossless_formats(tmp_path: Path, suffix: str, codec: str, rate: int, layout: str) -> None:
    channels = CHANNELS[layout]
    source = tones(1.5, rate, channels)
    samples, track = mono(write_audio(tmp_path / f"a.{suffix}", source, rate, codec, layout), tmp_path)
    assert (track.source_samples, track.source_rate, track.source_channels) == (1.5 * rate, rate, channels)
    assert track.duration == Fraction(3, 2) and len(samples) == 24000
    assert strongest(samples, channels) == [200 + 60 * c for c in range(channels)]
    # The average of the channels, to the precision of 8 bits and of the resampler.
    expected = tones(1.5, 16000, channels).mean(axis=0)
    assert np.abs(samples - expected)[200:-200].max() < (0.006 if codec == "pcm_u8" else 1e-3)


LOSSY = [
    ("mp3", "libmp3lame", 44100, "stereo", 0),
    ("mp3", "libmp3lame", 16000, "mono", 0),
    ("m4a", "aac", 48000, "5.1", 0),
    ("m4a", "aac", 8000, "mono", 0),
    ("mp4", "aac", 44100, "stereo", 0),
    ("mka", "libopus", 48000, "7.1", 0.03),
    ("ogg", "libopus", 48000, "stereo", 0),
    ("webm", "libopus", 48000, "mono", 0.03),
    ("g722", "g722", 16000, "mono", 0.13),
    ("aac", "aac", 44100, "stereo", 0.07),
]


@pytest.mark.parametrize(("suffix", "codec", "rate", "layout", "slack"), LOSSY)
def test_lossy_formats(tmp_path: Path, suffix: str, codec: str, rate: int, layout: str, slack: float) -> None:
    channels = CHANNELS[layout]
    path = write_audio(tmp_path / f"a.{suffix}", tones(1.5, rate, channels), rate, codec, layout)
    samples, track = mono(path, tmp_path)
    assert (track.source_rate, track.source_channels) == (rate, channels)
    assert 0 <= float(track.duration) - 1.5 <= slack
    assert len(samples) == -(-track.source_samples * 16000 // rate)
    # The low-frequency channel of 5.1 loses its tone to the codec.
    found = strongest(samples[2000:], channels)
    assert set(found) >= {200 + 60 * c for c in range(channels) if c != 3}


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 96000, 192000])
def test_an_impulse_keeps_its_time(tmp_path: Path, rate: int) -> None:
    source = np.zeros((1, rate), np.float32)
    source[0, rate * 2 // 5] = 1
    samples, _ = mono(write_audio(tmp_path / "a.wav", source, rate, "pcm_f32le", "mono"), tmp_path)
    assert abs(int(np.abs(samples).argmax()) - 6400) <= 1
    # Zero phase: the response is symmetric around the impulse.
    assert np.abs(samples[6300:6400] - samples[6401:6501][::-1]).max() < 1e-3


def test_frequencies_above_half_the_new_rate_are_removed(tmp_path: Path) -> None:
    time = np.arange(96000) / 96000
    ultrasound = (0.9 * np.sin(2 * np.pi * 20000 * time)).astype(np.float32)
    samples, _ = mono(Waveform(ultrasound, 96000), tmp_path)
    assert np.abs(samples[200:-200]).max() < 1e-3


def test_mono_is_the_average_and_does_not_clip(tmp_path: Path) -> None:
    loud = np.stack([np.full(16000, 0.9), np.full(16000, 0.9), np.full(16000, -0.3)]).astype(np.float32)
    samples, _ = mono(Waveform(loud.T, 16000), tmp_path)
    assert np.allclose(samples, 0.5, atol=1e-6)
    samples, _ = mono(Waveform(np.full(16000, 1.5), 16000), tmp_path)
    assert np.allclose(samples, 1.5)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 20000),
    rate=st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000]),
)
def test_resampled_length_is_exact(tmp_path_factory: pytest.TempPathFactory, length: int, rate: int) -> None:
    samples, track = mono(Waveform(np.full(length, 0.25), rate), tmp_path_factory.mktemp("exact"))
    assert len(samples) == -(-length * 16000 // rate)
    assert track.source_samples == length


def test_one_sample_and_a_tenth_of_a_second(tmp_path: Path) -> None:
    assert len(mono(Waveform(np.ones(1), 16000), tmp_path)[0]) == 1
    path = write_audio(tmp_path / "short.wav", tones(0.1, 44100, 2), 44100, "pcm_s16le", "stereo")
    assert len(mono(path, tmp_path)[0]) == 1600
    path = write_audio(tmp_path / "short.mp3", tones(0.1, 44100, 2), 44100, "libmp3lame", "stereo")
    assert len(mono(path, tmp_path)[0]) == 1600


def test_other_rate_and_lead(tmp_path: Path) -> None:
    track = decode_mono(Waveform(np.ones(800), 8000), tmp_path / "a.f32", sample_rate=24000, lead_silence_s=0)
    assert (track.samples, track.lead_samples, track.sample_rate) == (2400, 0, 24000)


def _wav(folder: Path, seconds: float = 1.0) -> Path:
    return write_audio(folder / "whole.wav", tones(seconds, 16000, 1), 16000, "pcm_s16le", "mono")


def _picture_only(folder: Path) -> Path:
    from media_files import segments

    return segments(folder, [3])[0]


def _cut(folder: Path, suffix: str, codec: str, share: float, layout: str = "stereo", **options: str) -> Path:
    path = folder / f"whole.{suffix}"
    rate = 48000
    write_audio(path, tones(3, rate, CHANNELS[layout]), rate, codec, layout, options)
    cut = folder / f"cut.{suffix}"
    cut.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return cut


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _no_samples(folder: Path) -> Path:
    with wave.open(str(folder / "none.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
    return folder / "none.wav"


def _nan_file(folder: Path) -> Path:
    samples = tones(1, 16000, 1)
    samples[0, 5000] = np.nan
    return write_audio(folder / "nan.wav", samples, 16000, "pcm_f32le", "mono")


def _damaged_middle(folder: Path) -> Path:
    path = write_audio(folder / "bad.flac", tones(3, 16000, 1), 16000, "flac", "mono")
    data = bytearray(path.read_bytes())
    middle = 8192 + (len(data) - 8192) // 2  # the header block is padded to 8 kB
    data[middle : middle + 2000] = b"\0" * 2000
    return _write(path, bytes(data))


def _damaged_mp3(folder: Path) -> Path:
    path = write_audio(folder / "bad.mp3", tones(3, 16000, 1), 16000, "libmp3lame", "mono")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = b"\0" * 2000
    return _write(path, bytes(data))


BAD = {
    "missing": (lambda d: d / "nothing.wav", "does not exist"),
    "folder": (lambda d: d, "folder"),
    "name too long": (lambda d: d / ("x" * 300), "check the path"),
    "empty": (lambda d: _write(d / "e.mp3", b""), "empty"),
    "text": (lambda d: _write(d / "t.mp3", b"Not a sound. " * 50), "FFmpeg"),
    "zeros": (lambda d: _write(d / "z.wav", b"\0" * 5000), "FFmpeg"),
    "no sound": (_picture_only, "no sound"),
    "no samples": (_no_samples, "no samples"),
    "nan": (_nan_file, "NaN"),
    "wav header only": (lambda d: _write(d / "h.wav", _wav(d).read_bytes()[:44]), "truncated"),
    "wav cut": (lambda d: _cut(d, "wav", "pcm_s16le", 0.6), "truncated"),
    "wav almost whole": (lambda d: _cut(d, "wav", "pcm_s16le", 0.99), "truncated"),
    "flac cut": (lambda d: _cut(d, "flac", "flac", 0.6), "truncated"),
    "mp3 cut": (lambda d: _cut(d, "mp3", "libmp3lame", 0.6), "truncated"),
    "mp3 without a frame count, cut": (
        lambda d: _cut(d, "mp3", "libmp3lame", 0.6, write_xing="0"),
        "last frame is torn",
    ),
    "mp3 damaged": (_damaged_mp3, "damaged"),
    "ogg cut": (lambda d: _cut(d, "ogg", "libopus", 0.6), "truncated"),
    "ogg header": (lambda d: _cut(d, "ogg", "libopus", 0.001), "FFmpeg"),
    "m4a cut": (lambda d: _cut(d, "m4a", "aac", 0.6), "damaged"),
    "m4a index first, cut": (lambda d: _cut(d, "m4a", "aac", 0.6, movflags="+faststart"), "truncated"),
    "flac damaged": (_damaged_middle, "damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources(tmp_path: Path, case: str) -> None:
    make, says = BAD[case]
    path = make(tmp_path)
    out = tmp_path / "mono.f32"
    with pytest.raises(InputError) as raised:
        decode_mono(path, out)
    message = str(raised.value)
    assert str(path) in message and says in message and "\n" not in message
    assert not out.exists() and not list(tmp_path.glob(".mono*"))


@pytest.mark.parametrize(
    ("waveform", "says"),
    [
        (Waveform(np.zeros(0), 16000), "no samples"),
        (Waveform(np.array([0.0, np.nan]), 16000), "NaN"),
        (Waveform(np.array([0.0, np.inf]), 16000), "NaN"),
        (Waveform(np.zeros(100, np.int16), 16000), "int16"),
        (Waveform(np.zeros((2, 3, 4)), 16000), "shape"),
        (Waveform(np.zeros((100, 40)), 16000), "40 channels"),
        (Waveform(np.zeros(100), 0), "sample rate"),
    ],
)
def test_bad_waveforms(tmp_path: Path, waveform: Waveform, says: str) -> None:
    with pytest.raises(InputError) as raised:
        decode_mono(waveform, tmp_path / "mono.f32")
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_stream_of_unknown_length_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = _wav(tmp_path).read_bytes()
    at = whole.index(b"data")
    streamed = whole[: at + 4] + b"\xff\xff\xff\xff" + whole[at + 8 :]
    samples, _ = mono(_write(tmp_path / "streamed.wav", streamed), tmp_path)
    assert len(samples) == 16000
    no_count = write_audio(
        tmp_path / "a.mp3", tones(3, 48000, 1), 48000, "libmp3lame", "mono", {"write_xing": "0"}
    )
    data = no_count.read_bytes()
    frame = 144 * 64000 // 48000
    samples, _ = mono(_write(tmp_path / "between.mp3", data[: len(data) - 40 * frame]), tmp_path)
    assert 1.8 < len(samples) / 16000 < 2.2


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000])
def test_whole_mp3_files_are_not_taken_for_cut(tmp_path: Path, rate: int) -> None:
    for options in ({}, {"write_xing": "0"}, {"id3v2_version": "3"}, {"write_id3v1": "1"}):
        path = write_audio(tmp_path / "a.mp3", tones(0.7, rate, 2), rate, "libmp3lame", "stereo", options)
        assert missing_tail(path) == ""
        path.write_bytes(path.read_bytes()[: -130 if "write_id3v1" in options else -1])
        assert missing_tail(path) == "its last frame is torn"


def test_tags_in_an_old_encoding(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", tones(1, 16000, 1), 16000, "pcm_s16le", "mono")
    info = b"INFOINAM" + (6).to_bytes(4, "little") + "Über \0".encode("latin-1")
    path.write_bytes(path.read_bytes() + b"LIST" + len(info).to_bytes(4, "little") + info)
    assert len(mono(path, tmp_path)[0]) == 16000


def test_mp3_files_joined_end_to_end(tmp_path: Path) -> None:
    part = write_audio(tmp_path / "a.mp3", tones(1, 44100, 2), 44100, "libmp3lame", "stereo").read_bytes()
    samples, _ = mono(_write(tmp_path / "joined.mp3", part * 3), tmp_path)
    assert len(samples) / 16000 == pytest.approx(3, abs=0.15)


def test_the_sound_of_a_video_file(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "talk.mp4", tones(1, 48000, 2), 48000, "aac", "stereo")
    samples, track = mono(path, tmp_path)
    assert track.source_rate == 48000 and len(samples) == 16000


def test_unwritable_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="folder does not exist"):
        decode_mono(Waveform(np.ones(10), 16000), tmp_path / "nowhere" / "mono.f32")


@pytest.mark.slow
def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from omniavatar.media.audio import decode_mono\n"
        "decode_mono(sys.argv[1], sys.argv[3])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "decode_mono(sys.argv[2], sys.argv[3])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    paths = []
    for name, seconds in (("short", 5), ("long", 300)):
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setparams((2, 2, 44100, 0, "NONE", ""))
            for _ in range(seconds):
                file.writeframes(bytes(44100 * 4))
        paths.append(str(tmp_path / f"{name}.wav"))
    answer = subprocess.run(
        [sys.executable, "-c", code, *paths, str(tmp_path / "out.f32")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(answer.stdout) < 6000, "more than 6 MB for 60 times the length (50 MB of samples)"


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("wav", "pcm_s16le"), ("mp3", "libmp3lame"), ("flac", "flac"), ("m4a", "aac"), ("ogg", "libopus")],
)
def test_every_cut_and_every_flipped_byte_gives_sound_or_one_line(
    tmp_path: Path, suffix: str, codec: str
) -> None:
    whole = write_audio(tmp_path / f"a.{suffix}", tones(0.5, 48000, 2), 48000, codec, "stereo").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / f"bad.{suffix}"
    for attempt in range(40):
        data = bytearray(whole)
        if attempt % 2:
            del data[rng.integers(1, len(data)) :]
        else:
            for position in rng.integers(0, len(data), 10):
                data[position] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            measure_audio(path)
        except InputError as error:
            assert "\n" not in str(error)
