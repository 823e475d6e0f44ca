"""Whole runs with sparse attention: what they compute, resume, refuse and print."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from command_line import run as command
from engine import make_pipeline, overrides, request
from omniavatar import AvatarPipeline
from omniavatar.config.change import changed
from omniavatar.config.load import load_config
from omniavatar.engine.events import Message, WindowFinished, WindowStarted
from omniavatar.engine.identity import request_identity
from omniavatar.engine.leftovers import find_leftovers
from omniavatar.engine.prepare import Prepared, read_inputs
from omniavatar.engine.recorder import RunRecorder
from omniavatar.errors import ConfigError, ResumeError
from omniavatar.measure.sparse_calibration import SparseCalibrationRun, calibrate_sparse
from omniavatar.plan.sparse_progress import MeasuredWindows, SparseProgress, progress_path
from omniavatar.plan.sparsity import find_sparsity, read_levels
from omniavatar.types import StepPlan

WINDOW = {"num_steps": 3, "sparse_attention": "window", "sparse_block_size": 8, "sparse_density": 0.5}
CALIBRATED = {"num_steps": 3, "sparse_attention": "calibrated", "sparse_block_size": 8}


@pytest.fixture(scope="module")
def measured(nano_checkpoint, cache, tmp_path_factory) -> SparseCalibrationRun:
    """The calibration of the nano checkpoint, with verification."""
    config = load_config(None, overrides(nano_checkpoint, cache, **CALIBRATED)).config
    output = tmp_path_factory.mktemp("masses") / "masses.safetensors"
    return calibrate_sparse(config, request(0.3), output, windows=1, groups=2, verify=True)


@pytest.fixture(scope="module")
def two_windows(nano_checkpoint, cache, tmp_path_factory) -> np.ndarray:
    """The levels of a measurement of two windows."""
    config = load_config(None, overrides(nano_checkpoint, cache, **CALIBRATED)).config
    output = tmp_path_factory.mktemp("masses") / "masses.safetensors"
    return read_levels(calibrate_sparse(config, request(1.0), output).output)[1]


@pytest.fixture(scope="module")
def pipeline(nano_checkpoint, cache) -> AvatarPipeline:
    return make_pipeline(nano_checkpoint, cache, **WINDOW)


@pytest.fixture(scope="module")
def ready(pipeline) -> Iterator[Prepared]:
    with pipeline.prepare(request(0.3)) as prepared:
        yield prepared


def latent(pipeline: AvatarPipeline, ready: Prepared, density: float | None) -> torch.Tensor:
    """The first window by a window plan; densely without a density."""
    plan = None
    if density is not None:
        config = changed(pipeline.config, sparsity={"sparse_density": density})
        plan = find_sparsity(config, ready.plan, pipeline.models.dit_config)
    sampling = replace(ready.window_sampling, sparsity=plan)
    generator = pipeline.window_generator(sampling, ready.conditioning)
    return generator.denoise(ready.plan.windows[0], ready.conditioning.reference_latent)


def differs(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_what_is_kept_decides_how_far_a_window_is_from_dense(pipeline, ready):
    dense, whole, half, less = (latent(pipeline, ready, density) for density in (None, 1.0, 0.5, 0.2))
    assert 0 < differs(whole, dense) < 1e-5
    assert 1e-4 < differs(half, dense) < differs(less, dense)
    assert torch.equal(latent(pipeline, ready, 0.5), half)


def test_a_step_cache_carries_residuals_in_one_order_of_tokens(pipeline, ready):
    """A dense step, whose residual a sparse step uses, is in tile order too."""
    skipping = ready.decided(StepPlan((True, False, True)))
    assert differs(latent(pipeline, skipping, 1.0), latent(pipeline, skipping, None)) < 1e-4


def test_streamed_blocks_give_the_same_bits(pipeline, ready, nano_checkpoint, cache):
    streamed = make_pipeline(nano_checkpoint, cache, **WINDOW, num_persistent_param_in_dit=3_000_000)
    with streamed.prepare(request(0.3)) as other:
        assert streamed.models.residency.placement.memory.streams
        assert torch.equal(latent(streamed, other, 0.5), latent(pipeline, ready, 0.5))


def test_measuring_is_repeatable_and_verifies(measured, nano_checkpoint, cache, tmp_path):
    header, levels = read_levels(measured.output)
    assert header == measured.header and header.dense_steps == 1 and levels.shape[0] == 2
    assert [row.wanted for row in measured.plans] == [0.75, 0.5, 0.35, 0.25]
    assert all(row.density <= row.wanted for row in measured.plans)
    masses = [row.mass for row in measured.plans]
    assert masses == sorted(masses, reverse=True)
    config = load_config(None, overrides(nano_checkpoint, cache, **CALIBRATED)).config
    again = calibrate_sparse(config, request(0.3), tmp_path / "again.safetensors", windows=1, groups=2)
    assert np.array_equal(read_levels(again.output)[1], levels) and again.verified == ()
    names = [row.attention for row in measured.verified]
    assert names == ["calibrated", "window"] * 4
    errors = [row.error for row in measured.verified if row.attention == "calibrated"]
    assert 0 < errors[0] < errors[-1] < 1 and all(row.psnr_db for row in measured.verified)


@pytest.mark.parametrize(("killed_in", "seed", "kept"), [(1, 42, True), (1, 7, False), (None, 42, True)])
def test_a_killed_measurement_goes_on(two_windows, nano_checkpoint, cache, tmp_path, killed_in, seed, kept):
    """It ends with the bytes of an uninterrupted one. killed_in: a window; None: in the verification."""
    config = load_config(None, overrides(nano_checkpoint, cache, **CALIBRATED)).config
    asked, output = request(1.0), tmp_path / "masses.safetensors"

    class Killed(Exception):
        pass

    begun: list[int] = []

    def kill(event: Any) -> None:
        if isinstance(event, WindowStarted):
            begun.append(event.window)
            if event.window == killed_in or (killed_in is None and len(begun) == 3):
                raise Killed

    with pytest.raises(Killed):
        calibrate_sparse(config, asked, output, verify=killed_in is None, listeners=[kill])
    assert output.exists() == (killed_in is None)
    part = progress_path(output)
    (found,) = find_leftovers(tmp_path, 0)
    assert found.kind == "unfinished calibration" and found.paths == (part,)
    told: list[str] = []
    windows: list[int] = []

    def listen(event: Any) -> None:
        if isinstance(event, Message):
            told.append(event.text)
        if isinstance(event, WindowStarted):
            windows.append(event.window)

    other = changed(config, sampling={"seed": seed})
    again = calibrate_sparse(other, asked, output, listeners=[listen])
    told = [text for text in told if str(part) in text]
    if kept:
        assert windows == ([1] if killed_in == 1 else []) and "continuing after window" in told[0]
        assert np.array_equal(read_levels(again.output)[1], two_windows)
    else:
        assert windows == [0, 1] and "they belong to another measurement" in told[0]
    assert not part.exists()


def test_unfinished_windows_are_read_strictly(tmp_path):
    progress = SparseProgress(tmp_path / "masses.safetensors", {"seed": "1"})
    assert progress.read() is None
    sums = np.ones((1, 2, 2, 3, 3), np.float32)
    progress.write(MeasuredWindows(1, sums, np.zeros((1, 16, 1, 2, 2), np.float32)))
    found = progress.read()
    assert isinstance(found, MeasuredWindows) and np.array_equal(found.sums, sums) and found.windows == 1
    assert SparseProgress(tmp_path / "masses.safetensors", {"seed": "2"}).read() == (
        "they belong to another measurement"
    )
    data = progress.path.read_bytes()
    for broken in (data[:-20], data[:-1] + b"\x01", b"", b"text"):
        progress.path.write_bytes(broken)
        assert progress.read() == "the file is damaged"
    progress.remove()
    assert progress.read() is None


def test_a_resumed_run_needs_the_same_plan(measured, nano_checkpoint, cache, tmp_path):
    """What decides the blocks is part of a job's identity; the place of the file is not."""
    settings = {**CALIBRATED, "sparse_file": str(measured.output), "sparse_density": 0.5}
    output = tmp_path / "out.mp4"

    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if isinstance(event, WindowFinished):
            raise Stop

    broken = make_pipeline(nano_checkpoint, cache, RunRecorder([stop]), **settings)
    with pytest.raises(Stop):
        broken.generate(request(), output)
    for change, name in (
        ({"sparse_density": 0.3}, "sparse"),
        ({"sparse_dense_steps": 2}, "sparse"),
    ):
        with pytest.raises(ResumeError, match=name):
            make_pipeline(nano_checkpoint, cache, **{**settings, **change}).generate(request(), output)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(measured.output.read_bytes())
    messages: list[str] = []
    recorder = RunRecorder([lambda event: messages.append(getattr(event, "text", ""))])
    pipeline = make_pipeline(nano_checkpoint, cache, recorder, **{**settings, "sparse_file": str(moved)})
    result = pipeline.generate(request(), output)
    assert result.resumed_windows == 1
    sparsity = json.loads(result.sidecar.read_text())["plan"]["sparsity"]
    assert sparsity["attention"] == "calibrated" and 0 < sparsity["kept_share"] <= 0.5
    assert any("sparse attention calibrated: 2 of 3 steps compute" in text for text in messages)


