"""Videos of `sampler: causal` by the ordinary pipeline: windows, resume, stop, settings that it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine
from engine import CAUSAL, interrupt_in, make_pipeline, overrides, portrait, request, voice
from omniavatar import AvatarPipeline, SamplingParams
from omniavatar.checkpoint.synthetic import make_checkpoint
from omniavatar.config.load import load_config
from omniavatar.engine.recorder import RunRecorder
from omniavatar.errors import ConfigError, InputError, NumbersError, ResumeError, StoppedError
from omniavatar.media.inspect import read_frames

TESTS = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from engine import causal_pipeline, request
pipe = causal_pipeline(Path(sys.argv[2]), Path(sys.argv[3]), image_sizes_720=[[32, 32]])
pipe.generate(request(float(sys.argv[5])), sys.argv[4])
"""
SECONDS = 12.0
"""27 blocks: more than cache and decoder reach back, so that a resumed run leaves some out."""


def causal_pipeline(checkpoint: Path, cache: Path, **changes: Any) -> AvatarPipeline:
    """The block-causal test engine at 32x32."""
    return engine.causal_pipeline(checkpoint, cache, **{"image_sizes_720": [[32, 32]], **changes})


@pytest.fixture(scope="module")
def pipeline(nano_checkpoint, cache):
    return causal_pipeline(nano_checkpoint, cache)


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """The uninterrupted video."""
    output = tmp_path_factory.mktemp("whole") / "out.mp4"
    pipeline.generate(request(SECONDS), output)
    return output


def like(pipeline, listener: Any) -> AvatarPipeline:
    return AvatarPipeline.from_config(pipeline.config, recorder=RunRecorder([listener]))


@pytest.fixture(scope="module")
def interrupted(pipeline, tmp_path_factory):
    """A folder with a job of which 24 blocks are done."""
    folder = tmp_path_factory.mktemp("interrupted")
    interrupt_in(24, pipeline, request(SECONDS), folder / "out.mp4")
    return folder


