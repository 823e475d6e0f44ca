"""Commands in their own processes: whole runs, Ctrl-C, how a command ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import processes
from command_line import NANO, PORTRAIT, REPOSITORY, SPEECH, timed


@pytest.mark.slow
def test_input_file_end_to_end(nano_checkpoint: Path, tmp_path: Path) -> None:
    models = tmp_path / "pretrained_models"
    models.mkdir()
    os.symlink(nano_checkpoint, models / "nano")
    lines = tmp_path / "in.txt"
    lines.write_text(f"A woman speaks@@{PORTRAIT}@@{SPEECH}\nno picture\n")
    script = str(REPOSITORY / "scripts" / "inference.py")
    hp = "num_steps=1,image_sizes_720=[[32,32]],max_tokens=60,overlap_frame=1,guidance_scale=1,device=cpu"
    _, done = timed(
        *(sys.executable, script, "--config", NANO, "--input_file", str(lines)),
        f"--hp={hp},text_cache_dir={tmp_path / 'cache'}",
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert f"error: {lines}:2: no image" in done.stderr
    video = tmp_path / "outputs" / "000_a-woman-speaks.mp4"
    from omniavatar.media.inspect import probe_video

    assert probe_video(video).frames == 160 and video.with_suffix(".json").is_file()


@pytest.mark.slow
def test_ctrl_c_keeps_finished_windows_and_the_same_command_resumes(
    nano_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "pretrained_models").mkdir()
    os.symlink(nano_checkpoint, tmp_path / "pretrained_models" / "nano")
    hp = "num_steps=1,image_sizes_720=[[32,32]],max_tokens=40,overlap_frame=1,guidance_scale=1,device=cpu"
    command = [
        *(sys.executable, "-m", "omniavatar.cli", "generate", "--config", NANO, "--log-format", "json"),
        *("--prompt", "p", "--image", PORTRAIT, "--output", "x.mp4"),
        f"--hp={hp},seq_len=400,text_cache_dir={tmp_path / 'cache'}",
    ]
    with processes.start(command, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            event = json.loads(line)
            if event["event"] == "window_finished":
                process.send_signal(signal.SIGINT)
                break
        rest = [json.loads(line) for line in process.stderr]
    assert process.returncode == 130
    (text,) = [event["text"] for event in rest if event["event"] == "error"]
    kept = r"interrupted; (\d+) of \d+ windows are finished and kept in x\.mp4\.job; "
    found = re.fullmatch(kept + "to continue after them: (.*)", text)
    assert found is not None, text
    state = json.loads((tmp_path / "x.mp4.job" / "job.json").read_text())
    assert state["done"] == int(found[1])
    assert shlex.split(found[2]) == ["omniavatar", *command[3:]]
    assert not (tmp_path / "x.mp4").exists()
    _, done = timed(*command, cwd=tmp_path)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    started = next(event for event in events if event["event"] == "request_started")
    assert done.returncode == 0 and started["resumed_windows"] >= 1
    assert (tmp_path / "x.mp4").is_file()


LEAVING = """
import atexit, sys, threading, time
from omniavatar.cli.common import leave_at_once

atexit.register(print, "handlers run")
print("printed", end="; ")
{before}
leave_at_once({code})
print("continues", end="; ")
sys.exit({code})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "code", "expected"),
    [
        ("", "3", "printed; handlers run\n"),
        ("", "None", "printed; handlers run\n"),
        ("sys.setprofile(lambda *_: None)", "3", "printed; continues; handlers run\n"),
        (
            "threading.Thread(target=time.sleep, args=(0.2,)).start()",
            "3",
            "printed; continues; handlers run\n",
        ),
    ],
)
def test_a_command_ends_at_once(before: str, code: str, expected: str) -> None:
    program = [sys.executable, "-c", LEAVING.format(before=before, code=code)]
    ended = subprocess.run(program, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == (expected, "")
    assert ended.returncode == (0 if code == "None" else int(code))
