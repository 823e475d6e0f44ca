"""Every container and codec that FFmpeg writes here, whole and in the ways that files come out of life.

The reference is FFmpeg's own time line (`aresample` with `async` and `first_pts`), read without this package.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
import pytest

from media_files import read_audio, write_audio
from omniavatar.errors import InputError
from omniavatar.media.audio import decode_mono, encode_aac_track
from omniavatar.media.open_file import TOLERANT

pytestmark = pytest.mark.slow

SECONDS = 1.1  # more than one Ogg page
MS = 16  # samples of the model's sound

PLAIN = [
    ("wav", "pcm_s16le"), ("wav", "pcm_f32le"), ("wav", "pcm_mulaw"), ("wav", "adpcm_ms"),
    ("wav", "adpcm_ima_wav"), ("wav", "libmp3lame"), ("w64", "pcm_s16le"), ("aiff", "pcm_s16be"),
    ("caf", "pcm_s16be"), ("au", "pcm_s16be"), ("flac", "flac"), ("mp3", "libmp3lame"),
    ("mp2", "mp2"), ("aac", "aac"), ("ac3", "ac3"), ("eac3", "eac3"),
    ("avi", "libmp3lame"), ("avi", "pcm_s16le"), ("wv", "wavpack"), ("tta", "tta"),
    ("voc", "pcm_u8"), ("amr", "libopencore_amrnb"), ("g722", "g722"), ("sox", "pcm_s32le"),
    ("ircam", "pcm_s16le"), ("rm", "ac3"), ("sbc", "sbc"), ("aptx", "aptx"),
]  # fmt: skip
"""Formats without time stamps."""

STAMPED = [
    ("ogg", "libopus"), ("ogg", "vorbis"), ("mka", "aac"), ("mka", "libopus"),
    ("mka", "libmp3lame"), ("mka", "pcm_s16le"), ("mka", "flac"), ("mka", "ac3"),
    ("mka", "vorbis"), ("webm", "libopus"), ("m4a", "aac"), ("m4a", "alac"),
    ("mp4", "libmp3lame"), ("mp4", "libopus"), ("mp4", "flac"), ("mp4", "ac3"),
    ("mov", "aac"), ("mov", "pcm_s16le"), ("3gp", "aac"), ("f4v", "aac"),
    ("flv", "libmp3lame"), ("flv", "aac"), ("ts", "aac"), ("ts", "mp2"),
    ("ts", "ac3"), ("ts", "libopus"), ("mpg", "mp2"), ("vob", "ac3"),
    ("nut", "pcm_s16le"), ("nut", "libmp3lame"), ("wtv", "mp2"),
]  # fmt: skip
BROADCAST = ("ts", "mpg", "vob")
MOVIES = ("m4a", "mp4", "mov", "3gp", "f4v")


def sweep(rate: int, channels: int) -> np.ndarray:
    """A tone that rises through speech: every 50 ms of it is unlike the others."""
    time = np.arange(round(SECONDS * rate)) / rate
    one = 0.4 * np.sin(2 * np.pi * (200 * time + 1200 * time**2))
    return np.stack([one] * channels).astype(np.float32)


def written(
    folder: Path, suffix: str, codec: str, moved: Callable[[float], float | None] = lambda time: time
) -> Path:
    rate = {"amr": 8000, "g722": 16000, "sbc": 16000}.get(suffix, 48000)
    layout = "stereo" if codec in ("aptx", "sbc", "vorbis", "wavpack") else "mono"
    sound = sweep(rate, 1 if layout == "mono" else 2)
    return write_audio(folder / f"a.{suffix}", sound, rate, codec, layout, moved=moved)


def reference(path: Path) -> np.ndarray:
    """The sound at 16 kHz as FFmpeg places it by time stamps, from the first stamp of broadcast formats."""
    with av.open(str(path), **TOLERANT) as container:
        counts = container.format.name == "mp3" or path.suffix[1:] in BROADCAST
        frames = list(container.decode(audio=0))
    first = frames[0]
    rate, zero = first.sample_rate, Fraction(0)
    if counts:  # an MP3 states the priming that was cut; broadcast starts its clock anywhere
        zero = first.pts * first.time_base
    graph = av.filter.Graph()
    time_base = Fraction(1, rate)
    chain = [
        graph.add_abuffer(
            sample_rate=rate, format=first.format.name, layout=first.layout.name, time_base=time_base
        ),
        graph.add("aresample", "async=1:min_hard_comp=0.05:first_pts=0"),
        graph.add("aformat", "sample_fmts=fltp:channel_layouts=mono"),
        graph.add("abuffersink"),
    ]
    graph.link_nodes(*chain).configure()
    blocks: list[np.ndarray] = []
    for frame in [*frames, None]:
        if frame is not None:
            time = None if frame.pts is None else frame.pts * frame.time_base - zero
            frame.time_base = time_base
            frame.pts = None if time is None else round(time * rate)
        graph.push(frame)
        try:
            while True:
                blocks.append(graph.pull().to_ndarray()[0])
        except (av.error.BlockingIOError, av.error.EOFError):
            pass
    whole = np.concatenate(blocks)
    step = rate / 16000
    return np.interp(np.arange(int(len(whole) / step)) * step, np.arange(len(whole)), whole).astype("f4")


def heard(path: Path, folder: Path) -> np.ndarray:
    decode_mono(path, folder / "mono.f32", lead_silence_s=0)
    return np.fromfile(folder / "mono.f32", "<f4")


def shown(path: Path, folder: Path, samples: int) -> np.ndarray:
    """The viewer's track at 16 kHz."""
    track = encode_aac_track(path, folder / "track.mp4", 0, Fraction(samples, 16000))
    sound, rate, _ = read_audio(track.path)
    mono = sound.mean(axis=0)
    step = rate / 16000
    return np.interp(np.arange(int(len(mono) / step)) * step, np.arange(len(mono)), mono).astype("f4")


