"""Measured step-cache constants: the file, who may use it, what a run does with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from command_line import NANO, run
from engine import adopt_placement, make_pipeline, overrides, request
from omniavatar.accel import residual_meter
from omniavatar.accel.residual_meter import ResidualMeter
from omniavatar.config.change import changed
from omniavatar.config.load import load_config
from omniavatar.engine.events import Message, WindowFinished
from omniavatar.engine.recorder import RunRecorder
from omniavatar.errors import CheckpointError, ConfigError, OutputError, ResumeError
from omniavatar.measure.calibrate import CalibrationRun, calibrate
from omniavatar.plan.calibration import NAME, Calibration, find_constants, read_calibration
from omniavatar.plan.steps import sampling_schedule
from omniavatar.sampling.cache_constants import CacheConstants, published_constants
from omniavatar.sampling.step_cache import compute_all, relative_changes

STEPS = 6
MAGCACHE = {"step_cache": "magcache", "magcache_retention": 0.0, "magcache_thresh": 0.5}

# The file


@pytest.fixture(scope="module")
def folder(nano_checkpoint, tmp_path_factory) -> Path:
    """A nano checkpoint of its own, whose adapter folder may be written into."""
    made = tmp_path_factory.mktemp("calibrate") / "nano"
    shutil.copytree(nano_checkpoint, made)
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("text-cache")


@pytest.fixture(scope="module")
def done(folder, cache) -> CalibrationRun:
    config = load_config(None, overrides(folder, cache, num_steps=STEPS)).config
    return calibrate(config, request(), verify=True)


def constants(folder: Path, cache: Path, **changes: Any) -> CacheConstants | None:
    config = load_config(None, overrides(folder, cache, **{"num_steps": STEPS, **MAGCACHE, **changes})).config
    pipeline = make_pipeline(folder, cache)
    model = changed(config, model={"scale": "1.3B"}).model
    return find_constants(model, config.sampling, pipeline.models.dit_config)


def test_the_file_lies_beside_the_checkpoint_and_reads_back(done, folder):
    assert done.output == folder / "OmniAvatar-nano" / NAME and done.output.stat().st_size < 20_000
    read = read_calibration(done.output)
    assert read == done.calibration
    assert read.schedule.steps == STEPS and set(read.branches) == {"positive+speech", "negative+silence"}
    assert read.measured["windows"] == 2
    for branch in read.branches.values():
        assert branch.magnitude_ratios[0] == 1 and branch.changes[0] == 0
        assert all(ratio > 0 for ratio in branch.magnitude_ratios) and min(branch.changes[1:]) > 0
    made = adopt_placement(make_pipeline(folder, folder / "cache", num_steps=STEPS), request())
    timesteps = sampling_schedule(made.config.sampling).timesteps
    wanted = relative_changes(made.models.time_projections(timesteps))
    assert read.time_changes == pytest.approx(wanted.tolist())


def test_measuring_changes_nothing(folder, cache):
    pipeline = make_pipeline(folder, cache, num_steps=3)
    with pipeline.prepare(request(0.3)) as ready:
        meter = ResidualMeter()
        arguments = (ready.decided(compute_all(3)).window_sampling, ready.conditioning)
        window = ready.plan.windows[0]
        (plain,) = pipeline.window_generator(*arguments).run([window])
        (measured,) = pipeline.window_generator(*arguments, meter.window).run([window])
        meter.keep()
    assert torch.equal(plain.latent, measured.latent)
    assert len(meter.changes()["positive+speech"].changes) == 3


def test_trials_and_verification(done):
    assert [t.policy for t in done.trials] == ["teacache"] * 5 + ["magcache"] * 3
    for trial in done.trials:
        assert trial.computed == trial.pattern.count("C") and len(trial.pattern) == STEPS
        assert (trial.error == 0) == (trial.computed == STEPS)
    by_threshold = [t.computed for t in done.trials if t.policy == "teacache"]
    assert by_threshold == sorted(by_threshold, reverse=True)
    (measured,) = done.verified  # nothing is published for nano
    assert measured.constants == "measured" and measured.policy == "magcache"
    assert measured.computed < STEPS and 0 < measured.error < 0.5 and 10 < measured.psnr_db < 80
    assert measured.seconds > 0 and measured.full_seconds > 0


def test_a_plan_that_computes_every_step_is_verified_as_equal(folder, cache):
    settings = overrides(folder, cache, num_steps=3, step_cache="magcache", magcache_retention=1.0)
    config = load_config(None, settings).config
    run = calibrate(config, request(0.3), folder / "other.json", windows=1, verify=True)
    (measured,) = run.verified
    assert measured.computed == 3 and measured.error == 0 and measured.psnr_db is None


def test_streamed_blocks_and_a_failed_allocation_give_the_same_constants(done, folder, cache, monkeypatch):
    settings = overrides(folder, cache, num_steps=STEPS, num_persistent_param_in_dit=3_000_000)
    real = residual_meter.compare_residuals
    calls: list[int] = []

    def fails_once(new, old):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(new, old)

    monkeypatch.setattr(residual_meter, "compare_residuals", fails_once)
    run = calibrate(load_config(None, settings).config, request(), folder / "streamed.json")
    assert len(calls) == 5 + 2 * 2 * (STEPS - 1), "the first window was started again"
    assert run.calibration.branches == done.calibration.branches
    assert run.calibration.teacache == done.calibration.teacache


def test_published_constants_are_verified_beside_the_measured(folder, cache):
    settings = overrides(folder, cache, num_steps=4, scale="1.3B", tea_cache_l1_thresh=0.14)
    run = calibrate(
        load_config(None, settings).config, request(0.3), folder / "o.json", windows=1, verify=True
    )
    assert [each.constants for each in run.verified] == ["measured", "published"]
    assert {each.policy for each in run.verified} == {"teacache"} and run.verified[0].threshold == 0.14


def test_auto_finds_the_file_and_none_does_not(done, folder, cache):
    found = constants(folder, cache)
    assert found.digest == done.calibration.constants("").digest
    assert str(done.output) in found.source and f"at {STEPS} steps" in found.source
    assert constants(folder, cache, step_cache_file="none") == published_constants("1.3B")
    assert constants(folder, cache, step_cache_file=str(done.output)).digest == found.digest
    assert constants(folder, cache, step_cache="none") is None
    assert constants(folder, cache, num_steps=20).digest == found.digest
    own = {"step_cache": "teacache", "tea_cache_l1_thresh": 0.1, "teacache_coefficients": [1.0, 0.0]}
    assert constants(folder, cache, **own, shift=3.0) is None, "own coefficients need no file"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift": 3.0}, "measured with shift 5.0, the run has 3.0"),
        ({"sampler": "renoise"}, 'sampler "euler", the run has "renoise"'),
        ({"timesteps": [1000, 500]}, "timesteps null, the run has \\[1000.0, 500.0\\]"),
        ({"step_cache_file": "nowhere.json"}, "nowhere.json does not exist; make it with `omniavatar cal"),
    ],
)
def test_another_schedule_is_refused(done, folder, cache, changes, message):
    with pytest.raises(ConfigError, match=message):
        constants(folder, cache, **changes)


def test_another_model_is_refused(done, folder, cache, tmp_path):
    lora = tmp_path / "style.safetensors"
    key = "blocks.0.self_attn.q"
    save_file(
        {f"{key}.lora_down.weight": torch.zeros(4, 256), f"{key}.lora_up.weight": torch.zeros(256, 4)}, lora
    )
    with pytest.raises(CheckpointError, match=r"LoRA style.safetensors at 0.5: absent then, \w{12} now"):
        constants(folder, cache, loras=[{"path": str(lora), "strength": 0.5}])
    with pytest.raises(CheckpointError, match=r"adapter pytorch_model.pt: .* absent now"):
        constants(folder, cache, exp_path=None, step_cache_file=str(done.output))
    moved = tmp_path / "step_cache.json"
    content = json.loads(done.output.read_text())
    content["model"]["sizes"]["dim"] = 5120
    moved.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="dim: 5120 then, 256 now"):
        constants(folder, cache, step_cache_file=str(moved))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:200], "damaged"),
        (lambda text: "", "damaged"),
        (lambda text: "[1, 2]", "damaged"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format"),
        (lambda text: text.replace('"time_changes"', '"time"'), "time_changes"),
        (lambda text: text.replace("1.0,", "NaN,", 1), "damaged"),
        (lambda text: text.replace("1.0,", '"1.0",', 1), "magnitude_ratios"),
        (lambda text: text.replace("1.0,", "1.0, 1.0,", 1), "one a step"),
        (lambda text: text.replace("1.0,", "-1.0,", 1), "magnitude_ratios"),
    ],
)
def test_a_damaged_file_is_one_clear_line(done, tmp_path, spoil, message):
    text = done.output.read_text()
    path = tmp_path / NAME
    path.write_text(spoil(text))
    assert path.read_text() != text
    with pytest.raises(CheckpointError, match=message) as caught:
        read_calibration(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_one_clear_line(tmp_path):
    (tmp_path / NAME).write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(CheckpointError, match="not UTF-8 text"):
        read_calibration(tmp_path / NAME)


steps_of = st.integers(2, 6)
numbers = st.floats(0.001, 10, allow_nan=False)


@given(steps_of, st.data())
def test_any_calibration_survives_the_file(steps, data):
    def numbers_of() -> tuple[float, ...]:
        return tuple(data.draw(st.lists(numbers, min_size=steps, max_size=steps)))

    branch = {
        name: numbers_of() for name in ("magnitude_ratios", "ratio_spread", "cosine_distances", "changes")
    }
    made = Calibration.model_validate(
        {
            "model": {"sizes": {"dim": 1}, "weights": {"a": "b"}},
            "schedule": {"steps": steps, "shift": 5.0, "timesteps": None, "sampler": "euler"},
            "measured": {"date": "today"},
            "time_changes": numbers_of(),
            "branches": {"positive+speech": branch},
            "magnitude_ratios": numbers_of(),
            "teacache": {"polynomial": numbers_of(), "fitted": (0.1, 0.2), "rms_error": 0.0},
        }
    )
    read = Calibration.model_validate_json(made.model_dump_json())
    assert read == made and read.constants("").digest == made.constants("").digest


# What a run does with it


def sidecar(pipeline, output: Path, **changes: Any) -> dict[str, Any]:
    return json.loads(pipeline.generate(request(0.3), output, **changes).sidecar.read_text())


def test_a_run_says_which_constants_it_used(done, folder, cache, tmp_path):
    texts: list[str] = []
    recorder = RunRecorder([lambda event: isinstance(event, Message) and texts.append(event.text)])
    measured = make_pipeline(folder, cache, recorder, num_steps=STEPS, scale="1.3B", **MAGCACHE)
    plan = sidecar(measured, tmp_path / "a.mp4")["plan"]
    assert plan["step_plan"]["source"].startswith(f"measured on this model at {STEPS} steps")
    line = next(text for text in texts if text.startswith("step cache magcache"))
    assert f"{plan['step_plan']['compute'].count(True)} of {STEPS} steps computed; constants measured" in line
    published = make_pipeline(
        folder, cache, num_steps=STEPS, scale="1.3B", step_cache_file="none", **MAGCACHE
    )
    note = sidecar(published, tmp_path / "b.mp4")["plan"]["notes"][0]
    assert "published for plain Wan 2.1 1.3B" in note and "ratios of 50 steps stretched to 6" in note
    other = make_pipeline(folder, cache, num_steps=4, **MAGCACHE)
    assert "stretched to 4" in sidecar(other, tmp_path / "c.mp4")["plan"]["notes"][0]


def test_a_resumed_run_cannot_mix_constants(done, folder, cache, tmp_path):
    settings = {"num_steps": STEPS, "scale": "1.3B", **MAGCACHE}
    output = tmp_path / "out.mp4"

    def stop(event: Any) -> None:
        if isinstance(event, WindowFinished):
            raise KeyboardInterrupt

    published = make_pipeline(folder, cache, RunRecorder([stop]), step_cache_file="none", **settings)
    with pytest.raises(KeyboardInterrupt):
        published.generate(request(), output)
    with pytest.raises(ResumeError, match=r"step cache constants: .* -> "):
        make_pipeline(folder, cache, **settings).generate(request(), output)
    copy = tmp_path / "same_numbers.json"
    shutil.copy(done.output, copy)
    first = make_pipeline(folder, cache, **settings)
    before = sidecar(first, tmp_path / "x.mp4")["fingerprint"]
    after = sidecar(make_pipeline(folder, cache, step_cache_file=str(copy), **settings), tmp_path / "y.mp4")[
        "fingerprint"
    ]
    assert before == after, "the numbers count, not the path"


def test_a_new_file_leaves_runs_without_a_step_cache_alone(done, folder, cache, tmp_path):
    pipeline = make_pipeline(folder, cache)
    before = sidecar(pipeline, tmp_path / "a.mp4")["fingerprint"]
    os.utime(done.output, (1, 1))
    assert sidecar(pipeline, tmp_path / "b.mp4")["fingerprint"] == before
    assert before["step cache constants"] == '"none"'


# The command


def hp(folder: Path, cache: Path, **changes: Any) -> str:
    values = overrides(folder, cache, **changes)
    return ",".join(f"{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in values.items())


def test_command_prints_tables_and_plan_uses_the_file(folder, cache, tmp_path):
    output = tmp_path / "mine.json"
    settings = hp(folder, cache, num_steps=4, step_cache="magcache", magcache_retention=0.0)
    result = run("calibrate", "-c", NANO, "--hp", settings, "-o", str(output), "--windows", "1", "--verify")
    assert result.exit_code == 0, result.stderr
    for text in (
        "1 window of 4 steps",
        "positive+speech",
        "polynomial of degree 1",
        "measured on the first window",
    ):
        assert text in result.stdout
    assert str(output) in result.stdout and output.is_file()
    settings += f",step_cache_file={output}"
    shown = run("plan", "-c", NANO, "--hp", settings)
    assert shown.exit_code == 0, shown.stderr
    assert f"step cache by constants measured on this model at 4 steps ({output})" in shown.stdout
    silent = run(
        "calibrate", "-c", NANO, "--hp", settings, "-o", str(output), "--json",
        "--prompt", "a person", "--image", str(Path(NANO).parents[1] / "examples" / "portrait.png"),
        "--hp", "seq_len=10",
    )  # fmt: skip
    report = json.loads(silent.stdout)
    assert set(report["calibration"]["branches"]) == {"positive+silence", "negative+silence"}
    assert len(report["trials"]) == 8 and report["verified"] == []


def test_command_refuses_before_anything_heavy(folder, cache, tmp_path):
    random = run("calibrate", "-c", NANO, "--hp", "weights=random,scale=nano")
    assert random.exit_code == ConfigError.exit_code and "--output" in random.stderr
    one = run("calibrate", "-c", NANO, "--hp", hp(folder, cache, num_steps=1))
    assert one.exit_code == ConfigError.exit_code and "num_steps" in one.stderr
    (tmp_path / "file").write_text("")
    blocked = run("calibrate", "-c", NANO, "--hp", hp(folder, cache), "-o", str(tmp_path / "file" / "x"))
    assert blocked.exit_code == OutputError.exit_code and "another file with --output" in blocked.stderr
    gone = run("calibrate", "-c", NANO, "--hp", hp(folder, cache, exp_path=str(tmp_path / "none")))
    assert gone.exit_code == ConfigError.exit_code and "does not exist" in gone.stderr
    assert not (tmp_path / "none").exists()
    assert run("calibrate", "-c", NANO, "--prompt", "a person").exit_code == 2
    assert run("calibrate", "-c", NANO, "--audio", "a.wav").exit_code == 2


def test_random_weights_with_a_named_file(tmp_path):
    settings = "weights=random,scale=nano,device=cpu,image_sizes_720=[[64,64]],max_tokens=56,num_steps=3"
    output = tmp_path / "random.json"
    made = run("calibrate", "-c", NANO, "--hp", settings, "-o", str(output), "--windows", "1", "--json")
    assert made.exit_code == 0, made.stderr
    assert read_calibration(output).model.weights == {"random weights": "nano"}
