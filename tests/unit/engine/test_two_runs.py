"""Whole runs: a second run of the same output, the file while it gets its name, odd outputs, input files."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from command_line import PORTRAIT, error_lines, run
from engine import make_pipeline, request
from omniavatar import AvatarPipeline
from omniavatar.engine.events import StepFinished, WindowFinished
from omniavatar.engine.recorder import RunRecorder
from omniavatar.errors import BusyError, OutputError
from omniavatar.media.inspect import probe_video
from small_pocket import write_config


@pytest.fixture(scope="module")
def pipeline(nano_checkpoint, tmp_path_factory):
    return make_pipeline(nano_checkpoint, tmp_path_factory.mktemp("text-cache"), num_steps=1)


def listened(pipeline: AvatarPipeline, listener) -> AvatarPipeline:
    return AvatarPipeline.from_config(pipeline.config, recorder=RunRecorder([listener]))


@pytest.mark.parametrize("resume", [None, False])
def test_a_second_run_is_refused_and_the_first_is_whole(pipeline, tmp_path, resume) -> None:
    output = tmp_path / "talk.mp4"
    running, go_on = threading.Event(), threading.Event()

    def pause(event: object) -> None:
        if isinstance(event, StepFinished) and event.window == 1:
            running.set()
            assert go_on.wait(60)

    first = threading.Thread(target=listened(pipeline, pause).generate, args=(request(0.9), output))
    first.start()
    assert running.wait(60)
    with pytest.raises(BusyError, match=f"process {os.getpid()} on .*wait until it ends"):
        pipeline.generate(request(0.9), output, resume=resume)
    go_on.set()
    first.join()
    frames = json.loads((tmp_path / "talk.json").read_text())["frames"]
    assert probe_video(output).frames == frames > 13
    assert {path.name for path in tmp_path.iterdir()} == {"talk.mp4", "talk.json"}
    assert pipeline.generate(request(0.9), output).seconds == 0, "finished already"


def test_killed_while_the_video_gets_its_name(pipeline, tmp_path, monkeypatch) -> None:
    """Killed before or after the rename; the next run leaves nothing behind and gives the same bytes."""
    output = tmp_path / "talk.mp4"
    pipeline.generate(request(0.3), output)
    whole = output.read_bytes()
    real = os.replace
    for before in (True, False):
        output.unlink()
        output.with_suffix(".json").unlink()

        def killed(source, target, before=before):
            if Path(target) != output:
                return real(source, target)
            if not before:
                real(source, target)
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.generate(request(0.3), output)
        monkeypatch.undo()
        (tmp_path / "talk.mp4.job" / ".talk.mp4.0123abcd.tmp").write_bytes(b"as kill -9 leaves it")
        pipeline.generate(request(0.3), output)
        assert output.read_bytes() == whole
        assert {path.name for path in tmp_path.iterdir()} == {"talk.mp4", "talk.json"}


def test_a_folder_as_output_and_none(pipeline, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [
        pipeline.generate(request(0.1, prompt=prompt, sampling=request().sampling), output).output
        for prompt, output in (("a b", tmp_path), ("a b", tmp_path), ("a b", None))
    ]
    assert [path.name for path in made] == ["000_a-b.mp4"] * 3 and made[0] == made[1]
    assert made[2].parent == pipeline.config.output.output_dir


def test_a_link_as_output(pipeline, tmp_path) -> None:
    (tmp_path / "link.mp4").symlink_to("real.mp4")
    pipeline.generate(request(0.1), tmp_path / "link.mp4")
    assert (tmp_path / "link.mp4").is_symlink()
    assert probe_video(tmp_path / "real.mp4").frames > 0
    assert {path.name for path in tmp_path.iterdir()} == {"link.mp4", "real.mp4", "real.json"}


def test_the_longest_name(pipeline, tmp_path) -> None:
    name = "é" * 125 + "x.mp4"
    result = pipeline.generate(request(0.1), tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {name, result.sidecar.name}
    assert len(os.fsencode(name)) == 255


def test_a_video_that_is_not_as_planned_gets_no_name(pipeline, tmp_path) -> None:
    """A segment is exchanged behind the writer's back."""
    output = tmp_path / "talk.mp4"

    def harm(event: object) -> None:
        if isinstance(event, WindowFinished) and event.window == 0:  # in the writer's thread, between appends
            partial = bytearray((tmp_path / "talk.partial.mp4").read_bytes())
            (tmp_path / "talk.partial.mp4").write_bytes(partial[: len(partial) // 2])

    with pytest.raises(OutputError, match="talk"):
        listened(pipeline, harm).generate(request(0.9), output)
    assert not output.exists() and not (tmp_path / "talk.json").exists()
    assert pipeline.generate(request(0.9), output).resumed_windows > 0


@pytest.mark.slow
def test_each_refusal_belongs_to_its_line(tmp_path) -> None:
    lines = [{"output": "x.partial.mp4"}, {"output": "x.mp4"}, {"output": "003_four.mp4"}, {}]
    rows = [{"prompt": "four", "image": PORTRAIT, **line} for line in lines]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_config(tmp_path / "small.yaml")
    done = run(
        *("generate", "-c", str(tmp_path / "small.yaml"), "--input_file", str(tmp_path / "lines.jsonl")),
        *("--hp", f"output_dir={tmp_path / 'out'},num_steps=1,seq_len=13", "--quiet"),
    )
    assert done.exit_code == 1
    first, second, third = error_lines(done)
    assert "line 2: its preview x.partial.mp4 is already used by line 1" in first
    assert "line 4: its output 003_four.mp4 is already used by line 3" in second
    assert third.startswith("error: 2 of 4 lines")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"x.partial.mp4", "x.partial.json", "003_four.mp4", "003_four.json"}