def lag(one: np.ndarray, other: np.ndarray) -> int:
    """The shift in samples at which the two are most alike, between -160 and 160."""
    length = min(len(one), len(other))
    one, other = one[:length], other[:length]
    products = np.fft.irfft(np.fft.rfft(one, 2 * length) * np.conj(np.fft.rfft(other, 2 * length)))
    near = np.concatenate([products[-160:], products[:161]])
    return int(near.argmax()) - 160


def assert_same_time(found: np.ndarray, expected: np.ndarray, ends: int = MS) -> None:
    """Within 1 ms in each tenth of a second that has sound; lengths within `ends`."""
    assert abs(len(found) - len(expected)) <= ends, (len(found), len(expected))
    for start in range(0, min(len(found), len(expected)) - 1600, 1600):
        a, b = found[start : start + 1600], expected[start : start + 1600]
        power = sorted(float(np.square(x).mean()) for x in (a, b))
        assert power[0] > 2e-3 or power[1] < 1e-2, f"silent in one of them at {start / 16000} s"
        if power[0] > 2e-3:
            assert abs(lag(a, b)) <= MS, f"at {start / 16000} s"


def assert_agrees(path: Path, folder: Path) -> np.ndarray:
    """The model's sound agrees with FFmpeg and with the viewer's track. A codec's padding may differ."""
    found = heard(path, folder)
    assert_same_time(found, reference(path), ends=20 * MS)
    assert_same_time(shown(path, folder, len(found)), found, ends=128 * MS)
    return found


@pytest.mark.parametrize(("suffix", "codec"), PLAIN + STAMPED)
def test_whole(tmp_path: Path, suffix: str, codec: str) -> None:
    found = assert_agrees(written(tmp_path, suffix, codec), tmp_path)
    assert abs(len(found) / 16000 - SECONDS) < 0.06


@pytest.mark.parametrize(("suffix", "codec"), STAMPED)
def test_late(tmp_path: Path, suffix: str, codec: str) -> None:
    path = written(tmp_path, suffix, codec, lambda time: time + 0.5)
    found = assert_agrees(path, tmp_path)
    late = 0 if suffix in BROADCAST else 0.5
    assert abs(len(found) / 16000 - SECONDS - late) < 0.06


