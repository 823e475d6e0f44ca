"""Resuming after kill -9, Ctrl-C and a full disk; changed requests; memory of long videos."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import interrupt_in, make_pipeline, portrait, request, voice
from media_files import write_audio
from omniavatar import SamplingParams
from omniavatar.engine.events import Message, StepFinished
from omniavatar.errors import OutputError, ResumeError
from omniavatar.media.inspect import probe_video, read_frames

TESTS = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from engine import make_pipeline, request
pipe = make_pipeline(Path(sys.argv[2]), Path(sys.argv[3]))
pipe.generate(request(float(sys.argv[5])), sys.argv[4])
"""
SECONDS = 2.0


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """The uninterrupted video."""
    output = tmp_path_factory.mktemp("whole") / "out.mp4"
    pipeline.generate(request(SECONDS), output)
    return output


@pytest.fixture(scope="module")
def begun(pipeline, tmp_path_factory):
    """Copies what an interrupted run left with so many windows done, made once for each number."""
    made: dict[int, Path] = {}

    def copy(output: Path, windows: int) -> None:
        if windows not in made:
            made[windows] = tmp_path_factory.mktemp("begun")
            interrupt_in(windows, pipeline, request(SECONDS), made[windows] / output.name)
        shutil.copytree(made[windows], output.parent, dirs_exist_ok=True)

    return copy


def frames_of(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path)))


def start(nano: Path, cache: Path, output: Path, after_windows: int) -> subprocess.Popen[bytes]:
    """Start a process that makes the video; returns when `after_windows` windows are done."""
    arguments = [sys.executable, "-c", SCRIPT, str(TESTS), str(nano), str(cache), str(output), str(SECONDS)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    state = output.with_name(output.name + ".job") / "job.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if state.is_file() and json.loads(state.read_text())["done"] >= after_windows:
            return process
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"no {after_windows} windows: {process.communicate()[1].decode()[-2000:]}")


def test_killed_run_is_resumed_and_gives_the_same_video(pipeline, nano_checkpoint, cache, whole, tmp_path):
    output = tmp_path / "out.mp4"
    process = start(nano_checkpoint, cache, output, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    partial = tmp_path / "out.partial.mp4"
    assert probe_video(partial).frames >= 13  # playable; the kill may come between record and append

    result = pipeline.generate(request(SECONDS), output)
    assert 2 <= result.resumed_windows < result.windows
    assert np.array_equal(frames_of(output), frames_of(whole))
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.mp4"]


def test_only_missing_windows_are_computed(pipeline, whole, tmp_path):
    output = tmp_path / "out.mp4"
    interrupt_in(3, pipeline, request(SECONDS), output)
    steps: list[int] = []
    pipe = make_pipeline_like(
        pipeline, lambda event: isinstance(event, StepFinished) and steps.append(event.window)
    )
    result = pipe.generate(request(SECONDS), output)
    assert min(steps) == result.resumed_windows >= 3
    assert np.array_equal(frames_of(output), frames_of(whole))


def make_pipeline_like(pipeline, listener):
    from omniavatar import AvatarPipeline
    from omniavatar.engine.recorder import RunRecorder

    return AvatarPipeline.from_config(pipeline.config, recorder=RunRecorder([listener]))


def test_ctrl_c_keeps_finished_windows(pipeline, whole, tmp_path):
    output = tmp_path / "out.mp4"
    interrupt_in(2, pipeline, request(SECONDS), output)
    assert not output.exists()
    assert json.loads((tmp_path / "out.mp4.job" / "job.json").read_text())["done"] == 2
    assert pipeline.generate(request(SECONDS), output).resumed_windows == 2
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt": "another prompt"}, "request.prompt"),
        ({"image": portrait(1)}, "request.image"),
        ({"audio": voice(SECONDS, seed=5)}, "request.audio"),
        ({"sampling": SamplingParams(num_steps=3)}, "sampling.num_steps: 2 -> 3"),
    ],
)
def test_changed_request_is_not_resumed_and_the_error_names_the_change(
    pipeline, begun, tmp_path, change, named
):
    output = tmp_path / "out.mp4"
    begun(output, 1)
    with pytest.raises(ResumeError, match=named) as caught:
        pipeline.generate(request(**{"seconds": SECONDS, **change}), output)
    assert "\n" not in str(caught.value) and "--no-resume" in str(caught.value)
    assert json.loads((tmp_path / "out.mp4.job" / "job.json").read_text())["done"] == 1
    if named == "request.prompt":
        result = pipeline.generate(request(**{"seconds": SECONDS, **change}), output, resume=False)
        assert result.resumed_windows == 0


