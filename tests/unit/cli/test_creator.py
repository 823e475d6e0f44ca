"""What a creator meets: a default model, warnings for a forgotten or swapped file, her own demo, Ctrl-C."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from command_line import NANO, PORTRAIT, REPOSITORY, SPEECH, error_lines, plain, run
from omniavatar.cli.choose import BEST_FIRST, best_config
from omniavatar.cli.position import Position, command_again
from omniavatar.device import choose_device
from omniavatar.engine.events import RequestStarted, WindowFinished
from omniavatar.engine.pipeline import AvatarPipeline
from omniavatar.measure.doctor import commands_now, config_row, fetch_commands
from omniavatar.types import AvatarRequest, RunResult

Calls = list[tuple[AvatarRequest, Path]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """The requests that reach a pipeline which makes nothing, of commands that run in an empty folder."""
    made: Calls = []
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def generate(self: Any, request: AvatarRequest, output: Path | None, **options: Any) -> RunResult:
        made.append((request, output))
        written = output or Path("000_default.mp4")
        return RunResult(written, written.with_suffix(".json"), 5, 1, 0, 1.0)

    monkeypatch.setattr(AvatarPipeline, "generate", generate)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return made


def messages(*arguments: str) -> list[str]:
    result = run(*arguments, "--log-format", "json")
    assert result.exit_code == 0, result.stderr
    texts = [json.loads(line)["text"] for line in result.stderr.splitlines()]
    return [text for text in texts if not text.startswith("computing with ")]  # CPU threads, in every run


# the default model


def write_config(folder: Path, name: str, weights: Path) -> Path:
    path = folder / f"{name}.yaml"
    text = (REPOSITORY / "configs" / "nano.yaml").read_text()
    path.write_text(text.replace("pretrained_models/nano", str(weights)))
    return path


def test_the_best_model_whose_weights_are_here_is_taken(nano_checkpoint: Path, tmp_path: Path) -> None:
    write_config(tmp_path, BEST_FIRST[0], tmp_path / "absent")
    for name in BEST_FIRST[2:]:
        write_config(tmp_path, name, nano_checkpoint)
    config, reason = best_config(tmp_path)
    assert config == tmp_path / f"{BEST_FIRST[2]}.yaml"
    assert reason == f"no --config: taking {config}, the best model whose weights are here"


def test_the_packaged_model_is_taken_without_weights(tmp_path: Path, calls: Calls) -> None:
    write_config(tmp_path, BEST_FIRST[0], tmp_path / "absent")
    assert best_config(tmp_path).config == Path("pocket")
    assert best_config(tmp_path / "no folder").config == Path("pocket")
    texts = messages("generate", "--prompt", "p", "--image", PORTRAIT, "--audio", SPEECH)
    assert texts[0].startswith("no --config: taking the packaged model, --config pocket;")
    assert len(calls) == 1


def test_every_default_is_a_configuration_of_this_repository() -> None:
    assert all((REPOSITORY / "configs" / f"{name}.yaml").is_file() for name in BEST_FIRST)


def test_several_processes_need_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    result = run("generate", "--prompt", "p", "--image", PORTRAIT)
    assert result.exit_code == 2 and "--config is missing" in error_lines(result)[0]


def test_plan_needs_no_config_and_says_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run("plan", "--config", NANO, "--image", PORTRAIT, "--audio", SPEECH)
    text = " ".join(result.stdout.split())
    assert f"decided by the voice {SPEECH}, after 0.3 s of silence" in text
    assert f"decided by the portrait {PORTRAIT}" in text
    tall = run("plan", "--config", NANO, "--hp=image_sizes_720=[[160,96]]")
    assert "96 x 160 (width x height)" in tall.stdout
    assert "with --audio the voice decides the length" in tall.stdout
    assert "taking the packaged model" in run("plan").stderr


# forgotten and swapped files


def test_a_forgotten_voice_is_named(calls: Calls) -> None:
    one = ("generate", "--config", "pocket", "--prompt", "p", "--image", PORTRAIT)
    assert messages(*one) == [
        "no --audio: the video is silent and 8 s long; give a voice, or set the number of frames: "
        "--hp=seq_len=N"
    ]
    assert messages(*one, "--audio", SPEECH) == []
    assert messages(*one, "--hp=seq_len=20") == [], "the length of a silent video was chosen"


def test_lines_without_a_voice_are_counted(calls: Calls, tmp_path: Path) -> None:
    lines = tmp_path / "in.txt"
    lines.write_text(f"a@@{PORTRAIT}@@{SPEECH}\nb@@{PORTRAIT}\nc@@{PORTRAIT}\n")
    (text,) = messages("generate", "--config", "pocket", "--input_file", str(lines))
    assert text.startswith("2 of 3 lines have no voice; their videos are silent and 8 s long")


@pytest.mark.parametrize("command", [["generate", "--config", NANO, "--prompt", "p"], ["demo"]])
def test_swapped_files_are_recognised(command: list[str], calls: Calls) -> None:
    result = run(*command, "--image", "talk.wav", "--audio", "me.jpeg")
    assert result.exit_code == 3 and not calls
    assert error_lines(result) == [
        "error: --image talk.wav is a sound and --audio me.jpeg is a picture; "
        "write --image me.jpeg --audio talk.wav"
    ]


def test_a_folder_as_output_takes_the_video(calls: Calls, tmp_path: Path) -> None:
    one = ("generate", "--config", "pocket", "--prompt", "A man", "--image", PORTRAIT, "--audio", SPEECH)
    messages(*one, "-o", str(tmp_path))
    messages(*one)
    assert [output for _, output in calls] == [tmp_path, None], "the pipeline takes a free number in it"


# her own demo


def test_demo_takes_a_portrait_and_a_voice(calls: Calls) -> None:
    messages("demo", "--image", "me.png", "--audio", "mine.wav", "--prompt", "A man")
    request, output = calls[0]
    assert (request.prompt, request.image, request.audio) == ("A man", Path("me.png"), Path("mine.wav"))
    assert output == Path("demo_out/me.mp4")
    messages("demo", "--audio", "mine.wav")
    assert calls[1][1] == Path("demo_out/mine.mp4") and Path(str(calls[1][0].image)).is_file()
    assert any("demo --image me.png --audio me.wav" in text for text in messages("demo"))
    assert calls[2][1] == Path("demo_out/demo.mp4")


# Ctrl-C


def test_ctrl_c_names_windows_folder_and_command() -> None:
    position, output = Position(), Path("a b/out.mp4")
    assert "the same command continues" in position.interrupted(output, "again")
    position(RequestStarted(0, "out.mp4", 99, windows=9, steps=2, resumed_windows=0))
    assert position.interrupted(output, "again") == (
        "interrupted before the first of 9 windows was finished; run again: again"
    )
    position(WindowFinished(window=3, windows=9, frames_done=40, seconds=1))
    assert position.interrupted(output, "again") == (
        "interrupted; 4 of 9 windows are finished and kept in a b/out.mp4.job; to continue after them: again"
    )
    position(RequestStarted(1, "b.mp4", 99, windows=9, steps=2, resumed_windows=2))
    assert "2 of 9 windows" in position.interrupted(output, "again")


def test_the_command_that_continues_does_not_start_over() -> None:
    words = ["generate", "--no-resume", "--prompt", "two words", "-o", "x.mp4"]
    assert command_again(words) == "omniavatar generate --prompt 'two words' -o x.mp4"


def test_a_program_that_is_not_on_path_is_named_by_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", [".venv/bin/omniavatar", "demo"])
    assert command_again(["demo"]) == ".venv/bin/omniavatar demo"


# doctor


def row(config: str, ready: bool, scale: str = "1.3B", missing: int = 0, loras: int = 0) -> dict[str, Any]:
    lora = [f"lora{number}" for number in range(loras)]
    files = [f"{scale}-{number}" for number in range(missing)] + lora
    return {
        **{"config": config, "ready": ready, "error": None, "needs_bytes": 9 if ready else 1},
        **{"missing": files, "scale": scale, "loras": lora, "fits": True, "placed": True, "memory": ""},
    }


def test_doctor_summarises_what_to_fetch_and_what_runs() -> None:
    rows = [
        row("a.yaml", False, "14B", missing=3),
        row("b.yaml", False, "14B", missing=3, loras=1),
        row("c.yaml", False, "nano", missing=2),
        row("d.yaml", True),
    ]
    large, nano = fetch_commands(rows)
    assert large["command"] == "omniavatar download 14B" and large["configs"] == ["a.yaml", "b.yaml"]
    assert len(large["files"]) == 3 and large["loras"] == ["lora0"]
    assert nano["command"] == "omniavatar make-checkpoint --scale nano --out pretrained_models/nano"
    first, last = commands_now(rows)
    assert first.startswith("omniavatar generate --config d.yaml --image") and last == "omniavatar demo"


def test_doctor_ends_with_what_can_be_run(nano_checkpoint: Path, tmp_path: Path) -> None:
    ready = write_config(tmp_path, "ready", nano_checkpoint)
    absent = write_config(tmp_path, "absent", tmp_path / "nowhere")
    shutil.copy(absent, tmp_path / "absent2.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("nonsense: 1\n")
    result = run("doctor", "--configs", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    text = plain(result.stdout)
    assert text.rstrip().endswith("omniavatar demo")
    runs = text.partition("you can run this now")[2]
    assert f"omniavatar generate --config {ready} " in runs and str(absent) not in runs
    fetch = text.partition("to get the rest")[2].partition("you can run")[0].splitlines()
    assert len([line for line in fetch if line.strip()]) == 2, "one command and its configurations"
    assert f"  {broken}: {broken}:1: unknown key nonsense" in text.partition("to do")[2]
    assert "threads that wait on the CPU" in text


def test_doctor_knows_the_command_of_a_merged_model() -> None:
    row = config_row(REPOSITORY / "configs" / "livetalk.yaml", choose_device("cpu"))
    if row["missing"]:
        (fetch,) = fetch_commands([row])
        assert fetch["command"] == "omniavatar download livetalk"
    assert row["scale"] == "livetalk"


def test_a_missing_merged_file_names_its_download() -> None:
    config = str(REPOSITORY / "configs" / "livetalk.yaml")
    result = run("generate", "-c", config, "--prompt", "a person", "--image", PORTRAIT)
    assert result.exit_code != 0
    assert "run `omniavatar download livetalk`" in result.stderr