@pytest.mark.parametrize(("suffix", "codec"), STAMPED)
def test_gap(tmp_path: Path, suffix: str, codec: str) -> None:
    path = written(tmp_path, suffix, codec, lambda time: None if 0.3 <= time < 0.5 else time)
    found = assert_agrees(path, tmp_path)
    # The writer of PCM in MOV knows no packets, and a page of Ogg has one time stamp, at its end.
    if suffix != "ogg" and (suffix, codec) != ("mov", "pcm_s16le"):
        assert abs(len(found) / 16000 - SECONDS) < 0.06


@pytest.mark.parametrize(("suffix", "codec"), PLAIN + STAMPED)
def test_joined(tmp_path: Path, suffix: str, codec: str) -> None:
    path = written(tmp_path, suffix, codec)
    part = heard(path, tmp_path)
    path.write_bytes(path.read_bytes() * 2)
    assert_same_time(heard(path, tmp_path), np.concatenate([part, part]))


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [pair for pair in STAMPED if pair[0] in MOVIES and pair[1] not in ("alac", "pcm_s16le")],
)
def test_trimmed(tmp_path: Path, suffix: str, codec: str) -> None:
    """An edit list that starts 0.25 s later, and one that ends at 0.6 s."""
    late = written(tmp_path, suffix, codec, lambda time: time - 0.25)
    found = assert_agrees(late, tmp_path)
    whole = heard(written(tmp_path, suffix, codec), tmp_path)
    assert suffix == "f4v" or abs(len(whole) - len(found) - 4000) < 60 * MS
    data = bytearray(late.read_bytes())
    at = data.find(b"elst")
    if at < 0:
        return
    # Version 0, one entry: duration in the movie's time scale (1000).
    data[at + 12 : at + 16] = struct.pack(">I", 600)
    late.write_bytes(data)
    assert abs(len(heard(late, tmp_path)) / 16000 - 0.6) < 0.05


EDITS = {
    "a gap": [(500, 0), (300, None), (500, 500)],
    "late": [(700, None), (1000, 0)],
    "late and a gap": [(200, None), (500, 0), (300, None), (300, 500)],
    "a cut": [(300, 0), (300, 500)],
    "a repetition": [(500, 0), (500, 0), (100, 0)],
}
"""Edits of a movie: milliseconds, and where they start in the sound; None is silence."""


@pytest.mark.parametrize("case", EDITS)
@pytest.mark.parametrize(("suffix", "codec", "priming"), [("m4a", "aac", 1024), ("mov", "pcm_s16le", 0)])
def test_edit_lists(tmp_path: Path, suffix: str, codec: str, priming: int, case: str) -> None:
    """Silence and borders are where the edits say. FFmpeg starts an edit at a whole frame (21 ms)."""
    path = written(tmp_path, suffix, codec)
    whole = heard(path, tmp_path)
    data = path.read_bytes()
    places = [(long, -1 if at is None else priming + 48 * at) for long, at in EDITS[case]]
    entries = [struct.pack(">IiI", long, place, 1 << 16) for long, place in places]
    at = data.index(b"elst") - 4
    table = b"elst\0\0\0\0" + struct.pack(">I", len(entries)) + b"".join(entries)
    added = len(table) + 4 - struct.unpack_from(">I", data, at)[0]
    data = data[:at] + struct.pack(">I", len(table) + 4) + table + data[at + len(table) + 4 - added :]
    for box in (b"edts", b"trak", b"moov"):
        size = data.rindex(box, 0, at) - 4
        (old,) = struct.unpack_from(">I", data, size)
        data = data[:size] + struct.pack(">I", old + added) + data[size + 4 :]
    path.write_bytes(data)
    found = heard(path, tmp_path)
    assert abs(len(found) - 16 * sum(long for long, _ in EDITS[case])) <= 22 * MS
    position = 0
    for long, at in EDITS[case]:
        part = found[16 * position + 50 : 16 * (position + long) - 50]
        if at is None:
            assert np.abs(part).max() < 0.01, f"silence from {position} ms"
        else:
            expected = whole[16 * at + 50 :][: len(part)]
            shift = lag(part[:1600], expected[:1600])
            assert abs(shift) <= 22 * MS, f"the edit at {position} ms"
            assert np.sqrt(np.square(part[:-400]).mean()) > 0.2
        position += long


