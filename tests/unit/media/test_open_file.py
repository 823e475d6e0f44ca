"""No media file reaches FFmpeg but by one door: no URL, no other file, no waiting, no endless work."""

from __future__ import annotations

import ast
import os
import socket
import struct
import time
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from media_files import FPS, segments, tones, write_audio
from omniavatar.errors import InputError
from omniavatar.media.audio import encode_aac_track, measure_audio
from omniavatar.media.audio_part import MAX_HOURS
from omniavatar.media.image import load_image
from omniavatar.media.inspect import probe_video, read_frames
from omniavatar.media.media_kinds import AUDIO_DECODERS, FORMATS, VIDEO_DECODERS
from omniavatar.media.open_file import MAX_STREAMS, MediaFile, Stopwatch, new_media, open_media
from omniavatar.media.video import GrowingVideo

ROOT = Path(__file__).parents[3] / "src" / "omniavatar"


def test_one_module_opens_containers() -> None:
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "open" and ast.unparse(node.value) in {
                "av", "av.container", "av.container.core",
            }:  # fmt: skip
                found.add(path.relative_to(ROOT).as_posix())
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "av":
                assert "open" not in {name.name for name in node.names}, path
    assert found == {"media/open_file.py"}


def _wav(path: Path, seconds: float = 0.5) -> Path:
    made = write_audio(path.with_name("made.wav"), tones(seconds, 16000, 1), 16000, "pcm_s16le", "mono")
    made.rename(path)
    return path


