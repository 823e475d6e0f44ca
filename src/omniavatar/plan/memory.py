"""What stays on the device, what visits it: a pure function from sizes and a limit to a `MemoryPlan`.

First the VAE's pass is made as large as it can be with every block streamed, then as many blocks stay
resident as fit beside the larger of denoising and coding. Streaming is nearly free where a block computes
longer than its copy takes, so blocks give way before anything else does. Precision is never touched here.

Weights are exact. Activations of the fused blocks are counted: 8 widths of the tokens, or 3 and one of the
feed-forward layer; those of the plain ones and of the VAE (at 400x720) are fitted to peaks measured on an
H100. 15 % and HEADROOM of the limit are left for scratch memory and for holes in the allocator. What the
estimate misses, `smaller` takes up: one step less after an allocation failed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from omniavatar.checkpoint.layout import dit_tensors
from omniavatar.errors import ResourceError
from omniavatar.plan.sizes import GB, RING, DiTSizes, RunSizes

if TYPE_CHECKING:
    from omniavatar.model.sizes import DiTConfig

STEPS_DOWN = 8
HEADROOM = 0.04
"""Part of the limit that no plan counts on."""
TextPlace = Literal["whole", "layer by layer"]


@dataclass(frozen=True)
class MemoryPlan:
    """What is where. `peak`: the estimate in bytes; `limit`: what it was made for, None without one.

    coding_pass: which of the VAE's pass sizes, 0 the largest. text_encoder: how it computes, if it must.
    """

    blocks: int
    resident_blocks: int
    ring: int
    coding_pass: int
    text_encoder: TextPlace
    peak: int
    limit: int | None

    @property
    def streams(self) -> bool:
        return self.resident_blocks < self.blocks

    @property
    def fits(self) -> bool:
        return self.limit is None or self.peak <= self.limit * (1 - HEADROOM)

    def as_dict(self) -> dict[str, Any]:
        """For the sidecar and JSON output."""
        return asdict(self)

    def describe(self) -> str:
        """One line for the user."""
        parts = ["all blocks on the device"]
        if self.streams:
            buffers = "one buffer" if self.ring == 1 else f"{self.ring} buffers"
            streamed = self.blocks - self.resident_blocks
            parts = [f"{self.resident_blocks} of {self.blocks} blocks stay on the device, {streamed} stream "]
            parts[0] += f"from host memory through {buffers}"
        if self.coding_pass:
            parts.append("VAE in small passes")
        if self.text_encoder == "layer by layer":
            parts.append("text encoder layer by layer")
        limit = "" if self.limit is None else f" of {self.limit / GB:.1f}"
        parts.append(f"about {self.peak / GB:.1f}{limit} GB")
        return f"memory: {'; '.join(parts)}"


def plan_memory(dit: DiTSizes, run: RunSizes, limit: int | None, passes: range | None = None) -> MemoryPlan:
    """The plan with most resident blocks that fits into `limit` bytes (None: everything resident).

    passes: the VAE's pass sizes it may choose from, all if None. Raises ResourceError when not even one
    streamed block at a time fits.
    """
    passes = passes or range(len(run.coding))
    whole = _plan(dit, run, limit, dit.blocks, RING, passes[0])
    if whole.fits:
        return whole
    for ring, coding in ((RING, passes[0]), (RING, passes[-1]), (1, passes[-1])):
        for resident in range(dit.blocks - 1, -1, -1):
            plan = _plan(dit, run, limit, resident, ring, coding)
            if plan.fits:
                return plan
    assert limit is not None
    least = _plan(dit, run, limit, 0, 1, passes[-1]).peak / (1 - HEADROOM)
    raise ResourceError(
        f"memory: about {least / GB:.1f} GB are needed with every block streamed, {limit / GB:.1f} GB are "
        "there; lower max_tokens, use quantize=fp8 or the 1.3B model, or free memory on the device"
    )


def plan_parameters(
    dit: DiTSizes, run: RunSizes, resident: int, limit: int | None, passes: range | None = None
) -> MemoryPlan:
    """The plan with this many resident blocks, whether or not it fits; the VAE's pass is chosen to fit."""
    passes = passes or range(len(run.coding))
    plans = [_plan(dit, run, limit, resident, RING, coding) for coding in passes]
    return next((plan for plan in plans if plan.fits), plans[-1])


def resident_blocks(config: DiTConfig, parameters: int) -> int:
    """Blocks that stay when `parameters` of the DiT may: those outside the blocks count first."""
    counts = [0, 0]
    for key, shape in dit_tensors(config):
        counts[key.startswith("blocks.")] += math.prod(shape)
    block = counts[1] // config.num_layers
    return min(max(parameters - counts[0], 0) // block, config.num_layers)


def fewer_resident(plan: MemoryPlan, resident: int, dit: DiTSizes, run: RunSizes) -> MemoryPlan:
    """`plan` with at most `resident` blocks on the device."""
    count = min(plan.resident_blocks, resident)
    return _plan(dit, run, plan.limit, count, plan.ring, plan.coding_pass)


def smaller(plan: MemoryPlan, dit: DiTSizes, run: RunSizes) -> MemoryPlan | None:
    """One step down: fewer resident blocks, then one buffer, then smaller VAE passes; None at the end."""
    step = max(1, math.ceil(plan.blocks / STEPS_DOWN))
    if plan.resident_blocks:
        fewer = plan.resident_blocks - step - (0 if plan.streams else plan.ring)
        changed = replace(plan, resident_blocks=max(fewer, 0))
    elif plan.ring > 1:
        changed = replace(plan, ring=1)
    elif plan.coding_pass + 1 < len(run.coding):
        changed = replace(plan, coding_pass=plan.coding_pass + 1)
    else:
        return None
    return _plan(dit, run, plan.limit, changed.resident_blocks, changed.ring, changed.coding_pass)


def _plan(
    dit: DiTSizes, run: RunSizes, limit: int | None, resident: int, ring: int, coding: int
) -> MemoryPlan:
    streamed = dit.blocks - resident
    weights = dit.outside + resident * (dit.block + dit.text_layers) + min(ring, streamed) * dit.block
    beside = run.vae + run.audio_encoder
    peak = weights + beside + run.held + max(run.denoise, run.coding[coding])
    alone = beside + run.text_encoder
    text: TextPlace = "whole"
    if limit is not None and alone > limit * (1 - HEADROOM):
        text = "layer by layer"
    return MemoryPlan(
        dit.blocks, resident, ring, coding, text, max(peak, alone if text == "whole" else 0), limit
    )