def _patch(data: bytes, tag: bytes, offset: int, form: str, change: Callable[[int], int]) -> bytes:
    at = data.index(tag) + len(tag) + offset
    (value,) = struct.unpack_from(form, data, at)
    new = struct.pack(form, change(value))
    return data[:at] + new + data[at + len(new) :]


HEADERS = {
    ("wav", "pcm_s16le"): [(b"data", 0, "<I")],
    ("w64", "pcm_s16le"): [(b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a", 0, "<Q")],
    ("aiff", "pcm_s16be"): [(b"SSND", 0, ">I"), (b"COMM", 6, ">I")],
    ("au", "pcm_s16be"): [(b".snd", 4, ">I")],
    ("caf", "pcm_s16be"): [(b"data", 0, ">Q")],
    ("flac", "flac"): [(b"fLaC", 18, ">I")],
    ("m4a", "aac"): [(b"mdhd", 16, ">I")],
    ("mov", "pcm_s16le"): [(b"mdhd", 16, ">I")],
    ("mka", "libopus"): [(b"\x44\x89\x88", 0, ">d")],
    ("mka", "pcm_s16le"): [(b"\x44\x89\x88", 0, ">d")],
}
"""Where the length lies in a header."""


@pytest.mark.parametrize(("suffix", "codec"), HEADERS)
@pytest.mark.parametrize("share", [0.5, 1.5])
def test_a_header_with_a_wrong_length(tmp_path: Path, suffix: str, codec: str, share: float) -> None:
    """More sound than stated is sound. Less than stated is a cut file, unless nothing can be missing."""
    path = written(tmp_path, suffix, codec)
    whole = heard(path, tmp_path)
    data = path.read_bytes()
    for tag, offset, form in HEADERS[suffix, codec]:
        data = _patch(data, tag, offset, form, lambda size: type(size)(size * share) // 4 * 4)
    path.write_bytes(data)
    # The sample table of a movie says what there is, not the duration.
    if share > 1 and suffix not in MOVIES:
        with pytest.raises(InputError, match="truncated"):
            heard(path, tmp_path)
    else:
        assert_same_time(heard(path, tmp_path), whole, ends=25 * MS)


UNKNOWN = [
    0,
    0xFFFFFFFF,
    0x7FFFFFFF,
    0x80000000,
    0x7FFFF000,
    0xFFFFFFDB,
    2_000_000_000,
    1_000_000_000,
    1 << 30,
]


@pytest.mark.parametrize("size", UNKNOWN)
@pytest.mark.parametrize("parts", [1, 3])
def test_a_wav_of_unknown_length(tmp_path: Path, size: int, parts: int) -> None:
    path = written(tmp_path, "wav", "pcm_s16le")
    whole = heard(path, tmp_path)
    data = _patch(path.read_bytes(), b"data", 0, "<I", lambda _: size)
    data = _patch(data, b"RIFF", 0, "<I", lambda _: min(0xFFFFFFFF, size + 36))
    path.write_bytes(data * parts)
    assert_same_time(heard(path, tmp_path), np.concatenate([whole] * parts))


@pytest.mark.parametrize(
    ("suffix", "codec", "size"),
    [
        ("au", "pcm_s16be", 0xFFFFFFFF),
        ("caf", "pcm_s16be", 2**64 - 1),
        ("flac", "flac", 0),
        ("aiff", "pcm_s16be", 0),
    ],
)
def test_another_format_of_unknown_length(tmp_path: Path, suffix: str, codec: str, size: int) -> None:
    path = written(tmp_path, suffix, codec)
    whole = heard(path, tmp_path)
    tag, offset, form = HEADERS[suffix, codec][0]
    path.write_bytes(_patch(path.read_bytes(), tag, offset, form, lambda _: size))
    assert_same_time(heard(path, tmp_path), whole)