def test_weights_are_known_by_content(begun, nano_checkpoint, cache, whole, tmp_path):
    """A copy of the checkpoint, with other times and in another folder, goes on; other weights do not."""
    moved = tmp_path / "checkpoint"
    shutil.copytree(nano_checkpoint, moved)
    for file in moved.rglob("*"):
        os.utime(file, ns=(1, 1))
    output = tmp_path / "out.mp4"
    begun(output, 1)
    vae = moved / "Wan2.1-T2V-nano" / "Wan2.1_VAE.pth"
    released = vae.read_bytes()
    weights = torch.load(vae)
    weights["conv2.bias"] += 1
    torch.save(weights, vae)
    with pytest.raises(ResumeError, match=r"changed: file.Wan2.1_VAE.pth"):
        make_pipeline(moved, cache).generate(request(SECONDS), output)
    vae.write_bytes(released)
    assert make_pipeline(moved, cache).generate(request(SECONDS), output).resumed_windows >= 1
    assert output.read_bytes() == whole.read_bytes()
    again = make_pipeline(nano_checkpoint, cache).generate(request(SECONDS), output)
    assert again.seconds == 0 and again.resumed_windows == again.windows


def test_finished_video_is_not_made_again(pipeline, tmp_path):
    output = tmp_path / "out.mp4"
    pipeline.generate(request(0.3), output)
    written = output.stat().st_mtime_ns
    second = pipeline.generate(request(0.3), output)
    assert second.seconds == 0 and output.stat().st_mtime_ns == written
    assert pipeline.generate(request(0.3), output, resume=False).seconds > 0
    assert output.stat().st_mtime_ns > written
    kept = output.read_bytes()
    with pytest.raises(ResumeError, match=r"another request; changed: request\.prompt.*--no-resume"):
        pipeline.generate(request(0.3, prompt="new"), output)
    assert output.read_bytes() == kept
    changed = pipeline.generate(request(0.3, prompt="new"), output, resume=False)
    assert changed.resumed_windows == 0 and changed.seconds > 0


def test_a_damaged_record_is_named_and_the_remedy_works(pipeline, begun, whole, tmp_path):
    output = tmp_path / "out.mp4"
    begun(output, 3)
    (tmp_path / "out.mp4.job" / "job.json").write_text("{")
    with pytest.raises(ResumeError, match=r"job\.json.*--no-resume"):
        pipeline.generate(request(SECONDS), output)
    pipeline.generate(request(SECONDS), output, resume=False)
    assert output.read_bytes() == whole.read_bytes()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def not_finite(path: Path) -> None:
    import safetensors.torch

    latents = safetensors.torch.load_file(path)["given"]
    safetensors.torch.save_file({"given": latents.fill_(float("nan"))}, path)


def old_form(job: Path) -> None:
    """As written before there were checksums: they are missing, and so are all hand-overs but the last."""
    state = json.loads((job / "job.json").read_text())
    del state["sums"]
    (job / "job.json").write_text(json.dumps(state))
    for given in sorted(job.glob("given_*"))[:-1]:
        given.unlink()


@pytest.mark.parametrize(
    ("old", "file", "damage", "window"),
    [
        (False, "segment_00002.mp4", one_bit, 2),
        (False, "given_00003.safetensors", not_finite, 2),
        (True, "job.json", Path.exists, 3),
        (True, "segment_00002.mp4", cut, 0),
    ],
)
def test_goes_on_from_the_last_good_window(pipeline, begun, whole, tmp_path, old, file, damage, window):
    output = tmp_path / "out.mp4"
    begun(output, 3)
    job = tmp_path / "out.mp4.job"
    if old:
        old_form(job)
    damage(job / file)
    said: list[str] = []
    pipe = make_pipeline_like(
        pipeline, lambda event: said.append(event.text) if isinstance(event, Message) else None
    )
    assert pipe.generate(request(SECONDS), output).resumed_windows == window
    assert [f"going on from window {window + 1}" in text for text in said if file in text] == (
        [True] if window < 3 else []
    )
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.mp4"]


def test_full_disk_keeps_finished_windows_and_a_later_run_continues(pipeline, whole, tmp_path, monkeypatch):
    import errno

    output = tmp_path / "out.mp4"
    real = os.replace

    def full(source, target):
        if Path(target).name == "segment_00002.mp4":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="disk is full"):
        pipeline.generate(request(SECONDS), output)
    assert not output.exists()
    monkeypatch.undo()
    result = pipeline.generate(request(SECONDS), output)
    assert result.resumed_windows == 2
    assert output.read_bytes() == whole.read_bytes()


MEMORY_SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from engine import make_pipeline, request
import resource
changes = dict(fps=1, num_steps=1, guidance_scale=1.0, max_tokens=120)
pipe = make_pipeline(Path(sys.argv[2]), Path(sys.argv[3]), **changes)
pipe.generate(request(0.5), sys.argv[4] + "/warm.mp4")
for seconds in (20, 120):
    Path("/proc/self/clear_refs").write_text("5")
    pipe.generate(request(audio=f"{sys.argv[4]}/{seconds}.flac"), f"{sys.argv[4]}/{seconds}.mp4")
    status = Path("/proc/self/status").read_text()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_length(nano_checkpoint, cache, tmp_path):
    for seconds in (20, 120):
        write_audio(tmp_path / f"{seconds}.flac", voice(seconds).samples[None], 16000, "flac", "mono")
    command = [sys.executable, "-c", MEMORY_SCRIPT, TESTS, nano_checkpoint, cache, tmp_path]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    for seconds in (20, 120):
        assert probe_video(tmp_path / f"{seconds}.mp4").frames == seconds + 2
    short, long = map(int, run.stdout.split()[-2:])
    assert long <= 1.1 * short, (short, long)
