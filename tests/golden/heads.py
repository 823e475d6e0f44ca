"""Builds the models that the recordings of FlashHead and LeapTalk describe, from files like the released."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from compare import build_vae, relative_error, under
from safetensors.torch import save_file

from omniavatar.accel.attention.registry import create_attention
from omniavatar.checkpoint.dit import DiTFiles, load_dit
from omniavatar.encoders.audio import AudioEncoder
from omniavatar.encoders.chunk_audio import ChunkEars
from omniavatar.engine.recorder import NullRecorder
from omniavatar.engine.window_loop import WindowGenerator, WindowSampling
from omniavatar.model.dit import WanDiT
from omniavatar.model.vae import VideoVAE
from omniavatar.sampling.chunks import ChunkRule
from omniavatar.types import Conditioning, Window

Tensors = dict[str, torch.Tensor]


def chunk_rule(loop: dict[str, Any]) -> ChunkRule:
    """The sizes of a recorded loop."""
    return ChunkRule(loop["frames_in"], loop["motion_frames"], loop["fps"], loop["buffer_seconds"])


def head_dit(
    folder: Path, tensors: Tensors, config: dict[str, Any], notes: list[str] | None = None, **files: Any
) -> WanDiT:
    """The DiT, read from a file with the released keys. notes: collects what the loader reports."""
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(under(tensors, "weights."), path)
    (folder / "config.json").write_text(json.dumps(config))
    _, attention = create_attention("sdpa", torch.device("cpu"), torch.float32)
    return load_dit(
        DiTFiles(path, **files),
        attention=attention,
        dtype=torch.float32,
        device="cpu",
        note=([] if notes is None else notes).append,
    )


def ears(golden: Any, folder: Path, rule: ChunkRule) -> ChunkEars:
    """The speech encoder of `wav2vec.safetensors`."""
    tensors, metadata = golden("wav2vec.safetensors")
    folder.mkdir()
    (folder / "config.json").write_text(metadata["config"])
    renamed = {
        "wav2vec2."
        + key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for key, value in under(tensors, "weights.").items()
    }
    save_file(renamed, folder / "model.safetensors")
    return ChunkEars(AudioEncoder.load(folder, "cpu").model, rule)


def vae_of(golden: Any) -> VideoVAE:
    tensors, metadata = golden("vae.safetensors")
    return build_vae(metadata, under(tensors, "weights."))


def run_chunks(
    dit: WanDiT,
    vae: VideoVAE,
    portrait: torch.Tensor,
    reference: torch.Tensor,
    rows: Any,
    sampling: WindowSampling,
    windows: tuple[Window, ...],
    noises: Callable[[int], Iterator[torch.Tensor]],
) -> Iterator[Any]:
    """Results of all chunks; frames are (3, n, H, W) in [0, 1].

    - noises: the recorded noises of a chunk in order.
    """
    conditioning = Conditioning(torch.empty(1, 0, 0), torch.empty(1, 0, 0), reference, rows, portrait)

    def recorded(window: Window, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        drawn = noises(window.index)

        def draw() -> torch.Tensor:
            noise = next(drawn)[None]
            assert noise.shape == shape
            return noise.clone()

        return draw

    generator = WindowGenerator(
        dit,
        vae,
        conditioning,
        sampling,
        NullRecorder(),
        convert=lambda pixels: pixels[0].clone().numpy(),
        draw_noise=recorded,
    )
    return generator.run(windows)


def check_chunk(result: Any, tensors: Tensors, prefix: str, hidden: int, given: torch.Tensor | None) -> None:
    """The given latents, the latents and the shown frames of a chunk equal the recording."""
    recorded = tensors[f"{prefix}.given"]
    if given is not None:
        assert relative_error(given[0], recorded) <= 1e-4, prefix
    assert relative_error(result.latent[0], tensors[f"{prefix}.latent"]) <= 1e-4, prefix
    frames = tensors.get(f"{prefix}.frames")
    if frames is not None:
        made = torch.cat([torch.from_numpy(piece) for piece in result.frames], dim=1)
        shown = frames[:, hidden : hidden + made.shape[1]]
        assert relative_error(made * 2 - 1, shown) <= 3e-4, prefix