def test_the_identity_of_dense_runs_is_what_it_was(nano_checkpoint, cache):
    pipeline = make_pipeline(nano_checkpoint, cache)
    inputs = read_inputs(pipeline.models, request())
    pipeline.adopt(inputs.shape)
    placement = pipeline.models.residency.placement
    identity = request_identity(pipeline.config, inputs, "x264", placement, pipeline.models)
    assert not [name for name in identity if "spars" in name]


def test_the_commands_know_the_file(measured, nano_checkpoint, cache, tmp_path):
    config = tmp_path / "config.yaml"
    values = {**overrides(nano_checkpoint, cache, **CALIBRATED), "sparse_file": str(measured.output)}
    config.write_text(json.dumps(values))
    result = command("plan", "--config", str(config), "--minutes", "0.05")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "attention calibrated: 4" in text and "of the matrix at 2 of 3 steps, at least " in text
    assert "1 dense, blocks of 8 tokens" in text
    report = json.loads(command("plan", "--config", str(config), "--minutes", "0.05", "--json").stdout)
    assert report["sparsity"]["attention"] == "calibrated"
    result = command("calibrate", "--config", str(config), "--mode", "sparse", "--step-groups", "3")
    assert result.exit_code == 2 and "--step-groups 3: 2 of 3 steps are not dense" in result.stderr
    result = command("calibrate", "--config", str(config), "--step-groups", "2")
    assert result.exit_code == 2 and "--step-groups belongs to --mode sparse" in result.stderr
    other = tmp_path / "notes.safetensors"
    other.write_text("notes")
    result = command("calibrate", "--config", str(config), "--mode", "sparse", "-o", str(other))
    assert (
        "notes.safetensors: is not a file of block masses" in result.stderr and other.read_text() == "notes"
    )


def test_a_warm_pipeline_has_run_its_sparse_steps(nano_checkpoint, cache):
    seen: list[str] = []
    recorder = RunRecorder([lambda event: seen.append(event.kind)])
    pipeline = make_pipeline(nano_checkpoint, cache, recorder, **WINDOW)
    pipeline.warm_up()
    assert seen.count("step") == 2
    assert pipeline.models.sparse_steps(None) is None
    assert not [event for event in seen if event == Message.kind and "error" in event]


def test_block_causal_models_are_not_measured(tmp_path):
    values = {"weights": "random", "scale": "nano", "sampler": "causal", "guidance_scale": 1}
    with pytest.raises(ConfigError, match="sampler: causal attends to a cache of earlier blocks"):
        calibrate_sparse(load_config(None, values).config, request(0.3), tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
