"""The whole long-video loop equals the recorded runs: windows, masks, hand-over, guidance, step cache."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from compare import build_dit, build_vae, relative_error, under

from omniavatar.encoders.image import choose_bucket, prepare_image
from omniavatar.engine.recorder import NullRecorder
from omniavatar.engine.window_loop import WindowGenerator, WindowSampling
from omniavatar.sampling.cache_constants import TEACACHE_POLYNOMIALS
from omniavatar.sampling.guidance import guidance_branches
from omniavatar.sampling.passes import plan_passes
from omniavatar.sampling.schedule import make_schedule
from omniavatar.sampling.step_cache import compute_all, relative_changes, teacache_plan
from omniavatar.sampling.windows import frames_for, padded_audio_frames, plan_windows, window_length
from omniavatar.types import Conditioning


@pytest.fixture(scope="module")
def recording(golden):
    tensors, metadata = golden("pipeline.safetensors")
    vae_tensors, vae_metadata = golden("vae.safetensors")
    return tensors, metadata, build_vae(vae_metadata, under(vae_tensors, "weights."))


def audio_rows(metadata, count):
    """The first `count` rows of the recorded recipe: numpy's stream for fewer rows is the beginning."""
    shape = [
        int(n)
        for n in re.search(r"standard_normal\(\(([\d, ]+)\)\)", metadata["audio_embedding"])[1].split(",")
    ]
    scale = float(re.search(r"\*([\d.]+);", metadata["audio_embedding"])[1])
    assert count <= shape[0]
    generator = np.random.default_rng(int(metadata["audio_embedding_seed"]))
    return (generator.standard_normal((count, *shape[1:])).astype(np.float32) * scale).reshape(count, -1)


def step_plan(dit, schedule, threshold):
    if not threshold:
        return compute_all(len(schedule))
    with torch.inference_mode():
        modulations = dit.embed_time(torch.tensor(schedule.timesteps))[1]
    polynomial = TEACACHE_POLYNOMIALS["14B"]
    return teacache_plan(relative_changes(modulations.numpy()), polynomial, threshold, guard=False)


@pytest.mark.slow
def test_every_recorded_run(golden, recording):
    tensors, metadata, vae = recording
    runs = json.loads(metadata["runs"])
    assert runs
    for name, run in runs.items():
        check_run(golden, tensors, metadata, vae, name, run)


def check_run(golden, tensors, metadata, vae, name, run):
    dit_tensors, dit_metadata = golden("dit.safetensors")
    weights = under(dit_tensors, "weights.")
    if run["tea"]:
        replaced = under(tensors, f"{name}.time_projection.")
        weights.update({f"time_projection.{key}": value for key, value in replaced.items()})
    dit = build_dit(dit_metadata, weights)

    fps, rate = float(metadata["fps"]), int(metadata["sample_rate"])
    image = tensors["image"].numpy()
    size = choose_bucket(*image.shape[:2], [tuple(s) for s in json.loads(metadata["image_sizes"])])
    with torch.inference_mode():
        reference = vae.encode(prepare_image(image, size).unsqueeze(2))
    length = window_length(run["max_tokens"], *size)
    frames = frames_for(len(tensors[f"{name}.waveform"]), fps, rate)
    windows = plan_windows(frames, length, run["overlap"])
    assert len(windows) == run["windows"]
    assert sum(window.new_frames for window in windows) == run["frames"]

    schedule = make_schedule(run["steps"], shift=5.0)
    plan = step_plan(dit, schedule, run["tea"])
    branches = guidance_branches(run["cfg"], run["acfg"], has_audio=True)
    if run["pattern"]:
        each_branch_in_turn = "".join(letter * len(branches) for letter in plan.pattern)
        assert each_branch_in_turn * len(windows) == run["pattern"]
    conditioning = Conditioning(
        tensors["context_positive"],
        tensors["context_negative"],
        reference,
        audio_rows(metadata, padded_audio_frames(len(windows), length, run["overlap"])),
    )

    def recorded_noise(window, shape):
        noise = tensors[f"{name}.window{window.index}.noise"]
        assert noise.shape == shape
        return noise.clone

    generator = WindowGenerator(
        dit,
        vae,
        conditioning,
        WindowSampling(0, schedule, plan_passes(plan, branches, has_audio=True)),
        NullRecorder(),
        convert=lambda pixels: pixels[0].transpose(0, 1).numpy(),
        draw_noise=recorded_noise,
    )
    video = []
    for result in generator.run(windows):
        recorded = tensors[f"{name}.window{result.window.index}.latent"]
        assert relative_error(result.latent, recorded) <= 1e-4, (name, result.window.index)
        video.extend(result.frames)
    assert relative_error(torch.from_numpy(np.concatenate(video)), tensors[f"{name}.video"]) <= 1e-4, name
