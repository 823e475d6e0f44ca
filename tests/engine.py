"""A pipeline small enough for tests: the nano checkpoint at 64x64, windows of 13 frames, two steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omniavatar import AvatarPipeline, AvatarRequest, Waveform
from omniavatar.config.load import load_config
from omniavatar.engine.events import StepFinished
from omniavatar.engine.host import Host
from omniavatar.engine.prepare import read_inputs
from omniavatar.engine.recorder import RunRecorder

SIDE = 64


def overrides(checkpoint: Path, cache: Path, **changes: Any) -> dict[str, Any]:
    """Settings of the test engine by flat key; `changes` override them."""
    base = checkpoint / "Wan2.1-T2V-nano"
    return {
        "dit_path": str(base / "diffusion_pytorch_model.safetensors"),
        "text_encoder_path": str(base / "models_t5_umt5-xxl-enc-bf16.pth"),
        "vae_path": str(base / "Wan2.1_VAE.pth"),
        "wav2vec_path": str(checkpoint / "wav2vec2-base-960h"),
        "exp_path": str(checkpoint / "OmniAvatar-nano"),
        "dtype": "fp32",
        "device": "cpu",
        "num_steps": 2,
        "guidance_scale": 2.0,
        "image_sizes_720": [[SIDE, SIDE]],
        "max_tokens": 56,
        "overlap_frame": 5,
        "preset": "ultrafast",
        "text_cache_dir": str(cache),
        **changes,
    }


def make_pipeline(
    checkpoint: Path,
    cache: Path,
    recorder: Any = None,
    host: Host | None = None,
    kind: type[AvatarPipeline] = AvatarPipeline,
    **changes: Any,
) -> AvatarPipeline:
    config = load_config(None, overrides(checkpoint, cache, **changes)).config
    return kind.from_config(config, recorder=recorder, host=host)


CAUSAL = {
    "sampler": "causal",
    "guidance_scale": 1,
    "causal_block": 2,
    "causal_window": 6,
    "causal_sink": 2,
    "fps": 16,
}
"""Settings of a block-causal test engine: blocks of 8 frames, one earlier block beside the sink."""


def causal_pipeline(
    checkpoint: Path, cache: Path, recorder: Any = None, host: Host | None = None, **changes: Any
) -> AvatarPipeline:
    """The test engine with block-causal sampling; its weights are those of the nano checkpoint."""
    values = {**overrides(checkpoint, cache), **CAUSAL, **changes}
    for name in ("max_tokens", "overlap_frame"):
        values.pop(name)
    return AvatarPipeline.from_config(load_config(None, values).config, recorder=recorder, host=host)


def head_pipeline(
    checkpoint: Path,
    cache: Path,
    recorder: Any = None,
    host: Host | None = None,
    family: str = "flashhead",
    **changes: Any,
) -> AvatarPipeline:
    """A test engine of FlashHead or LeapTalk at 32x32, with the VAE. checkpoint: `heads_checkpoint`."""
    return AvatarPipeline.from_config(
        load_config(None, head_settings(checkpoint, cache, family, **changes)).config,
        recorder=recorder,
        host=host,
    )


def head_settings(checkpoint: Path, cache: Path, family: str, **changes: Any) -> dict[str, Any]:
    """Settings of `head_pipeline`; the files say which family it is."""
    base, own = checkpoint / "SoulX-FlashHead-1_3B", checkpoint / "LeapTalk"
    values: dict[str, Any] = {
        "dit_path": str(base / "Model_Pro/diffusion_pytorch_model.safetensors"),
        "vae_path": str(base / "VAE_Wan/Wan2.1_VAE.pth"),
        "wav2vec_path": str(checkpoint / "wav2vec2-base-960h"),
        "dtype": "fp32",
        "device": "cpu",
        "image_sizes_720": [[32, 32]],
        "preset": "ultrafast",
        "text_cache_dir": str(cache),
    }
    if family == "leaptalk":
        lora = {"path": str(own / "lora/adapter_model.safetensors"), "strength": 1.0}
        values |= {"loras": [lora], "audio_proj_path": str(own / "audio_proj_step_10400.pt")}
    return {**values, **changes}


def portrait(seed: int = 0, side: int = 90) -> np.ndarray:
    """A smooth picture (side, side, 3) uint8."""
    generator = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.linspace(0, 3, side), np.linspace(0, 3, side), indexing="ij")
    phases = generator.uniform(0, 6, 3)
    return np.stack([128 + 90 * np.sin(rows + columns * p + p) for p in phases], -1).astype(np.uint8)


def voice(seconds: float, rate: int = 16000, seed: int = 0) -> Waveform:
    """Noise with the rhythm of speech."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return Waveform((noise * 0.1 * (np.sin(2 * np.pi * 3 * time) > 0)).astype(np.float32), rate)


def request(seconds: float | None = 0.9, **changes: Any) -> AvatarRequest:
    values: Mapping[str, Any] = {
        "prompt": "a person speaks",
        "image": portrait(),
        "audio": None if seconds is None else voice(seconds),
        **changes,
    }
    return AvatarRequest(**values)


def interrupt_in(window: int, pipeline: AvatarPipeline, asked: AvatarRequest, output: Path) -> None:
    """Ctrl-C in a run with the settings of `pipeline`, after a step of window number `window` (from 0)."""

    def listener(event: object) -> None:
        if isinstance(event, StepFinished) and event.window == window:
            raise KeyboardInterrupt

    stopped = AvatarPipeline.from_config(pipeline.config, recorder=RunRecorder([listener]))
    try:
        stopped.generate(asked, output)
    except KeyboardInterrupt:
        return
    raise AssertionError(f"window {window} was never made")


def adopt_placement(pipeline: AvatarPipeline, for_request: AvatarRequest) -> AvatarPipeline:
    """Adopt the placement of a request, so that its models can be loaded before it runs."""
    pipeline.adopt(read_inputs(pipeline.models, for_request).shape)
    return pipeline
