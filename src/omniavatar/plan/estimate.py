"""How much memory a run will take and where its models would lie, estimated before anything heavy.

Sizes and places are those of `placement`, which a run uses too: weights are exact, activations are counted
or fitted (`plan.memory` says how well). The text encoder is counted apart, since it comes and goes
before the first window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omniavatar.accel.vae_runners import choose_vae
from omniavatar.config.schema import PipelineConfig
from omniavatar.errors import ResourceError
from omniavatar.plan.limit import device_limit
from omniavatar.plan.placement import Placement, place
from omniavatar.plan.preview import find_dit_config
from omniavatar.plan.run import RunPlan
from omniavatar.plan.sizes import DTYPE_BYTES, FLOAT, dit_sizes, run_sizes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part; `audio_features_file` lies on disk. `assumed_scale`: the model counted, if not read off
    the files. placement: what this machine would do; None, with the reason in `problem`, where it cannot."""

    dit: int
    vae: int
    audio_encoder: int
    text_encoder: int
    activations: int
    audio_features_file: int
    assumed_scale: str | None
    placement: Placement | None
    problem: str | None

    @property
    def device_peak(self) -> int:
        """With everything resident: weights that stay and the larger of activations and text encoder."""
        return self.dit + self.vae + self.audio_encoder + max(self.activations, self.text_encoder)

    @property
    def choice(self) -> str:
        """One line: the placement, or why there is none."""
        return self.placement.describe() if self.placement else str(self.problem)


def estimate_memory(config: PipelineConfig, plan: RunPlan, device: torch.device) -> MemoryEstimate:
    """Memory of one request under `plan` on `device`. Raises CheckpointError for broken files."""
    dit, assumed = find_dit_config(config.model)
    vae_name = choose_vae(config.runtime.vae, device)
    run = run_sizes(config, dit, plan, vae_name, device)
    placement, problem = None, None
    try:
        limit = device_limit(config.runtime.memory, device)
        placement = place(config, dit, plan, vae_name, device, limit)
    except ResourceError as error:
        problem = str(error)
    quantize = placement.quantize if placement else config.runtime.quantize
    return MemoryEstimate(
        dit=dit_sizes(dit, DTYPE_BYTES[config.model.dtype], quantize != "none").whole,
        vae=run.vae,
        audio_encoder=run.audio_encoder,
        text_encoder=run.text_encoder,
        activations=run.held + max(run.denoise, run.coding[0]),
        audio_features_file=plan.padded_audio_frames * dit.audio_dim * FLOAT if plan.has_audio else 0,
        assumed_scale=assumed,
        placement=placement,
        problem=problem,
    )
