"""Which blocks stay on the device and which are streamed: a pure function from sizes and a limit to a plan.

First, the VAE's pass is made as large as possible with every block streamed. Then as many blocks stay
resident as fit beside the larger of denoising and coding. Blocks are offloaded first, because streaming is
nearly free if a block computes longer than its copy takes. The plan never changes precision.

Weights are exact. Activations of fused blocks are counted: 8 times the tokens' width, or 3 times that and
once the feed-forward layer's. Those of plain blocks and of the VAE (at 400x720) are fitted to peaks measured
on an H100. SLACK (15 % of activations) and HEADROOM cover scratch memory and holes in the allocator. If the
estimate is too low, an allocation fails and `smaller` gives the next plan.
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
"""`smaller` offloads one of this many parts of the blocks at a time."""
HEADROOM = 0.04
"""Fraction of the limit that every plan leaves free."""
TextMode = Literal["whole", "layer by layer"]
"""How the text encoder computes."""


@dataclass(frozen=True)
class MemoryPlan:
    """What lies on the device.

    - resident_blocks: of `blocks`; the others are streamed through `ring` buffers.
    - coding_pass: index of the VAE's pass size; 0 is the largest.
    - text_encoder: its mode, if a prompt must be encoded.
    - peak: estimated bytes. limit: bytes that the plan was made for; None means no limit.
    """

    blocks: int
    resident_blocks: int
    ring: int
    coding_pass: int
    text_encoder: TextMode
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


def plan_memory(
    dit: DiTSizes, run: RunSizes, limit: int | None, passes: range | None = None, lower: str = "max_tokens"
) -> MemoryPlan:
    """The plan with the most resident blocks that fits into `limit` bytes; None means everything resident.

    - passes: the VAE's pass sizes to choose from; None means all.
    - lower: the setting that the user can lower to need less, for the error.

    Raises ResourceError if not even one streamed block at a time fits.
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
        f"available; lower {lower}, use quantize=fp8 or the 1.3B model, or free memory on the device"
    )


def plan_parameters(
    dit: DiTSizes, run: RunSizes, resident: int, limit: int | None, passes: range | None = None
) -> MemoryPlan:
    """The plan with `resident` blocks, even if it does not fit, and the largest VAE pass that fits."""
    passes = passes or range(len(run.coding))
    plans = [_plan(dit, run, limit, resident, RING, coding) for coding in passes]
    return next((plan for plan in plans if plan.fits), plans[-1])


def resident_blocks(config: DiTConfig, parameters: int) -> int:
    """How many blocks stay if `parameters` of the DiT may; parameters outside the blocks count first."""
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
    """The next smaller plan: fewer resident blocks, then one buffer, then smaller VAE passes, then None."""
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
    text: TextMode = "whole"
    if limit is not None and alone > limit * (1 - HEADROOM):
        text = "layer by layer"
    return MemoryPlan(
        dit.blocks, resident, ring, coding, text, max(peak, alone if text == "whole" else 0), limit
    )
