"""The few-step presets end to end: a LoRA in the format of the distilled ones, their schedule, one pass per
step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from engine import overrides, voice
from media_files import write_audio
from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.cli import app
from omniavatar.media.inspect import read_frames

REPOSITORY = Path(__file__).resolve().parents[3]
PORTRAIT = str(REPOSITORY / "examples" / "portrait.png")
SECONDS = 1.6
OF_THE_PRESET = ("num_steps", "guidance_scale", "max_tokens", "overlap_frame")
RANK = 4


@pytest.fixture(scope="module")
def lora(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA in LightX2V's format: pairs with alpha on every matrix, differences of biases and norms."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    with TensorFiles(nano_checkpoint / "Wan2.1-T2V-nano" / "diffusion_pytorch_model.safetensors") as files:
        for key in files.keys():  # noqa: SIM118  (TensorFiles is not a mapping)
            layer, _, kind = key.rpartition(".")
            name, shape = f"diffusion_model.{layer}", files.shape(key)
            if not key.startswith("blocks.") or kind == "modulation":
                continue
            if kind == "bias":
                tensors[f"{name}.diff_b"] = 0.02 * torch.randn(shape, generator=generator)
            elif len(shape) == 1:
                tensors[f"{name}.diff"] = 0.02 * torch.randn(shape, generator=generator)
            else:
                rows, columns = shape
                tensors[f"{name}.lora_down.weight"] = 0.1 * torch.randn(RANK, columns, generator=generator)
                tensors[f"{name}.lora_up.weight"] = 0.1 * torch.randn(rows, RANK, generator=generator)
                tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
    path = tmp_path_factory.mktemp("lora") / "four_steps.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, path)
    return path


def generate(
    preset: str, nano: Path, folder: Path, name: str, **changes: Any
) -> tuple[dict[str, Any], np.ndarray]:
    """The sidecar and the frames of a video made with the preset and the nano model."""
    values = {k: v for k, v in overrides(nano, folder / "cache").items() if k not in OF_THE_PRESET}
    values |= {"max_tokens": 56, "overlap_frame": 5, "model_config.in_dim": 33, **changes}
    settings = ",".join(f"{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in values.items())
    output = folder / f"{name}.mp4"
    config = str(REPOSITORY / "configs" / f"{preset}.yaml")
    speech = folder / "speech.wav"
    write_audio(speech, voice(SECONDS).samples[None], 16000, "pcm_s16le", "mono")
    request = ("--prompt", "a person", "--image", PORTRAIT, "--audio", str(speech))
    arguments = ["generate", "-q", "-c", config, "--hp", settings, *request, "-o", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(output.with_suffix(".json").read_text()), np.stack(list(read_frames(output)))


@pytest.mark.parametrize("preset", ["inference_14B_4steps", "inference_1.3B_4steps"])
def test_preset_end_to_end(preset: str, nano_checkpoint: Path, lora: Path, tmp_path: Path) -> None:
    loras = [{"path": str(lora), "strength": 1.0}]
    sidecar, frames = generate(preset, nano_checkpoint, tmp_path, "video", loras=loras)
    plan = sidecar["plan"]
    assert plan["branch_patterns"] == {"positive+speech": "CCCC"}
    assert plan["forwards"] == 4 * plan["windows"] and plan["forwards_skipped"] == 0
    assert sidecar["config"]["sampling.sampler"] == "renoise" and len(frames) == plan["frames"]
    _, plain = generate(preset, nano_checkpoint, tmp_path, "plain", loras=[])
    assert np.abs(frames.astype(int) - plain).mean() > 0.5


def test_audio_guidance_is_a_second_pass(nano_checkpoint: Path, lora: Path, tmp_path: Path) -> None:
    loras = [{"path": str(lora), "strength": 1.0}]
    sidecar, _ = generate(
        "inference_14B_4steps", nano_checkpoint, tmp_path, "video", loras=loras, audio_scale=2
    )
    plan = sidecar["plan"]
    assert plan["branch_patterns"] == {"positive+speech": "CCCC", "positive+silence": "CCCC"}
    assert [branch["weight"] for branch in plan["branches"]] == [2, -1]