NAMES = [
    "2024-08-20T13:28:35Z.wav", "concat:a|b.wav", "subfile,,start,0,end,9,,:a.wav", "tcp:127.0.0.1:9", "-",
    "async:x.wav", "cache:x.wav", "data:audio;base64,AA.wav", "%03d.wav", "pipe:0", "é 名.wav", "a\nb.wav",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name(tmp_path: Path, name: str) -> None:
    assert measure_audio(_wav(tmp_path / name)).source_samples == 8000


@pytest.mark.parametrize("name", ["take:2.mp4", "10:15/take.mp4", "tcp:1.mp4", os.fsdecode(b"caf\xe9.mp4")])
def test_a_video_of_any_name_is_written_and_read(tmp_path: Path, name: str) -> None:
    final = tmp_path / name
    final.parent.mkdir(exist_ok=True)
    sound = tmp_path / "so:und.mp4"
    encode_aac_track(_wav(tmp_path / "a.wav"), sound, Fraction(0), 5 / FPS)
    with GrowingVideo(final.with_name("grow:ing.mp4"), final, FPS, sound) as video:
        for segment in segments(tmp_path, [5]):
            video.append(segment)
        assert video.finish() == final
    assert probe_video(final).frames == 5 == sum(1 for _ in read_frames(final))
    assert final.read_bytes().index(b"moov") < final.read_bytes().index(b"mdat"), "the index is in front"


def test_an_output_through_the_door_has_the_same_bytes_as_one_in_memory(tmp_path: Path) -> None:
    def write(target: Path | BytesIO) -> None:
        with new_media(target) as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width = stream.height = 32  # type: ignore[union-attr]
            container.mux(stream.encode(None))

    memory = BytesIO()
    write(memory)
    write(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == memory.getvalue()


HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\n{}\n#EXT-X-ENDLIST\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="audio/mp4"><Representation id="1" '
    'bandwidth="9"><BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>'
)
SCRIPTS = {
    "hls": HLS,
    "hls that names itself": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nbad.wav\n",
    "concat": "ffconcat version 1.0\nfile {}\n",
    "dash": DASH,
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n",
    "imf": '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016">{}',
    "vobsub": "# VobSub index file, v7\ntimestamp: 00:00:00:000, filepos: 000000000\n",
    "smil": '<smil><body><audio src="{}"/></body></smil>',
    "pls": "[playlist]\nFile1={}\n",
    "asx": '<asx><entry><ref href="{}"/></entry></asx>',
    "rtsp in a text": "RTSPtextrtsp://127.0.0.1:9/\n",
}


@pytest.mark.parametrize("suffix", [".wav", ".m3u8", ".mp4", ".mpd", ".sdp", ".txt"])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_file_that_names_others_opens_none(tmp_path: Path, kind: str, suffix: str) -> None:
    other = _wav(tmp_path / "other.wav")
    os.utime(other, (1, 1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        for target in (str(other), "other.wav", f"file://{other}", url):
            path = tmp_path / f"bad{suffix}"
            path.write_text(SCRIPTS[kind].replace("{}", target))
            with pytest.raises(InputError, match=r"bad\.") as raised:
                measure_audio(path)
            assert "\n" not in str(raised.value)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert other.stat().st_atime == 1 or os.statvfs(tmp_path).f_flag & os.ST_NOATIME


def _moved_reference(data: bytes, target: bytes) -> bytes:
    """An M4A whose sound lies in another file by its data reference (ISO/IEC 14496-12, 8.7.2)."""
    at = data.index(b"url \x00\x00\x00\x01") - 4
    entry = b"url \x00\x00\x00\x00" + target + b"\0"
    added = 4 + len(entry) - 12
    data = data[:at] + struct.pack(">I", 4 + len(entry)) + entry + data[at + 12 :]
    for box in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        start = data.rindex(box, 0, at) - 4
        (length,) = struct.unpack_from(">I", data, start)
        data = data[:start] + struct.pack(">I", length + added) + data[start + 4 :]
    return data


def test_a_movie_does_not_read_its_sound_from_another_file(tmp_path: Path) -> None:
    other = write_audio(tmp_path / "other.m4a", tones(0.5, 48000, 1), 48000, "aac", "mono")
    os.utime(other, (1, 1))
    path = tmp_path / "bad.m4a"
    path.write_bytes(_moved_reference(other.read_bytes(), other.as_uri().encode()))
    os.utime(other, (1, 1))
    try:
        measure_audio(path)
    except InputError as error:
        assert "\n" not in str(error)
    assert other.stat().st_atime == 1 or os.statvfs(tmp_path).f_flag & os.ST_NOATIME


def test_no_format_that_names_files_is_allowed() -> None:
    refused = "hls concat dash imf image2 image2pipe webm_dash_manifest sdp rtsp rtp vobsub lavfi alsa data"
    assert not set(refused.split()) & set(FORMATS)
    assert len(set(FORMATS)) == len(FORMATS) and len(set(AUDIO_DECODERS)) == len(AUDIO_DECODERS)


def test_an_attempt_to_open_another_file_is_refused(tmp_path: Path) -> None:
    """The second lock: if an allowed format named a file, FFmpeg could not open it."""
    from omniavatar.media.open_file import refuse_other_file

    with pytest.raises(PermissionError, match="name other files"):
        refuse_other_file("file:/etc/hostname", 1, {})


def _socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
    return path


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


IRREGULAR = {
    "fifo": (lambda d: _fifo(d / "f.wav"), "pipe"),
    "link to a fifo": (lambda d: _link(d / "l.wav", str(_fifo(d / "f"))), "pipe"),
    "zeros": (lambda d: _link(d / "l.wav", "/dev/zero"), "device"),
    "random": (lambda d: Path("/dev/urandom"), "device"),
    "socket": (lambda d: _socket(d / "s"), "socket"),
    "folder": (lambda d: d, "folder"),
    "link to itself": (lambda d: _link(d / "l.wav", "l.wav"), "cannot be opened"),
    "zero byte": (lambda d: Path(f"{d}/a\0b"), "cannot be opened"),
    "half an emoji": (lambda d: d / "\ud83d.wav", "cannot be opened"),
}


@pytest.mark.parametrize("case", IRREGULAR)
@pytest.mark.parametrize("read", [measure_audio, load_image, probe_video])
def test_only_regular_files_are_opened_and_nothing_waits(tmp_path: Path, case: str, read: object) -> None:
    make, says = IRREGULAR[case]
    started = time.monotonic()
    with pytest.raises(InputError, match=says) as raised:
        read(make(tmp_path))  # type: ignore[operator]
    assert "\n" not in str(raised.value) and time.monotonic() - started < 5


def _flac_of(seconds: int, rate: int = 4000) -> bytes:
    """FLAC of constant silence: 4 s of header-stated length a frame of a few bytes (RFC 9639)."""
    total = seconds * rate
    info = struct.pack(">HH", 65535, 65535) + b"\0" * 6
    info += ((rate << 44) | (0 << 41) | (15 << 36) | total).to_bytes(8, "big") + b"\0" * 16
    return b"fLaC\x80\x00\x00\x22" + info + b"\xff\xf8" + b"\0" * 64


def test_a_header_that_states_days_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "days.flac"
    path.write_bytes(_flac_of(273 * 3600))
    started = time.monotonic()
    with pytest.raises(InputError, match=f"273.0 hours, and {MAX_HOURS} is the limit"):
        measure_audio(path)
    assert time.monotonic() - started < 10


def test_time_stamps_far_apart_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "far.mka"
    sound = tones(0.5, 16000, 1)
    write_audio(path, sound, 16000, "pcm_s16le", "mono", moved=lambda t: t + 180000 * (t > 0.2))
    with pytest.raises(InputError, match="is the limit"):
        measure_audio(path)


def test_many_streams_are_refused(tmp_path: Path) -> None:
    import av

    path = tmp_path / "many.mka"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("pcm_s16le", rate=8000) for _ in range(MAX_STREAMS + 1)]
        for stream in streams:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = 8000, 0
            container.mux(stream.encode(frame))
    with pytest.raises(InputError):
        measure_audio(path)


def test_a_stream_that_appears_later_changes_nothing(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.ts", tones(0.5, 48000, 1), 48000, "ac3", "mono")
    data = bytearray(path.read_bytes())
    starts = [at for at in range(0, len(data), 188) if data[at + 1] & 0x40 and data[at + 1] & 0x1F == 1]
    data[starts[-2] + 2] = 0x75  # the number of another stream
    path.write_bytes(data)
    assert measure_audio(path).source_samples > 10000


def test_a_decoder_without_result_is_stopped(tmp_path: Path) -> None:
    path = _wav(tmp_path / "a.wav")
    watch = Stopwatch("audio a.wav", allowed=-1.0)
    with path.open("rb") as file, pytest.raises(InputError, match="keeps the decoder busy"):
        media = MediaFile(file, "audio a.wav", ".wav", path.stat().st_size)
        with open_media(media, AUDIO_DECODERS, watch=watch):
            pass


def test_pictures_of_a_sound_are_not_decoded(tmp_path: Path) -> None:
    assert not set(VIDEO_DECODERS) & set(AUDIO_DECODERS)
    video = segments(tmp_path, [3])[0]
    with pytest.raises(InputError, match="no sound"):
        measure_audio(video)
