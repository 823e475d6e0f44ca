"""Files are whole or absent; a full disk or a forbidden folder is one clear line and loses nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from media_files import FPS, SIZE, pictures, segments, tones
from omniavatar.errors import OutputError
from omniavatar.media.atomic import (
    atomic_path,
    atomic_write_bytes,
    atomic_write_json,
    check_writable,
    translate_os_error,
)
from omniavatar.media.audio import decode_mono, encode_aac_track
from omniavatar.media.inspect import probe_video
from omniavatar.media.slug import slugify
from omniavatar.media.video import GrowingVideo, encode_segment
from omniavatar.types import Waveform


def test_bytes_and_json(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "a", b"first")
    atomic_write_bytes(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"second"
    atomic_write_json(tmp_path / "b.json", {"prompt": "Grüße", "n": [1, 2.5]})
    assert "Grüße" in (tmp_path / "b.json").read_text("utf-8")
    with pytest.raises(ValueError, match="JSON"):
        atomic_write_json(tmp_path / "b.json", {"n": float("nan")})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.json"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        atomic_write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "a", b"old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO]
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_system_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError) as raised:
        atomic_write_bytes(tmp_path / "video.mp4", b"x")
    message = str(raised.value)
    assert "video.mp4" in message and ";" in message and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_other_errors_pass() -> None:
    with pytest.raises(ConnectionResetError), translate_os_error("a"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep")
    assert (tmp_path / "new" / "deep").is_dir() and not list((tmp_path / "new" / "deep").iterdir())
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(OutputError) as raised:
            check_writable(bad)
        assert str(bad) in str(raised.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_check_writable_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="permission denied"):
            check_writable(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@given(st.text(), st.integers(1, 80))
def test_slug_is_always_a_safe_name(text: str, max_len: int) -> None:
    slug = slugify(text, max_len)
    assert 1 <= len(slug) <= max_len
    assert set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert not slug.startswith("-") and not slug.endswith("-")


def test_slug_examples() -> None:
    assert slugify("A woman, smiling; $(rm -rf /) `x` ../..") == "a-woman-smiling-rm-rf-x"
    assert slugify("Ein schöner Tag") == "ein-schoner-tag"
    assert slugify("一位女士在说话") != slugify("一位男士在说话")
    assert slugify("") == slugify("")
    long = slugify(
        "A realistic video of a woman speaking directly to the camera on a sofa, with dynamic hands"
    )
    assert long == "a-realistic-video-of-a-woman-speaking-directly-to-the-camera"


class Refusing:
    """Stands for `os.fsync`: refuses from the given call on, as a full disk does."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed

    def __call__(self, handle: int) -> None:
        if not self.allowed:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.allowed -= 1


def test_a_full_disk_while_growing_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = segments(tmp_path, [10, 10])
    with GrowingVideo(tmp_path / "p.mp4", tmp_path / "f.mp4", FPS) as video:
        video.append(parts[0])
        for allowed in (0, 1):
            monkeypatch.setattr(os, "fsync", Refusing(allowed))
            with pytest.raises(OutputError, match=r"p\.mp4: the disk is full"):
                video.append(parts[1])
            assert probe_video(tmp_path / "p.mp4").frames == 10
        monkeypatch.undo()
        video.append(parts[1])
        monkeypatch.setattr(os, "fsync", Refusing(0))
        with pytest.raises(OutputError, match=r"f\.mp4: the disk is full"):
            video.finish()
        monkeypatch.undo()
    assert probe_video(tmp_path / "p.mp4").frames == 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.mp4", *(part.name for part in parts)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 512 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.name == "posix" and os.geteuid() == 0
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)


def test_a_really_full_disk(small_disk: Path, tmp_path: Path) -> None:
    parts = segments(tmp_path, [10, 10])
    big = tmp_path / "big.mp4"
    encode_segment([_noise(40)], big, FPS, SIZE, preset="veryfast", crf=18)
    assert big.stat().st_size > 270_000  # twice the video is more than the disk
    wave = Waveform(tones(30, 16000, 1)[0], 16000)

    with pytest.raises(OutputError, match="the disk is full"):
        decode_mono(wave, small_disk / "mono.f32")
    with pytest.raises(OutputError, match="the disk is full"):
        encode_segment([_noise(100)], small_disk / "s.mp4", FPS, SIZE, preset="veryfast")
    with pytest.raises(OutputError, match="the disk is full"):
        encode_aac_track(
            Waveform(np.random.default_rng(0).normal(0, 0.2, 2400000), 48000), small_disk / "a.mp4", 0, 50
        )
    assert not list(small_disk.iterdir()), "nothing half is left"

    with GrowingVideo(small_disk / "p.mp4", small_disk / "f.mp4", FPS) as video:
        video.append(parts[0])
        filler = small_disk / "filler"
        filler.write_bytes(bytes(300_000))
        with pytest.raises(OutputError, match=r"p\.mp4: the disk is full"):
            video.append(big)
        assert probe_video(small_disk / "p.mp4").frames == 10
        filler.unlink()
        video.append(big)
        with pytest.raises(OutputError, match=r"f\.mp4: the disk is full"):
            video.finish()
        assert sorted(p.name for p in small_disk.iterdir()) == ["p.mp4"]
        assert probe_video(small_disk / "p.mp4").frames == 50


@pytest.mark.slow
def test_a_file_size_limit(tmp_path: Path) -> None:
    """`ulimit -f` in a process of its own: every writer says so in one line and leaves nothing half."""
    (tmp_path / "out").mkdir()
    big = tmp_path / "big.mp4"
    encode_segment([_noise(20)], big, FPS, SIZE, preset="veryfast")
    code = """
        import resource, sys
        from fractions import Fraction
        from pathlib import Path
        import numpy as np
        from omniavatar.errors import OutputError
        from omniavatar.media.audio import decode_mono, encode_aac_track
        from omniavatar.media.video import GrowingVideo, encode_segment
        from omniavatar.types import Waveform

        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        out, big = Path(sys.argv[1]), sys.argv[2]
        rng = np.random.default_rng(0)
        wave = Waveform(rng.normal(0, 0.1, 160000), 16000)
        noise = rng.integers(0, 256, (20, 96, 128, 3), dtype=np.uint8)

        def grow():
            with GrowingVideo(out / "p.mp4", out / "f.mp4", Fraction(25)) as video:
                video.append(big)

        for work in (
            lambda: decode_mono(wave, out / "a.f32"),
            lambda: encode_aac_track(wave, out / "a.mp4", 0, 10),
            lambda: encode_segment([noise], out / "s.mp4", Fraction(25), (96, 128)),
            grow,
        ):
            try:
                work()
            except OutputError as error:
                print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out"), str(big)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 4 and all("beyond the allowed size" in line for line in lines), run.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["p.mp4"]
    assert (tmp_path / "out" / "p.mp4").stat().st_size == 0


def test_unwritable_places(tmp_path: Path) -> None:
    (part,) = segments(tmp_path, [2])
    nowhere = tmp_path / "nowhere"
    with pytest.raises(OutputError, match="folder does not exist"):
        GrowingVideo(nowhere / "p.mp4", tmp_path / "f.mp4", FPS)
    with pytest.raises(OutputError, match="folder does not exist"):
        encode_segment([pictures(0, 1)], nowhere / "s.mp4", Fraction(25), SIZE)
    with GrowingVideo(tmp_path / "p.mp4", nowhere / "f.mp4", FPS) as video:
        video.append(part)
        with pytest.raises(OutputError, match="folder does not exist"):
            video.finish()
    assert probe_video(tmp_path / "p.mp4").frames == 2
