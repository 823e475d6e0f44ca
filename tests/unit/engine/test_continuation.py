"""A video that goes on from a finished one with more sound."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine import make_pipeline, request, voice
from omniavatar import AvatarPipeline, AvatarRequest
from omniavatar.engine.identity import request_identity
from omniavatar.engine.prepare import read_inputs
from omniavatar.errors import InputError, OutputError, ResumeError
from omniavatar.media.audio import decode_mono
from omniavatar.media.inspect import probe_video, read_frames
from omniavatar.sampling.windows import plan_windows
from omniavatar.types import RunResult


@pytest.fixture(scope="module")
def pipeline(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    with make_pipeline(nano_checkpoint, tmp_path_factory.mktemp("cache"), crf=0) as made:
        yield made


@pytest.fixture(scope="module")
def first(pipeline: AvatarPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished video of several windows, whose last one is cut."""
    return pipeline.generate(request(1.0), tmp_path_factory.mktemp("first") / "first.mp4").output


@pytest.fixture(scope="module")
def second(pipeline: AvatarPipeline, first: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """`first`, continued by 0.7 s."""
    return pipeline.generate(longer(first), tmp_path_factory.mktemp("second") / "second.mp4")


def longer(first: Path, seconds: float = 0.7, **changes: object) -> AvatarRequest:
    return request(audio=voice(seconds, seed=7), continues=first, **changes)


def frames_of(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path)))


def test_the_frames_before_stay_and_the_new_ones_follow(
    pipeline: AvatarPipeline, first: Path, second: RunResult
) -> None:
    made = second
    old, new = frames_of(first), frames_of(made.output)
    assert (new[: len(old)] == old).all()
    expected = len(old) + round(0.7 * 25 + 0.49)
    assert len(new) == made.frames and abs(made.frames - expected) <= 1
    step = np.abs(np.diff(new.astype(int), axis=0)).mean((1, 2, 3))
    assert step[len(old) - 1] < 2 * step[1:].max(), "the picture jumps where the new part begins"
    assert made.resumed_windows == 0


def test_the_sound_before_stays_and_the_new_one_follows_at_its_time(
    first: Path, second: RunResult, tmp_path: Path
) -> None:
    heard = {}
    for name, path in (("old", first), ("all", second.output)):
        decode_mono(path, tmp_path / name, lead_silence_s=0)
        heard[name] = np.fromfile(tmp_path / name, "<f4")
    info = probe_video(second.output)
    assert info.audio is not None and abs(info.audio.duration_s - info.duration_s) < 0.1
    border = round(probe_video(first).frames / 25 * 16000)
    assert np.corrcoef(heard["old"][:border], heard["all"][:border])[0, 1] > 0.95
    new = voice(0.7, seed=7).samples
    assert np.corrcoef(new, heard["all"][border : border + len(new)])[0, 1] > 0.95


def test_it_can_be_extended_again_which_is_another_request(
    pipeline: AvatarPipeline, second: RunResult, tmp_path: Path
) -> None:
    third = pipeline.generate(longer(second.output, 0.2), tmp_path / "third.mp4").output
    old, new = frames_of(second.output), frames_of(third)
    assert len(new) > len(old) and (new[: len(old)] == old).all()
    with pytest.raises(ResumeError, match=r"request.continues"):
        pipeline.generate(longer(third), second.output)


@pytest.mark.parametrize("damage", [None, "given_00001.safetensors"])
def test_an_interrupted_one_goes_on_to_the_same_bytes(
    pipeline: AvatarPipeline, first: Path, second: RunResult, tmp_path: Path, damage: str | None
) -> None:
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 6  # encoders and steps: within the second window

    target = tmp_path / "cut.mp4"
    with pytest.raises(Exception, match="the run was stopped"):
        pipeline.generate(longer(first), target, should_stop=stop)
    job = tmp_path / "cut.mp4.job"
    assert (job / "segment_00000.mp4").exists()
    if damage is not None:
        (job / damage).write_bytes(b"damaged")
    made = pipeline.generate(longer(first), target)
    assert made.output.read_bytes() == second.output.read_bytes()
    assert made.resumed_windows >= 1 or damage is not None
    assert not job.exists()


