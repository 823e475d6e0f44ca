"""The command line: output of each command, exit codes, and one line for every user error."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from command_line import NANO, PORTRAIT, REPOSITORY, SPEECH, error_lines, run, timed
from omniavatar.cli import main
from omniavatar.engine.events import RequestFinished, RequestStarted
from omniavatar.errors import CheckpointError, InputError, OutputError, ResumeError, TargetError
from omniavatar.types import AvatarRequest, RunResult

# Starting up


@pytest.mark.slow
def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom omniavatar.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'av', 'PIL', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    seconds, done = timed(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout and "make-checkpoint" in done.stdout
    assert seconds < 2, "of processor time"


@pytest.mark.slow
def test_import_loads_neither_torch_nor_pydantic() -> None:
    code = "import sys, omniavatar; assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)"
    assert timed(sys.executable, "-c", code)[1].returncode == 0


@pytest.mark.parametrize(
    "command",
    ["generate", "batch", "plan", "config show", "download", "make-checkpoint", "demo", "calibrate"],
)
def test_every_command_has_help(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0 and "Usage" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="growing segments need Linux")
@pytest.mark.parametrize("name", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_segments_grow_unless_the_environment_configures_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for each in names:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    if name:
        os.environ[name] = "max_split_size_mb:64"
    with pytest.raises(SystemExit):
        main(["--help"])
    found = {each: os.environ[each] for each in names if each in os.environ}
    expected = {name: "max_split_size_mb:64"} if name else {names[0]: "expandable_segments:True"}
    assert found == expected


@pytest.mark.slow
def test_script_takes_the_originals_arguments_from_any_folder(tmp_path: Path) -> None:
    script = str(REPOSITORY / "scripts" / "inference.py")
    _, done = timed(
        sys.executable,
        script,
        "--config",
        "configs/none.yaml",
        "--input_file",
        "x.txt",
        "-hp",
        "a=1",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    expected = (
        "config file not found; choose one in configs/, or use pocket or pocket-live for the packaged models"
    )
    assert done.stderr == f"error: configs/none.yaml: {expected}\n"


def test_version() -> None:
    assert re.fullmatch(r"omniavatar \d+\.\d+\.\d+\n", run("--version").stdout)


# config show


def test_config_show_prints_values_and_origins() -> None:
    result = run("config", "show", "--config", NANO, "--hp=seed=7", "--json")
    report = json.loads(result.stdout)
    assert report["values"]["sampling.seed"] == 7 and report["origins"]["sampling.seed"] == "--hp"
    assert report["origins"]["sampling.num_steps"].startswith(f"{NANO}:")
    assert report["origins"]["output.crf"] == "default"
    assert set(report["values"]) == set(report["origins"])


def test_config_show_table_warns_of_keys_without_effect() -> None:
    result = run("config", "show", "-hp", "reload_cfg=True", "--hparams", "num_steps=3", "--explain")
    assert result.exit_code == 0
    assert "sampling.num_steps" in result.stdout and "Denoising steps" in result.stdout
    assert "reload_cfg has no effect" in result.stdout


# generate, with a pipeline that records its calls


class FakePipeline:
    """Replaces AvatarPipeline and records calls; an image with `bad` in its name raises `error`."""

    error: BaseException = InputError("portrait: broken")

    def __init__(self) -> None:
        self.calls: list[tuple[AvatarRequest, Path, bool | None, int]] = []
        self.built = 0
        self.seed = 0

    def from_config(self, config: Any, overrides: Any = (), recorder: Any = None) -> FakePipeline:
        self.built += 1
        self.seed = config.sampling.seed
        self.recorder = recorder
        return self

    def generate(
        self, request: AvatarRequest, output: Path, resume: bool | None = None, index: int = 0
    ) -> RunResult:
        self.calls.append((request, output, resume, index))
        if "bad" in str(request.image):
            raise self.error
        self.recorder.event(RequestStarted(index, output.name, 5, windows=1, steps=2, resumed_windows=0))
        self.recorder.event(RequestFinished(str(output), 1.0, 5))
        return RunResult(output, output.with_suffix(".json"), 5, 1, 0, 1.0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePipeline:
    """The pipeline of the commands, which run in an empty folder."""
    import omniavatar.engine.pipeline

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pipeline = FakePipeline()
    monkeypatch.setattr(omniavatar.engine.pipeline, "AvatarPipeline", pipeline)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return pipeline


def requests(folder: Path, *images: str) -> str:
    for image in images:
        (folder / image).touch()
    path = folder / "in.txt"
    path.write_text("".join(f"Prompt {number}@@{image}\n" for number, image in enumerate(images)))
    return str(path)


def test_generate_one_request(fake: FakePipeline) -> None:
    result = run(
        *("generate", "--config", NANO, "--prompt", "A man", "--image", PORTRAIT, "--audio", SPEECH),
        *("--output", "x.mp4", "--seed", "5", "--no-resume", "--quiet", "-hp", "seed=3"),
    )
    assert result.exit_code == 0, result.stderr
    request, output, resume, index = fake.calls[0]
    assert (request.prompt, str(request.image), str(request.audio)) == ("A man", PORTRAIT, SPEECH)
    assert (output, resume, index, fake.seed) == (Path("x.mp4"), False, 0, 5)
    assert result.stdout == "x.mp4\n" and result.stderr == ""


def test_generate_many_names_outputs_and_builds_one_pipeline(fake: FakePipeline, tmp_path: Path) -> None:
    result = run(
        "generate",
        "--config",
        NANO,
        "--input_file",
        requests(tmp_path, "a.png", "b.png"),
        "--hp=output_dir=o",
    )
    assert result.exit_code == 0
    assert [call[1] for call in fake.calls] == [Path("o/000_prompt-0.mp4"), Path("o/001_prompt-1.mp4")]
    assert fake.built == 1 and fake.calls[0][2] is None


@pytest.mark.parametrize("error", [InputError("portrait: broken"), ResumeError("job: other config")])
def test_failed_line_is_named_and_the_others_run(
    fake: FakePipeline, tmp_path: Path, error: Exception
) -> None:
    fake.error = error
    path = requests(tmp_path, "a.png", "bad.png", "c.png")
    with open(path, "a") as file:
        file.write("only a prompt\n")
    result = run("generate", "--config", NANO, "--input-file", path, "--quiet")
    assert result.exit_code == 1
    assert [call[3] for call in fake.calls] == [0, 1, 2]
    assert error_lines(result) == [
        f"error: line 2: {error}",
        f"error: {path}:4: no image; the model needs a portrait, write prompt@@image@@audio",
        f"error: 2 of 4 lines of {path} failed",
    ]


@pytest.mark.parametrize(
    ("error", "code"), [(CheckpointError("w: missing"), 4), (OutputError("disk: full"), 5)]
)
def test_error_that_hits_every_line_ends_the_run(
    fake: FakePipeline, tmp_path: Path, error: Exception, code: int
) -> None:
    fake.error = error
    result = run("generate", "--config", NANO, "--input_file", requests(tmp_path, "bad.png", "b.png"))
    assert result.exit_code == code and len(fake.calls) == 1
    assert error_lines(result) == [f"error: {error}"]


def test_ctrl_c_is_one_line_and_130(fake: FakePipeline, tmp_path: Path) -> None:
    fake.error = KeyboardInterrupt()
    result = run("generate", "--config", NANO, "--input_file", requests(tmp_path, "bad.png"), "--quiet")
    assert result.exit_code == 130
    assert error_lines(result) == [
        "error: interrupted; finished windows are kept, and the same command continues after them"
    ]


def test_single_request_error_has_its_own_code(fake: FakePipeline, tmp_path: Path) -> None:
    (tmp_path / "bad.png").touch()
    result = run("generate", "--config", NANO, "--prompt", "p", "--image", str(tmp_path / "bad.png"))
    assert result.exit_code == 3 and error_lines(result) == ["error: portrait: broken"]


def test_json_log_is_all_json(fake: FakePipeline, tmp_path: Path) -> None:
    path = requests(tmp_path, "a.png", "bad.png")
    result = run(
        *("generate", "--config", NANO, "--input_file", path, "--log-format", "json", "--hp=reload_cfg=true")
    )
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert [event["event"] for event in events] == [
        "message",
        "message",
        "request_started",
        "request_finished",
        "error",
        "error",
    ]
    assert events[0]["level"] == "warning" and "reload_cfg" in events[0]["text"]
    assert "2 of 2 lines have no voice" in events[1]["text"]
    assert result.stdout == "" and result.exit_code == 1


def bug_of(
    fake: FakePipeline, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str, env: str | None = None
) -> Result:
    """`generate` of a line that meets a bug and one that does not."""
    fake.error = ZeroDivisionError(f"a\x1b[31m{'long' * 1000}")
    monkeypatch.setenv("OMNIAVATAR_DEBUG", env or "")
    return run(
        *options[:1],
        "generate",
        "-c",
        NANO,
        "--input_file",
        requests(folder, "bad.png", "b.png"),
        *options[1:],
    )


def test_a_bug_is_one_line_with_its_number_and_the_next_line_runs(
    fake: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = bug_of(fake, tmp_path, monkeypatch)
    bug, summary = error_lines(result)
    assert result.exit_code == 70 and [call[3] for call in fake.calls] == [0, 1] and fake.built == 2
    assert (
        bug.startswith("error: line 1: this is a bug: ZeroDivisionError: a\\x1b[31mlong") and len(bug) < 500
    )
    assert re.search(r"\(generate\.py:\d+\); please report it, with what --debug prints$", bug)
    assert summary.endswith("in.txt failed") and "Traceback" not in result.stderr and "\x1b" not in bug
    fake.calls.clear()
    (tmp_path / "bad.png").touch()
    single = run("generate", "--config", NANO, "--prompt", "p", "--image", str(tmp_path / "bad.png"))
    assert single.exit_code == 70 and len(error_lines(single)) == 1


@pytest.mark.parametrize(("options", "env"), [(("--debug",), None), ((), "1"), ((), "0")])
def test_the_traceback_of_a_bug_is_printed_on_request(
    fake: FakePipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    env: str | None,
) -> None:
    result = bug_of(fake, tmp_path, monkeypatch, *options, env=env)
    assert result.exit_code == 70
    assert ("Traceback (most recent call last)" in result.stderr) == (
        env != "0"
    ) and "\x1b" not in result.stderr


def test_debug_may_follow_the_command(
    fake: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.error = ZeroDivisionError()
    monkeypatch.setenv("OMNIAVATAR_DEBUG", "")
    result = run("generate", "-c", NANO, "--input_file", requests(tmp_path, "bad.png"), "--debug")
    assert result.exit_code == 70 and "ZeroDivisionError" in result.stderr and "Traceback" in result.stderr
    assert os.environ["OMNIAVATAR_DEBUG"] == "1", "for processes that are started later"


@pytest.mark.parametrize(
    ("error", "code", "calls"),
    [
        (TargetError("x.mp4: is a folder"), 1, 2),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x.mp4"), 1, 2),
        (OSError(errno.ENOSPC, "No space left on device", "x.mp4"), 5, 1),
        (MemoryError(), 7, 1),
        (OSError(errno.EMFILE, "Too many open files"), 7, 1),
    ],
)
def test_errors_of_the_system_are_no_bugs(
    fake: FakePipeline, tmp_path: Path, error: Exception, code: int, calls: int
) -> None:
    fake.error = error
    result = run("generate", "-c", NANO, "--input_file", requests(tmp_path, "bad.png", "b.png"))
    assert (result.exit_code, len(fake.calls)) == (code, calls), result.stderr
    assert not any("bug" in line for line in error_lines(result))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--prompt", "p"],
        ["--prompt", "p", "--image", "i", "--input_file", "f"],
        ["--input_file", "f", "--output", "o.mp4"],
        ["--input_file", "f", "--log-format", "xml"],
        ["--prompt", "p", "--image", "i", "--unknown"],
    ],
)
def test_usage_errors_are_2(arguments: list[str]) -> None:
    assert run("generate", "--config", NANO, *arguments).exit_code == 2


def test_bad_hp_is_2_and_one_line(tmp_path: Path) -> None:
    result = run("generate", "--config", NANO, "--input_file", "x", "--hp=num_stpes=3")
    assert result.exit_code == 2
    assert error_lines(result) == ["error: --hp: unknown key num_stpes; did you mean num_steps?"]


def test_missing_input_file_is_3() -> None:
    result = run("generate", "--config", NANO, "--input_file", "none.txt")
    assert result.exit_code == 3 and error_lines(result) == ["error: none.txt: no such input file"]


def test_torchrun_runs_with_one_process_and_fails_with_more(
    fake: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = requests(tmp_path, "a.png")
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert run("generate", "--config", NANO, "--input_file", path).exit_code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("generate", "--config", NANO, "--input_file", path)
    assert result.exit_code == 2 and "--nproc_per_node=1" in error_lines(result)[0]


def test_log_records_of_the_package_become_messages(fake: FakePipeline, tmp_path: Path) -> None:
    import logging

    original = fake.generate

    def noisy(*arguments: Any, **options: Any) -> RunResult:
        logging.getLogger("omniavatar.media.image").info("only the first frame is used")
        return original(*arguments, **options)

    fake.generate = noisy  # type: ignore[method-assign]
    path = requests(tmp_path, "a.png")
    result = run("generate", "--config", NANO, "--input_file", path, "--log-format", "json")
    texts = [json.loads(line).get("text") for line in result.stderr.splitlines()]
    assert "only the first frame is used" in texts
    assert logging.getLogger("omniavatar").handlers == []


# checkpoints


def test_make_checkpoint_writes_the_layout(tmp_path: Path) -> None:
    result = run("make-checkpoint", "--scale", "nano", "--out", str(tmp_path / "n"), "--seed", "3")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "n/OmniAvatar-nano/config.json").is_file()
    assert run("make-checkpoint", "--scale", "7B", "--out", "x").exit_code == 2


def test_download_passes_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import omniavatar.checkpoint.download as module

    calls: list[tuple[str, Path]] = []

    def fake_download(scale: str, root: Path, report: Callable[[str], None]) -> None:
        calls.append((scale, root))
        report("a/b: licence Apache-2.0")

    monkeypatch.setattr(module, "download", fake_download)
    done = run("download", "14B", "--root", str(tmp_path))
    assert done.exit_code == 0 and "licence Apache-2.0" in done.stdout
    assert calls == [("14B", tmp_path)]
    assert run("download", "7B").exit_code == 2


def test_every_error_has_a_row_in_the_docs() -> None:
    import omniavatar.errors as module

    table = (REPOSITORY / "docs" / "exit_codes.md").read_text()
    for kind in vars(module).values():
        if isinstance(kind, type) and issubclass(kind, module.OmniAvatarError):
            assert re.search(rf"^\| {kind.exit_code} \|.*`{kind.__name__}`", table, re.M), kind.__name__
