"""`calibrate --mode sparse` with several speakers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from command_line import PORTRAIT, SPEECH, error_lines
from command_line import run as command
from engine import overrides, portrait, request
from omniavatar.config.load import load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.engine.events import Message, WindowStarted
from omniavatar.errors import InputError
from omniavatar.measure.sparse_calibration import calibrate_sparse
from omniavatar.plan.sparse_progress import MeasuredWindows, SparseProgress, progress_path
from omniavatar.plan.sparsity import read_levels
from omniavatar.sampling.sparsity import mass_levels
from omniavatar.types import AvatarRequest, SamplingParams

SETTINGS = {
    "num_steps": 2,
    "sparse_attention": "calibrated",
    "sparse_block_size": 8,
    "audio_scale": 3.0,
    "seq_len": 20,
}
"""Guided with a scale of its own for the sound, so that a silent speaker has fewer passes."""


class Killed(Exception):
    pass


def config_of(checkpoint: Path, cache: Path, **changes: Any) -> PipelineConfig:
    return load_config(None, overrides(checkpoint, cache, **{**SETTINGS, **changes})).config


def speakers() -> list[AvatarRequest]:
    """One who speaks for a window, and a silent one of two windows."""
    sampling = SamplingParams(seed=7)
    return [request(0.1), request(None, image=portrait(1), prompt="another person", sampling=sampling)]


def sums_of(config: PipelineConfig, asked: AvatarRequest, windows: int, output: Path) -> np.ndarray:
    """The sums of a calibration of one speaker, which is killed when it begins to verify."""
    begun: list[int] = []

    def kill(event: Any) -> None:
        if isinstance(event, WindowStarted):
            begun.append(event.window)
            if len(begun) > windows:
                raise Killed

    with pytest.raises(Killed):
        calibrate_sparse(config, asked, output, verify=True, listeners=[kill])
    return load_file(progress_path(output))["sums"]


def test_speakers_count_equally_and_a_killed_measurement_goes_on(nano_checkpoint, cache, tmp_path):
    """The masses are the mean of the speakers' own means, whatever windows and passes each has."""
    config, output = config_of(nano_checkpoint, cache), tmp_path / "masses.safetensors"
    seen: list[str] = []

    def kill(event: Any) -> None:
        if isinstance(event, Message):
            seen.append(event.text)
        if isinstance(event, WindowStarted) and event.window == 1:
            raise Killed

    with pytest.raises(Killed):
        calibrate_sparse(config, speakers(), output, listeners=[kill])
    assert [text for text in seen if text.startswith("speaker ")] == [
        "speaker 1 of 2: 1 window",
        "speaker 2 of 2: 2 windows",
    ]
    part = progress_path(output)
    assert part.exists() and not output.exists()
    windows: list[int] = []
    told: list[str] = []

    def listen(event: Any) -> None:
        if isinstance(event, WindowStarted):
            windows.append(event.window)
        if isinstance(event, Message):
            told.append(event.text)

    resumed = calibrate_sparse(config, speakers(), output, listeners=[listen])
    assert windows == [1] and not part.exists()
    assert f"continuing after window 1 of 2 of speaker 2 of 2, from {part}" in told
    header, levels = read_levels(resumed.output)
    assert header.measured["windows"] == 3 and header.measured["speakers"] == 2
    assert header.measured["seed"] == [config.sampling.seed, 7]
    means = []
    for number, (asked, count) in enumerate(zip(speakers(), (1, 2), strict=True)):
        sums = sums_of(config, asked, count, tmp_path / f"{number}.safetensors")
        passes = np.float32(round(float(sums[0, 0, 0, 0].sum())))  # the masses of a row sum to 1 a pass
        assert passes == (3, 4)[number]
        means.append(sums / passes)
    assert np.array_equal(levels[0, 0], mass_levels(sum(means)[0, 0]))
    assert np.array_equal(levels[0, 1], mass_levels(sum(means)[0, 1]))
    alone = [mass_levels(mean[0, 0]) for mean in means]
    assert not any(np.array_equal(levels[0, 0], each) for each in alone)


@pytest.mark.parametrize(
    ("changes", "other", "line"),
    [
        (
            {"image_sizes_720": [[64, 64], [64, 96]], "max_tokens": 100},
            request(0.3, image=np.zeros((64, 96, 3), np.uint8)),
            r"speaker 2 of 2: has windows of \d+ x 4 x 6 latent frames x rows x columns of tokens, the first",
        ),
        (
            {},
            request(0.3, sampling=SamplingParams(guidance_scale=3.0)),
            r"speaker 2 of 2: guidance_scale is 3.0, the first speaker's is 2.0; only the seed may differ",
        ),
    ],
)
def test_speakers_share_one_shape_and_one_schedule(nano_checkpoint, cache, tmp_path, changes, other, line):
    config = config_of(nano_checkpoint, cache, **changes)
    with pytest.raises(InputError, match=line):
        calibrate_sparse(config, [request(0.3), other], tmp_path / "masses.safetensors")
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.txt", f"A man@@{PORTRAIT}\n\nA man@@none.png@@{SPEECH}\n", "a.txt:3: image not found: none.png"),
        ("a.txt", f"A man@@{PORTRAIT}@@{SPEECH}@@4\n", "a.txt:1: 4 parts; a line is prompt@@image@@audio"),
        ("a.txt", "# nobody\n", "a.txt: has no request; write lines of prompt@@image@@audio"),
        (
            "a.jsonl",
            json.dumps({"prompt": "A man", "image": PORTRAIT, "seed": 1, "num_steps": 3}),
            "a.jsonl:1: num_steps cannot differ among speakers; take it out of the line and set it in the",
        ),
    ],
)
def test_a_line_that_cannot_be_used_ends_the_calibration(tmp_path, name, text, line):
    (tmp_path / name).write_text(text)
    output = tmp_path / "masses.safetensors"
    hp = "weights=random,scale=nano,device=cpu,dtype=fp32,sparse_attention=calibrated,sparse_block_size=8"
    found = command(
        *("calibrate", "--config", "configs/nano.yaml", "--hp", hp, "--mode", "sparse", "-o", str(output)),
        *("--input_file", str(tmp_path / name)),
    )
    assert found.exit_code == InputError.exit_code, found.output
    (error,) = error_lines(found)
    assert line in error and not output.exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--mode", "sparse", "--prompt", "A man", "--image", PORTRAIT], "give either --input_file, or"),
        ([], "--input_file belongs to --mode sparse"),
    ],
)
def test_an_input_file_is_for_sparse_attention_and_alone(words, line):
    found = command("calibrate", "--config", "configs/nano.yaml", "--input-file", "a.txt", *words)
    assert found.exit_code == 2 and line in found.stderr


def test_masses_of_earlier_speakers_are_kept(tmp_path):
    progress = SparseProgress(tmp_path / "masses.safetensors", {"seed": "1"})
    sums = np.ones((1, 2, 2, 3, 3), np.float32)
    progress.write(MeasuredWindows(2, sums, None, 1, sums / 3))
    found = progress.read()
    assert isinstance(found, MeasuredWindows) and (found.windows, found.speaker) == (2, 1)
    assert found.given is None and np.array_equal(found.earlier, sums / 3)
    progress.write(MeasuredWindows(2, sums, None, 1))
    assert progress.read() == "the file is damaged"