def test_a_video_is_its_blocks_and_the_sidecar_says_so(pipeline, whole):
    record = json.loads(whole.with_suffix(".json").read_text())
    plan = record["plan"]
    assert record["frames"] == len(list(read_frames(whole))) == 1 + round(12.3 * 16 + 0.49)
    assert plan["causal"] == {"block": 2, "window": 6, "sink": 2}
    assert (plan["window_length"], plan["overlap"], plan["latent_frames"]) == (8, 0, 2)
    assert record["windows"] == 1 + -(-(record["frames"] - 5) // 8)
    assert plan["forwards"] == record["windows"] * (2 + 1)
    assert record["config"]["sampling.sampler"] == "causal"
    assert record["fingerprint"]["sampling.causal_window"] == "6"
    assert "video.overlap_frame" not in record["fingerprint"]


def test_stream_and_a_live_video_give_the_same_frames(pipeline):
    """The seam of live sessions, fed with the offline features, makes the offline video."""
    asked = request(2.0)
    chunks = list(pipeline.stream(asked))
    assert [len(chunk.frames) for chunk in chunks] == [5, 8, 8, 8, 8, 1]
    assert [chunk.start for chunk in chunks] == [0, 5, 13, 21, 29, 37]
    with pipeline.prepare(asked) as ready:
        rows = np.concatenate([np.zeros_like(ready.conditioning.audio[:1]), ready.conditioning.audio])
    made = pipeline.begin_video(portrait(), "a person speaks")
    assert (made.fps, made.size, made.seed) == (16, (32, 32), pipeline.config.sampling.seed)
    for chunk in chunks:
        count = made.frames_of(made.done)
        piece = torch.from_numpy(rows[chunk.start : chunk.start + count].copy())[None]
        frames = np.concatenate(made.frames(made.make(piece)))
        made.arrived()()
        assert np.array_equal(frames[: len(chunk.frames)], chunk.frames)
    made.close()


def test_a_live_video_changes_its_prompt_at_the_next_block(pipeline):
    first, second = (pipeline.begin_video(portrait(), "a person speaks") for _ in range(2))
    rows = [torch.zeros(1, first.frames_of(block), first.audio_width) for block in range(3)]
    assert torch.equal(first.make(rows[0]), second.make(rows[0]))
    second.set_prompt("a person laughs")
    assert not torch.equal(first.make(rows[1]), second.make(rows[1]))


def test_other_samplers_have_no_live_video(nano_checkpoint, cache):
    with pytest.raises(ConfigError, match=r"sampler: euler makes windows .* needs sampler: causal"):
        make_pipeline(nano_checkpoint, cache).begin_video(portrait(), "a person speaks")


def test_killed_run_is_resumed_and_gives_the_same_bytes(pipeline, nano_checkpoint, cache, whole, tmp_path):
    output = tmp_path / "out.mp4"
    arguments = [sys.executable, "-c", SCRIPT, TESTS, nano_checkpoint, cache, output, SECONDS]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([str(each) for each in arguments], env=environment)
    state = output.with_name("out.mp4.job") / "job.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if state.is_file() and json.loads(state.read_text())["done"] >= 21:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    result = pipeline.generate(request(SECONDS), output)
    assert 21 <= result.resumed_windows < result.windows
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.mp4"]


def test_a_damaged_job_goes_back(pipeline, whole, interrupted, tmp_path):
    """A block that needs a damaged file is made again, and so are those after it; the video is the same."""
    output, notes = tmp_path / "out.mp4", []
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "out.mp4.job" / "given_00024.safetensors"
    file.write_bytes(file.read_bytes()[:-9] + b"damaged!!")
    result = like(pipeline, lambda event: notes.append(str(vars(event)))).generate(request(SECONDS), output)
    assert any(f"{file.name} is damaged; going on from window 24 of" in note for note in notes)
    assert result.resumed_windows == 23
    assert output.read_bytes() == whole.read_bytes()


def test_another_window_is_not_resumed(nano_checkpoint, cache, interrupted):
    output = interrupted / "out.mp4"
    other = causal_pipeline(nano_checkpoint, cache, causal_window=8)
    with pytest.raises(ResumeError, match=r"sampling\.causal_window: 6 -> 8"):
        other.generate(request(SECONDS), output)


def test_should_stop_ends_the_run_before_the_next_step(pipeline, tmp_path):
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 3 + 2 * 5 + 1  # before three encoders, five blocks of two steps, one step more

    output = tmp_path / "out.mp4"
    with pytest.raises(StoppedError, match=r"before step \d of 2 of window \d of"):
        pipeline.generate(request(SECONDS), output, should_stop=stop)
    done = json.loads((tmp_path / "out.mp4.job" / "job.json").read_text())["done"]
    assert 4 <= done <= 6


def test_a_silent_video_and_another_size_and_rate(nano_checkpoint, cache, tmp_path):
    pipe = causal_pipeline(nano_checkpoint, cache, fps=25, image_sizes_720=[[48, 80]], seq_len=30)
    result = pipe.generate(replace(request(None)), tmp_path / "out.mp4")
    assert (result.frames, result.windows) == (30, 5)
    assert next(iter(read_frames(tmp_path / "out.mp4"))).shape == (48, 80, 3)


def test_streamed_blocks_make_the_same_video(pipeline, nano_checkpoint, cache):
    """Blocks of the DiT that lie in host memory; twin: all on the device."""
    streamed = causal_pipeline(nano_checkpoint, cache, num_persistent_param_in_dit=0)
    pairs = zip(pipeline.stream(request(1.5)), streamed.stream(request(1.5)), strict=True)
    assert all(np.array_equal(a.frames, b.frames) for a, b in pairs)
    assert streamed.models.residency.placement.memory.streams


def test_numbers_that_are_not_finite_name_the_block(nano_checkpoint, cache, tmp_path):
    pipe = causal_pipeline(nano_checkpoint, cache)
    pipe.warm_up()
    with torch.no_grad():
        pipe.models.dit.head.head.bias.fill_(float("inf"))
    with pytest.raises(NumbersError, match="window 1 of 5: the latents hold numbers that are not finite"):
        pipe.generate(request(2.0, audio=voice(1.9)), tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())


def test_a_merged_checkpoint_runs_and_warms_up(cache, tmp_path):
    """The form of the released student: one file with plain keys, no adapter."""
    checkpoint = make_checkpoint("livetalk-nano", tmp_path / "models")
    dit = str(checkpoint / "LiveTalk-nano" / "model.safetensors")
    pipe = causal_pipeline(checkpoint, cache, dit_path=dit, exp_path=None)
    pipe.warm_up()
    assert [len(chunk.frames) for chunk in pipe.stream(request(0.4))] == [5, 8]


@pytest.mark.parametrize(
    ("changes", "field", "remedy"),
    [
        ({"guidance_scale": 4.5}, "guidance_scale", "set guidance_scale to 1"),
        ({"audio_scale": 2}, "audio_scale", "leave audio_scale out"),
        ({"guidance_interval": [0, 0.5]}, "guidance_interval", "leave guidance_interval out"),
        ({"step_cache": "magcache"}, "step_cache", "leave step_cache out"),
        ({"tea_cache_l1_thresh": 0.14}, "tea_cache_l1_thresh", "leave tea_cache_l1_thresh out"),
        ({"overlap_frame": 13}, "overlap_frame", "leave overlap_frame out"),
        ({"max_tokens": 30000}, "max_tokens", "leave max_tokens out"),
        ({"sp_size": 2}, "sp_size", "leave sp_size out"),
        ({"cfg_parallel": 2}, "cfg_parallel", "leave cfg_parallel out"),
        ({"causal_window": 7}, "causal_window", "multiple of causal_block=2; use 8"),
        ({"causal_sink": 6}, "causal_window", "raise it to at least 8"),
        ({"causal_sink": 3}, "causal_sink", "multiple of causal_block=2; use 4"),
        ({"causal_block": 0}, "causal_block", "greater than or equal to 1"),
        ({"noise_span": 0}, "noise_span", "greater than or equal to 1"),
        ({"noise_span": 65}, "noise_span", "less than or equal to 64"),
        ({"noise_span": 8, "noise_white": -1}, "noise_white", "greater than or equal to 0"),
        ({"noise_white": 1}, "noise_white", "has no effect with noise_span: 1; leave it out"),
        ({"sampler": "euler"}, "causal_block", "leave it out or set sampler to causal"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_load(tmp_path, changes, field, remedy):
    values = {**overrides(tmp_path, tmp_path), **CAUSAL}
    del values["max_tokens"], values["overlap_frame"]
    load_config(None, values)
    with pytest.raises(ConfigError) as caught:
        load_config(None, values | changes)
    text = str(caught.value)
    assert text.startswith(f"overrides: {field}: ") and remedy in text and "\n" not in text


def test_a_span_of_the_noise_is_refused_with_another_sampler(tmp_path):
    with pytest.raises(ConfigError, match="noise_span: has no effect with sampler: euler"):
        load_config(None, {**overrides(tmp_path, tmp_path), "noise_span": 8})


def test_a_span_of_the_noise_makes_another_video_and_one_is_none(pipeline, nano_checkpoint, cache):
    latents = {}
    forms = {None: {}, 1: {"noise_span": 1}, 8: {"noise_span": 8}, 81: {"noise_span": 8, "noise_white": 1}}
    for span, changes in forms.items():
        pipe = causal_pipeline(nano_checkpoint, cache, **changes)
        latents[span] = np.concatenate([chunk.frames for chunk in pipe.stream(request(0.8))])
    assert np.array_equal(latents[None], latents[1])
    assert not np.array_equal(latents[1], latents[8]) and not np.array_equal(latents[8], latents[81])


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        (SamplingParams(guidance_scale=3.0), "set guidance_scale to 1"),
        (SamplingParams(step_cache="magcache"), "leave step_cache out"),
        (SamplingParams(sampler="renoise"), "causal_block: has no effect|sampler"),
    ],
)
def test_a_request_cannot_contradict_the_sampler(pipeline, sampling, named):
    with pytest.raises(ConfigError, match=f"request: .*({named})"):
        next(pipeline.stream(request(1.0, sampling=sampling)))


def test_a_request_cannot_make_another_model_causal(nano_checkpoint, cache):
    asked = request(1.0, sampling=SamplingParams(sampler="causal", guidance_scale=1.0))
    with pytest.raises(ConfigError, match="request: sampler: causal needs other weights than euler"):
        next(make_pipeline(nano_checkpoint, cache).stream(asked))


def test_a_block_causal_video_does_not_go_on_from_a_finished_one(pipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="continues: a block-causal video does not go on"):
        pipeline.generate(replace(request(0.5), continues=tmp_path / "old.mp4"), tmp_path / "new.mp4")
    assert not list(tmp_path.glob("new.mp4*"))
