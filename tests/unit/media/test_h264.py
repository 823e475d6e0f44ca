"""The choice of the video encoder, with injected probes and the real one, and what resuming makes of it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import av.codec
import av.error
import numpy as np
import pytest

from engine import make_pipeline, request
from omniavatar import AvatarPipeline
from omniavatar.device import Registry
from omniavatar.engine.host import Host
from omniavatar.errors import ConfigError, ResourceError, ResumeError
from omniavatar.media.h264 import ENCODERS, PRESETS, choose_encoder, encoder_options, try_nvenc
from omniavatar.media.inspect import read_frames
from omniavatar.media.video import GrowingVideo, encode_segment

SIZE = (400, 720)


def encoders(probe):
    """The encoders with another probe for NVENC."""
    nvenc = replace(ENCODERS.get("nvenc"), unavailable=probe)
    return Registry("output.encoder", ENCODERS.get("x264"), nvenc, words=ENCODERS.words)


def test_auto_takes_nvenc_where_it_works_and_says_so(caplog) -> None:
    caplog.set_level(logging.INFO, "omniavatar")
    asked: list[tuple[int, int]] = []

    def works(size):
        asked.append(size)

    assert choose_encoder("auto", SIZE, encoders(works)) == "nvenc"
    assert choose_encoder("nvenc", SIZE, encoders(works)) == "nvenc"
    assert asked == [SIZE, SIZE]
    assert choose_encoder("auto", SIZE, encoders(lambda size: "no unit")) == "x264"
    assert [record.message for record in caplog.records] == [
        "video encoder: nvenc (h264_nvenc)",
        "video encoder: nvenc (h264_nvenc)",
        "video encoder: x264 (libx264)",
    ]


def test_the_reason_against_nvenc_is_a_detail(caplog) -> None:
    """It would be the first line of every run on a machine without NVENC, and look like a failure."""
    caplog.set_level(logging.DEBUG, "omniavatar")
    assert choose_encoder("auto", SIZE, encoders(lambda size: "no unit")) == "x264"
    reasons = [record.levelname for record in caplog.records if "not nvenc: no unit" in record.message]
    assert reasons == ["DEBUG"]


def test_named_encoders_are_kept_to(caplog) -> None:
    def never(size):
        raise AssertionError("x264 needs no probe")

    assert choose_encoder("x264", SIZE, encoders(never)) == "x264"
    refused = r"encoder: nvenc cannot be used here \(no unit\); use one of: auto, x264$"
    with pytest.raises(ResourceError, match=refused):
        choose_encoder("nvenc", SIZE, encoders(lambda size: "no unit"))
    with pytest.raises(ConfigError, match="'vaapi' is not known; use one of: auto, x264"):
        choose_encoder("vaapi", SIZE)


def test_the_real_probe_finds_no_nvenc_without_a_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU may have NVENC")
    reason = try_nvenc(SIZE)
    assert reason is not None and "NVENC does not open here" in reason
    assert choose_encoder("auto", SIZE) == "x264"


def test_an_ffmpeg_without_nvenc_is_no_error(monkeypatch) -> None:
    monkeypatch.setattr(av.codec, "codecs_available", {"libx264"})
    assert try_nvenc(SIZE) == "PyAV's FFmpeg has no h264_nvenc"


def test_settings_are_given_in_x264s_terms() -> None:
    assert encoder_options("x264", 20, "slow") == {"crf": "20", "preset": "slow", "mbtree": "0"}
    nvenc = encoder_options("nvenc", 20, "slow")
    assert nvenc == {"rc": "constqp", "qp": "20", "preset": "p5", "bf": "0"}
    order = [encoder_options("nvenc", 18, preset)["preset"] for preset in PRESETS]
    assert order == sorted(order) and order[0] == "p1" and order[-1] == "p7"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["veryfast", "medium"])
def test_the_same_frames_give_the_same_bytes_on_a_busy_machine(tmp_path, preset) -> None:
    """With x264's mbtree, about every third encode of such frames differs beside three busy processes."""
    generator = np.random.default_rng(0)
    start = generator.integers(0, 255, (96, 160, 3))
    moved = [np.roll(start, 3 * n, axis=1) // 2 + generator.integers(0, 127, start.shape) for n in range(32)]
    frames = np.stack(moved).astype(np.uint8)
    code = "import time\nend = time.time() + 120\nwhile time.time() < end: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    try:
        digests = set()
        for number in range(24):
            path = tmp_path / f"{number}.mp4"
            encode_segment([frames], path, Fraction(25), (96, 160), preset=preset, threads=4)
            digests.add(path.read_bytes())
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert len(digests) == 1


def test_a_segment_opens_the_encoder_that_was_chosen(tmp_path) -> None:
    """NVENC's name goes to FFmpeg; here, without one, opening fails instead of silently using x264."""
    frames = [np.zeros((3, 64, 64, 3), np.uint8)]
    if try_nvenc((64, 64)) is not None:
        with pytest.raises(av.error.FFmpegError, match="h264_nvenc"):
            encode_segment(frames, tmp_path / "s.mp4", Fraction(25), (64, 64), encoder="nvenc")
        assert not list(tmp_path.iterdir())
    other = replace(ENCODERS.get("nvenc"), name="other", codec="mpeg4", create=lambda crf, preset: {})
    ENCODERS.register(other)
    try:
        encode_segment(frames, tmp_path / "s.mp4", Fraction(25), (64, 64), encoder="other")
    finally:
        ENCODERS.unregister("other")
    with av.open(str(tmp_path / "s.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"


def test_sidecar_names_the_encoder_and_a_job_keeps_it(nano_checkpoint, tmp_path) -> None:
    tries: list[str] = []

    class Choosing(Host):
        """A machine whose encoders are all `answer`."""

        def __init__(self, answer):
            self.answer = answer

        def choose_encoder(self, name, size):
            tries.append(name)
            return self.answer

    pipe = make_pipeline(nano_checkpoint, tmp_path / "cache", host=Choosing("x264"))
    result = pipe.generate(request(0.3), tmp_path / "done.mp4")
    pipe.generate(request(0.3, prompt="another"), tmp_path / "second.mp4")
    assert tries == ["auto"], "tried once a size"
    sidecar = json.loads(result.sidecar.read_text())
    assert sidecar["encoder"] == "x264" == json.loads(sidecar["fingerprint"]["output.encoder"])

    target = tmp_path / "out.mp4"

    class Interrupted(AvatarPipeline):
        def windows(self, *arguments):
            for result in super().windows(*arguments):
                if result.window.index == 2:
                    raise KeyboardInterrupt
                yield result

    cut = make_pipeline(nano_checkpoint, tmp_path / "cache", host=Choosing("x264"), kind=Interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut.generate(request(1.5), target)
    named = make_pipeline(nano_checkpoint, tmp_path / "cache", host=Choosing("x264"), encoder="x264")
    other = make_pipeline(nano_checkpoint, tmp_path / "cache", host=Choosing("nvenc"))
    with pytest.raises(ResumeError, match=r'output\.encoder: "x264" -> "nvenc"'):
        other.generate(request(1.5), target)
    assert named.generate(request(1.5), target).resumed_windows == 2


def test_nvenc_segments_grow_into_a_video(tmp_path) -> None:
    """Only where NVENC works: sizes, order and pictures survive, and segments may be appended."""
    size = (400, 720)
    reason = try_nvenc(size)
    if reason is not None:
        pytest.skip(reason)
    rows, columns = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
    frames = np.stack([np.stack([rows // 2, columns // 3, 0 * rows + 5 * n], -1) for n in range(40)])
    frames = frames.astype(np.uint8)
    parts = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for part, piece in zip(parts, (frames[:25], frames[25:]), strict=True):
        encode_segment([piece], part, Fraction(25), size, encoder="nvenc")
    with GrowingVideo(tmp_path / "p.mp4", tmp_path / "out.mp4", Fraction(25)) as growing:
        for part in parts:
            growing.append(part)
        growing.finish()
    shown = np.stack(list(read_frames(tmp_path / "out.mp4")))
    assert shown.shape == frames.shape
    assert np.abs(shown.astype(int) - frames).mean() < 3