def test_a_copy_of_the_video_before_is_the_same_request(
    pipeline: AvatarPipeline, first: Path, second: RunResult, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.mp4"
    shutil.copy(first, copy)
    assert pipeline.generate(longer(copy), second.output).seconds == 0.0  # the same content


def test_stream_yields_the_new_frames(pipeline: AvatarPipeline, first: Path, second: RunResult) -> None:
    made = frames_of(second.output)
    chunks = list(pipeline.stream(longer(first)))
    old = probe_video(first).frames
    assert chunks[0].start == old and sum(len(chunk.frames) for chunk in chunks) == len(made) - old
    streamed = np.concatenate([chunk.frames for chunk in chunks]).astype(int).mean(3)
    written = made[old:].astype(int).mean(3)
    assert np.abs(streamed - written).mean() < 0.4 * np.abs(streamed[:-5] - written[5:]).mean()


def test_what_cannot_be_continued_is_one_line(
    pipeline: AvatarPipeline, nano_checkpoint: Path, first: Path, tmp_path: Path
) -> None:
    before = hashlib.sha256(first.read_bytes()).hexdigest()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(first.read_bytes()[:500])
    out = tmp_path / "out.mp4"
    cases = [
        (longer(tmp_path / "none.mp4"), InputError, "none.mp4"),
        (longer(broken), InputError, "broken.mp4"),
        (request(None, continues=first), InputError, "audio: is missing"),
        (request(0.4, size=(64, 80)), InputError, "size: 80x64 is not configured; choose from 64x64"),
    ]
    for each, kind, says in cases:
        with pytest.raises(kind, match=says) as error:
            pipeline.generate(each, out)
        assert "\n" not in str(error.value) and not out.exists()
    with pytest.raises(OutputError, match="video it goes on from"):
        pipeline.generate(longer(first), first)
    assert hashlib.sha256(first.read_bytes()).hexdigest() == before
    for changes, says in [
        ({"fps": 20}, "frames a second"),
        ({"image_sizes_720": [[64, 80]]}, "is 64x64; go on with a configuration of that size"),
        ({"overlap_frame": 41, "max_tokens": 200}, "fewer than overlap_frame=41"),
        ({"crf": 30}, "was encoded with other settings; set crf, preset, encoder and key_frame_s"),
    ]:
        with (
            make_pipeline(nano_checkpoint, tmp_path / "cache", **changes) as other,
            pytest.raises(InputError, match=says),
        ):
            other.generate(longer(first), out)


@pytest.mark.parametrize("begun", [5, 13, 14, 30])
@pytest.mark.parametrize("more", [1, 8, 9, 40])
def test_windows_after_a_finished_video_cover_the_rest(begun: int, more: int) -> None:
    windows = plan_windows(begun + more - 1, 13, 5, begun)
    assert windows[0].new_frames == begun
    shown = begun
    for number, window in enumerate(windows[1:], 1):
        assert (window.index, window.length, window.given_frames) == (number, 13, 5)
        assert window.first_new_frame == shown and window.start == shown - 5
        shown += window.new_frames
    assert shown == begun + more and len(windows) == 1 + -(-more // 8)


def test_the_request_can_choose_a_configured_size(nano_checkpoint: Path, tmp_path: Path) -> None:
    sizes = [[64, 64], [64, 80]]
    with make_pipeline(nano_checkpoint, tmp_path / "cache", image_sizes_720=sizes) as pipeline:
        named, chosen = (read_inputs(pipeline.models, request(0.3, size=size)) for size in ((64, 80), None))
        assert (named.shape.size, chosen.shape.size) == ((64, 80), (64, 64))
        identities = [
            request_identity(
                pipeline.config,
                each,
                "x264",
                pipeline.models.residency.place(each.shape, {}),
                pipeline.models,
            )
            for each in (named, chosen)
        ]
        assert identities[0]["request.size"] == "[64, 80]" and "request.size" not in identities[1]
