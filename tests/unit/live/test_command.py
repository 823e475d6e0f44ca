"""`omniavatar live` on the nano checkpoint: files, pipes, HLS, wrong options."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from PIL import Image

import processes
from command_line import error_lines, run
from engine import CAUSAL, overrides, portrait, voice
from media_files import write_audio
from omniavatar.media.inspect import probe_video


@pytest.fixture(scope="module")
def folder(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, a portrait and a sound of 1.5 s."""
    made = tmp_path_factory.mktemp("live")
    values = {**overrides(nano_checkpoint, made / "cache"), **CAUSAL}
    for name in ("max_tokens", "overlap_frame"):
        values.pop(name)
    (made / "nano.yaml").write_text(yaml.safe_dump(values))
    Image.fromarray(portrait()).save(made / "face.png")
    write_audio(made / "talk.wav", voice(1.5).samples[None], 16000, "pcm_s16le", "mono")
    return made


def options(folder: Path, *more: str) -> list[str]:
    return [
        "live",
        "-c",
        str(folder / "nano.yaml"),
        "--image",
        str(folder / "face.png"),
        "--prompt",
        "a face",
        *more,
    ]


def test_a_file_at_the_pace_of_real_time(folder: Path) -> None:
    target = folder / "out.mp4"
    begun = time.monotonic()
    result = run(*options(folder, "--audio", str(folder / "talk.wav"), "-o", str(target)))
    assert result.exit_code == 0, result.stderr
    assert time.monotonic() - begun > 1.5
    info = probe_video(target)
    assert info.audio is not None and 1.4 <= info.frames / 16 <= 3.5
    assert "sound waited" in result.stderr and "dropped" in result.stderr
    again = run(*options(folder, "-o", str(target)))
    assert again.exit_code == 5 and "exists already" in error_lines(again)[0]


def test_a_pipe_in_and_a_pipe_out(folder: Path) -> None:
    """Raw stereo samples on standard input become MPEG-TS on standard output."""
    sound = (np.repeat(voice(1.0, 24000).samples[:, None], 2, 1) * 32767).astype("<i2").tobytes()
    command = [sys.executable, "-m", "omniavatar.cli"]
    command += options(folder, "--audio", "-", "--rate", "24000", "--channels", "2", "-o", "-")
    done = subprocess.run(command, input=sound, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    (folder / "out.ts").write_bytes(done.stdout)
    with av.open(str(folder / "out.ts")) as container:
        assert container.format.name == "mpegts"
        assert sum(1 for _ in container.decode(video=0)) >= 14


def test_a_folder_for_hls(folder: Path) -> None:
    target = folder / "hls"
    result = run(*options(folder, "--seconds", "5", "-o", f"{target}/"))
    assert result.exit_code == 0, result.stderr
    playlist = (target / "live.m3u8").read_text()
    assert playlist.startswith("#EXTM3U") and "#EXT-X-ENDLIST" in playlist
    lengths = [float(line[8:-1]) for line in playlist.splitlines() if line.startswith("#EXTINF")]
    assert sum(lengths) == pytest.approx(5, abs=0.6) and lengths[0] == 2.0
    with av.open(str(target / "live.m3u8")) as container:
        assert sum(1 for _ in container.decode(video=0)) == round(sum(lengths) * 16)
    assert "has a live.m3u8 already" in error_lines(run(*options(folder, "-o", str(target))))[0]


def test_an_interrupt_ends_the_video_properly(folder: Path) -> None:
    target = folder / "cut.mp4"
    command = [sys.executable, "-m", "omniavatar.cli", *options(folder, "-o", str(target))]
    with processes.start(command, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 90
        while time.monotonic() < end and (not target.exists() or target.stat().st_size < 20_000):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 0 and "the video ends here" in told
    assert probe_video(target).frames > 8


def test_the_server_says_where_it_is(folder: Path) -> None:
    command = [sys.executable, "-m", "omniavatar.cli", *options(folder, "--serve", "--port", "0")]
    command += ["--log-format", "json"]
    with processes.start(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            text = json.loads(line).get("text", "")
            if text.startswith("open "):
                address = text.split()[1]
                break
        assert urllib.request.urlopen(address).status == 200
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode in (0, 130)


def test_a_taken_port_is_one_line_before_anything_is_loaded(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = run(*options(folder, "--serve", "--port", port))
    assert result.exit_code == 7 and "loading the models" not in result.stderr
    (line,) = error_lines(result)
    assert f"127.0.0.1:{port} cannot be used: Address already in use; choose another --host or --port" in line


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        ((), 2, "give --output for a video, or --serve"),
        (("-o", "x.mp4", "--serve"), 2, "give one of them"),
        (("--serve", "--audio", "talk.wav"), 2, "--audio has no effect with --serve"),
        (("--serve", "--seconds", "3"), 2, "--seconds has no effect with --serve"),
        (("-o", "x.mp4", "--gone-after", "2"), 2, "--gone-after has no effect with --output"),
        (("-o", "x.mp4", "--token", "abc"), 2, "--token has no effect with --output"),
        (("--serve", "--host", "0.0.0.0", "--token", ""), 2, "--token is empty"),
        (("-o", "x.mp4", "--audio", "-", "--rate", "0"), 3, "rate: 0 samples a second cannot be used"),
        (("-o", "x.avi"), 5, "must end in .mp4 or .ts"),
        (("-o", "no/such/folder/x.mp4"), 5, "no/such/folder"),
        (("-o", "x.mp4", "--audio", "missing.wav"), 3, "missing.wav: is not a file"),
        (("-o", "x.mp4", "--audio", "microphone"), 7, "microphone: "),
        (("-o", "x.mp4", "--audio", "face.png"), 3, "face.png"),
    ],
)
def test_wrong_options(
    folder: Path, more: tuple[str, ...], code: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = run(*options(folder, *more))
    assert (result.exit_code, text in result.stderr) == (code, True), result.stderr
    assert not list(folder.glob("x.*")), "nothing is left"


@pytest.mark.slow
def test_a_reader_that_goes_ends_the_video(folder: Path) -> None:
    command = [sys.executable, "-m", "omniavatar.cli", *options(folder, "-o", "-")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert len(process.stdout.read(10_000)) == 10_000
        process.stdout.close()
        assert process.wait(30) == 5
        assert b"standard output: cannot be written: its reader has gone" in process.stderr.read()


@pytest.mark.slow
def test_a_closed_standard_input_is_one_error(folder: Path) -> None:
    command = [sys.executable, "-m", "omniavatar.cli", *options(folder, "--audio", "-", "-o", "x.mp4")]
    done = subprocess.run(
        f"{shlex.join(command)} <&-", shell=True, cwd=folder, stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 3 and "standard input is closed; give it a pipe or a file" in done.stderr
    assert not (folder / "x.mp4").exists()


def test_what_must_be_given() -> None:
    assert "--image is missing" in run("live", "-o", "x.mp4").stderr
    assert "--prompt is missing" in run("live", "-o", "x.mp4", "--image", "face.png").stderr
