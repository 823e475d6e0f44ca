"""LeapTalk against its recording: LoRA and projector, schedules, one step, both hand-overs, TAEHV."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from compare import relative_error, under
from heads import check_chunk, chunk_rule, ears, head_dit, run_chunks, vae_of
from safetensors.torch import save_file

from omniavatar.accel.decoder import tiny_vae
from omniavatar.checkpoint.dit import LoraFile
from omniavatar.engine.window_loop import WindowSampling
from omniavatar.model.dit import WanDiT
from omniavatar.model.sizes import VAEConfig
from omniavatar.sampling.chunks import chunk_windows, plan_chunks
from omniavatar.sampling.guidance import guidance_branches
from omniavatar.sampling.passes import plan_passes
from omniavatar.sampling.schedule import distilled_schedule
from omniavatar.sampling.step_cache import compute_all
from omniavatar.sampling.windows import frames_for


def leaptalk_dit(golden, folder) -> WanDiT:
    """The base with the LoRA and the projector, from files like the released ones."""
    tensors, metadata = golden("leaptalk.safetensors")
    base, base_metadata = golden("flashhead.safetensors")
    (folder / "lora").mkdir()
    lora = folder / "lora" / "adapter_model.safetensors"
    save_file(under(tensors, "lora."), lora)
    sizes = json.loads(metadata["lora"])
    settings = {"peft_type": "LORA", "r": sizes["rank"], "lora_alpha": sizes["alpha"]}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    projector = folder / "audio_proj_step_10400.pt"
    torch.save(
        {name: value.to(torch.bfloat16) for name, value in under(tensors, "audio_proj.").items()}, projector
    )
    config = json.loads(base_metadata["config"])
    return head_dit(folder, base, config, loras=[LoraFile(lora)], projector=projector)


def option(run: dict[str, Any], name: str, default: str) -> str:
    """The value of an option in a recorded run's command."""
    options = run["options"]
    return options[options.index(name) + 1] if name in options else default


def tiny_file(metadata: dict[str, str], path) -> None:
    """Writes the recorded recipe of TAEHV's weights."""
    random = np.random.default_rng(json.loads(metadata["seeds"])["tae"])
    exponents = json.loads(metadata["tae_exponents"])
    weights = {
        key: torch.from_numpy(
            random.integers(-127, 128, tuple(shape)).astype(np.float32) * 2.0 ** -exponents[key]
        ).float()
        for key, shape in sorted(json.loads(metadata["tae_keys"]).items())
    }
    (bias,) = re.findall(r"decoder\.22\.bias is then ([\d.]+)", metadata["tae_recipe"])
    weights["decoder.22.bias"] = torch.full_like(weights["decoder.22.bias"], float(bias))
    torch.save(weights, path)


def test_one_forward_with_lora_and_projector(golden, tmp_path) -> None:
    tensors, metadata = golden("leaptalk.safetensors")
    dit = leaptalk_dit(golden, tmp_path)
    case = under(tensors, "merged.")
    with torch.inference_mode():
        context = dit.prepare_audio_tokens(case["windows"].flatten(3))
        timestep = torch.tensor([float(metadata["merged_timestep"])])
        out = dit(case["x"], case["y"], timestep, context, dit.prepare_audio(None))
    assert relative_error(out, case["output"]) <= 1e-5


def test_every_recorded_schedule(golden) -> None:
    _, metadata = golden("leaptalk.safetensors")
    for steps, timesteps in json.loads(metadata["schedules"]).items():
        made = distilled_schedule(int(steps), 5.0, whole=True).timesteps
        assert np.allclose(made, timesteps, rtol=1e-6), steps


@pytest.fixture(scope="module")
def heard(golden, tmp_path_factory) -> np.ndarray:
    """The rows that the chunks of all runs hear."""
    tensors, metadata = golden("leaptalk.safetensors")
    loop = json.loads(metadata["loop"])
    rule, wave = chunk_rule(loop), tensors["waveform"][: loop["samples"]].numpy()
    chunks = len(plan_chunks(frames_for(len(wave), rule.fps, loop["sample_rate"]), rule))
    listener = ears(golden, tmp_path_factory.mktemp("ears") / "speech", rule)
    return np.concatenate(list(listener.encode(wave, chunks)))


@pytest.mark.slow
def test_every_recorded_run(golden, tmp_path, heard) -> None:
    tensors, metadata = golden("leaptalk.safetensors")
    dit = leaptalk_dit(golden, tmp_path)
    runs = json.loads(metadata["runs"])
    assert runs
    for name, run in runs.items():
        check_run(golden, tmp_path, tensors, metadata, dit, heard, name, run)


def check_run(golden, tmp_path, tensors, metadata, dit, heard, name, run) -> None:
    loop = json.loads(metadata["loop"])
    rule = chunk_rule(loop)
    if run["lite"]:
        tiny_file(metadata, tmp_path / "taew2_1.pth")
        vae = tiny_vae(tmp_path / "taew2_1.pth", VAEConfig(), torch.float32, torch.device("cpu"))
    else:
        vae = vae_of(golden)
    portrait = tensors["portrait"]
    with torch.inference_mode():
        reference = vae.encode(portrait.expand(-1, -1, rule.frames, -1, -1))
    assert relative_error(reference[0], tensors[f"{name}.reference_latent"]) <= 1e-4

    windows = plan_chunks(frames_for(loop["samples"], rule.fps, loop["sample_rate"]), rule)
    windows = windows[: int(option(run, "--max_chunks", str(len(windows))))]
    assert len(windows) == run["chunks"]
    steps, guidance = int(option(run, "--num_inference_steps", "1")), option(run, "--guidance_scale", "1")
    sampling = WindowSampling(
        0,
        distilled_schedule(steps, 5.0, whole=True),
        plan_passes(compute_all(steps), guidance_branches(1.0, float(guidance), True), True),
        "bridge",
        None,
        rule,
        "latents" if option(run, "--history_update_mode", "roundtrip") == "latent" else "pixels",
        float(option(run, "--color_correction_strength", str(loop["colour_strength"]))),
    )

    def noises(chunk: int):
        for step in range(steps - 1):
            yield tensors[f"{name}.chunk{chunk}.noise{step}"]

    given = reference[:, :, :1]
    for result in run_chunks(dit, vae, portrait, reference, heard, sampling, windows, noises):
        chunk = result.window.index
        check_chunk(result, tensors, f"{name}.chunk{chunk}", rule.given, given)
        if (windows := tensors.get(f"{name}.chunk{chunk}.windows")) is not None:
            rows = torch.from_numpy(heard[chunk * rule.rows : (chunk + 1) * rule.rows])
            assert relative_error(rows[torch.tensor(chunk_windows(rule))], windows.flatten(2)) <= 1e-4
        given = result.next_given
