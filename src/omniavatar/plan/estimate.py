"""Estimates the memory and the placement of a run, before anything is loaded.

Sizes and placement come from the functions that a run uses: weights are exact, activations are counted or
fitted (see `plan.memory`). The text encoder is counted apart, because it is loaded and released before the
first window.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

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
    """Bytes by part.

    - audio_features_file: bytes on disk.
    - assumed_scale: the assumed model; None if the sizes come from the files.
    - placement: the choice for this machine; None if the run does not fit, with the reason in `problem`.
    """

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
        """Peak with everything resident: weights, and the larger of activations and text encoder."""
        return self.dit + self.vae + self.audio_encoder + max(self.activations, self.text_encoder)

    @property
    def choice(self) -> str:
        """One line: the placement, or the reason why the run does not fit."""
        return self.placement.describe() if self.placement else str(self.problem)


def plan_report(plan: RunPlan, memory: MemoryEstimate, config: PipelineConfig) -> dict[str, Any]:
    """Plan and memory for JSON."""
    need = {**asdict(memory), "device_peak": memory.device_peak, "choice": memory.choice}
    coders = {"decoder": config.model.decoder, "vae": config.runtime.vae}
    return {**plan.as_dict(), **coders, "memory": need}


def estimate_memory(config: PipelineConfig, plan: RunPlan, device: torch.device) -> MemoryEstimate:
    """Memory of one request with `plan` on `device`. Raises CheckpointError if files are broken."""
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
