"""The maker of live blocks for the model of a pipeline, and the stage of its sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omniavatar.errors import ConfigError
from omniavatar.live.maker import BlockMaker
from omniavatar.live.stage import LiveStage

if TYPE_CHECKING:
    from omniavatar.engine.pipeline import AvatarPipeline
    from omniavatar.types import ImageInput


def stage_of(pipeline: AvatarPipeline) -> LiveStage:
    """The stage that all live sessions of `pipeline` share."""
    return pipeline.companion(LiveStage, lambda: LiveStage(free_memory=lambda: free_memory(pipeline)))


def free_memory(pipeline: AvatarPipeline) -> int | None:
    """Bytes that a new session finds on the GPU, those that the allocator keeps included; None on a CPU."""
    import torch

    device = pipeline.models.device
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def maker_of(pipeline: AvatarPipeline, image: ImageInput, prompt: str, seed: int | None) -> BlockMaker:
    """A maker for a portrait. Raises InputError, ConfigError, CheckpointError, ResourceError."""
    if pipeline.config.output.provenance:
        raise ConfigError(
            "provenance: a live video cannot be signed, only a finished .mp4 of generate, batch or serve; "
            "set provenance=false"
        )
    if not pipeline.models.dit_config.audio_dim:
        raise ConfigError("live: this checkpoint has no audio layers; set exp_path, or choose another config")
    if pipeline.config.sampling.causal is not None:
        from omniavatar.live.causal import CausalMaker

        return CausalMaker(pipeline, image, prompt, seed)
    chunk = pipeline.config.family.chunk
    if chunk is not None:
        from omniavatar.live.chunked import ChunkedMaker

        return ChunkedMaker(pipeline, image, prompt, seed, chunk)
    from omniavatar.live.windowed import WindowedMaker

    return WindowedMaker(pipeline, image, prompt, seed)
