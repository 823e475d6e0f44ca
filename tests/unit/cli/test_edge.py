"""The edge of the command line: wrong options, a strange environment, and streams that are gone."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from command_line import NANO, PORTRAIT, REPOSITORY, error_lines, run
from omniavatar.cli.batch import _exit
from omniavatar.cli.ranks import config_for_rank
from omniavatar.cli.terminal import Outlet, is_incomplete, safe_streams
from omniavatar.config.load import load_config
from omniavatar.errors import ResourceError
from omniavatar.parallel.process import Process

HOSTILE = "\x1b]0;owned\x07\u202ex"


@pytest.mark.parametrize(
    "options",
    [
        ["--nothing", "x"],
        ["--seed", "12:30"],
        [f"--{HOSTILE}"],
        ["--prompt", "p", "--image", "i", "--input_file", "f"],
        ["surplus"],
    ],
)
def test_a_wrong_option_is_one_line_or_one_event(options: list[str]) -> None:
    plain = run("generate", "--config", NANO, *options)
    (line,) = plain.stderr.splitlines()
    assert plain.exit_code == 2 and line.startswith("error: ")
    assert line.endswith("; see `omniavatar generate --help`") and "\x1b" not in line and "\u202e" not in line
    for log in (["--log-format", "json"], ["--log-format=json"]):
        result = run("generate", "--config", NANO, *log, *options)
        event = json.loads(result.stderr)
        assert result.exit_code == 2 and event["event"] == "error" and f"error: {event['text']}" == line


@pytest.mark.parametrize("text", ["010", "1_0", "1.5", "0x1F", "\u0661", ""])
@pytest.mark.parametrize("command", [["generate", "-c", "pocket"], ["make-checkpoint", "--scale", "nano"]])
def test_a_seed_is_read_as_the_configuration_reads_it(command: list[str], text: str) -> None:
    result = run(*command, f"--seed={text}")
    assert result.exit_code == 2
    assert f"'--seed': must be a whole number; got '{text}'" in result.stderr


def test_without_arguments_the_help_is_printed() -> None:
    assert run().exit_code == 2 and "Usage" in run().output and "error:" not in run().output


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: 'abc' is not a number; unset this variable"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: '' is not a number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK: '-1' is not a number"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "9" * 5000}, "LOCAL_RANK: '999"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2, LOCAL_RANK 0, WORLD_SIZE 2: ranks count from 0"),
        ({"WORLD_SIZE": "0"}, "RANK 0, LOCAL_RANK 0, WORLD_SIZE 0: "),
    ],
)
@pytest.mark.parametrize("command", ["generate", "demo"])
def test_wrong_ranks_are_one_line(
    command: str, variables: dict[str, str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = ["-c", NANO, "--prompt", "p", "--image", PORTRAIT] if command == "generate" else []
    result = run(command, *options)
    (line,) = error_lines(result)
    assert result.exit_code == 2 and line.startswith(f"error: {problem}") and len(line) < 300
    if command == "generate":
        result = run(command, *options, "--log-format", "json")
        assert json.loads(result.stderr)["text"].startswith(problem)


def test_gpus_that_do_not_exist_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    config = load_config(None, {"weights": "random", "scale": "nano"}).config
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for gpus in ([0], [0, 1]):
        with pytest.raises(ResourceError, match="--gpus: this machine has no CUDA device; leave --gpus out"):
            config_for_rank(config, gpus, Process())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ResourceError, match="--gpus: this machine has no GPU 5; choose from 0 to 1"):
        config_for_rank(config, [5], Process())
    assert config_for_rank(config, [1], Process()).runtime.device == "cuda:1"


@pytest.mark.parametrize(
    ("classes", "code"),
    [(["InputError"], 1), (["WorkerDied", "TargetError"], 1), (["InputError", "KeyError"], 70)],
)
def test_a_bug_in_a_batch_has_its_own_code(classes: list[str], code: int) -> None:
    states = {str(n): SimpleNamespace(state="failed", error_class=name) for n, name in enumerate(classes)}
    ledger = SimpleNamespace(states=states, interrupted=False, error=None)
    result: Any = SimpleNamespace(ledger=ledger, path="p", summary={"failed": len(classes), "items": 3})
    with pytest.raises(typer.Exit) as leaving:
        _exit(result, lambda text: None)
    assert leaving.value.exit_code == code


# Streams


def test_a_pipe_without_a_reader_swallows_everything() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    outlet = Outlet(writer)
    text = io.TextIOWrapper(io.BufferedWriter(outlet), write_through=True)
    print("lost" * 100_000, file=text, flush=True)
    assert outlet.lost is not None and outlet.lost.errno == errno.EPIPE and not is_incomplete(outlet)
    os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_is_noticed_and_swallowed() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    outlet = Outlet(descriptor)
    assert outlet.write(b"lost") == 4 and outlet.write(b"more") == 4 and is_incomplete(outlet)
    assert outlet.fileno() == descriptor and not outlet.isatty() and outlet.writable()
    os.close(descriptor)


def test_a_slow_reader_of_a_non_blocking_pipe_gets_everything() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    read: list[bytes] = []

    def drain() -> None:
        time.sleep(0.1)
        while data := os.read(reader, 1 << 16):
            read.append(data)

    thread = threading.Thread(target=drain)
    thread.start()
    outlet = Outlet(writer)
    with io.BufferedWriter(outlet) as buffered:
        buffered.write(b"x" * 300_000)
    os.close(writer)
    thread.join()
    assert outlet.lost is None and len(b"".join(read)) == 300_000


def test_streams_without_a_descriptor_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with safe_streams() as outlets:
        print("kept")
    assert outlets == [] and mine.getvalue() == "kept\n" and sys.stdout is mine


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "omniavatar.cli", *arguments]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_report_that_cannot_be_written_is_an_error_but_a_reader_may_leave() -> None:
    show = " ".join(command_line("config", "show"))
    full = subprocess.run(f"{show} >/dev/full", shell=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert full.returncode == 5 and full.stderr.startswith("error: stdout: cannot be written")
    left = subprocess.run(
        ["bash", "-c", f"{show} --json | head -c 1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert (left.returncode, left.stdout, left.stderr) == (0, "{", "")
    odd = {**os.environ, "PYTHONIOENCODING": "ascii"}
    wrong = subprocess.run(
        command_line("config", "show", "-c", "é\u202e😀.yaml"), capture_output=True, env=odd, cwd=REPOSITORY
    )
    assert (
        wrong.returncode == 2
        and b"error: \\xe9\\u202e\\U0001f600.yaml: config file not found" in wrong.stderr
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("streams", [">&- 2>/dev/full", "2>&1 | true"])
def test_a_lost_log_does_not_end_a_run(streams: str, nano_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "pretrained_models").mkdir()
    (tmp_path / "pretrained_models" / "nano").symlink_to(nano_checkpoint)
    hp = "num_steps=1,image_sizes_720=[[32,32]],max_tokens=60,overlap_frame=1,guidance_scale=1,device=cpu"
    program = command_line(
        *("generate", "-c", NANO, "--prompt", "p", "--image", PORTRAIT, "--output", "x.mp4", "--log-format"),
        *("json", f"'--hp={hp},seq_len=5,text_cache_dir={tmp_path / 'cache'}'"),
    )
    script = f"{' '.join(program)} {streams}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path)
    from omniavatar.media.inspect import probe_video

    assert done.returncode == 0
    assert probe_video(tmp_path / "x.mp4").frames == 5 and (tmp_path / "x.json").is_file()
    assert sorted(path.name for path in tmp_path.glob("x*")) == ["x.json", "x.mp4"]


@pytest.mark.parametrize("minutes", ["nan", "inf", "1e300", "0", "-1", "x", "1e999"])
def test_minutes_to_plan_for_have_a_limit(minutes: str) -> None:
    result = run("plan", "--config", "pocket", "--minutes", minutes)
    (line,) = error_lines(result)
    assert result.exit_code == 2 and "'--minutes'" in line
    benchmark = run("benchmark", "--configs", "none.yaml", "--minutes", f"1,{minutes}")
    (line,) = error_lines(benchmark)
    assert benchmark.exit_code == 2 and line.startswith("error: --minutes")
