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
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from omniavatar.accel.quantized import QUANTIZED
from omniavatar.accel.vae import frames_of_pass
from omniavatar.checkpoint.dit import keep_float32
from omniavatar.checkpoint.layout import Shape, dit_tensors
from omniavatar.errors import ResourceError
from omniavatar.model.dit import DiTConfig

GB = 10**9
RING = 2
STEPS_DOWN = 8
TEXT_TOKENS = 512
FLOAT = 4
SLACK = 1.15
HEADROOM = 0.04
"""Part of the limit that no plan counts on."""
TextPlace = Literal["whole", "layer by layer"]


@dataclass(frozen=True)
class DiTSizes:
    """Bytes of a DiT's weights. block: what a block computes with. text_layers: its layers for the text's
    keys and values, which leave the device with it. outside: everything not in a block."""

    blocks: int
    block: int
    text_layers: int
    outside: int

    @property
    def whole(self) -> int:
        return self.outside + self.blocks * (self.block + self.text_layers)


@dataclass(frozen=True)
class RunSizes:
    """Bytes of everything else.

    held: text keys and values, alive in every window. denoise: alive in a forward. coding: alive while the
    VAE works, for each size its passes may have, the largest first.
    """

    vae: int
    audio_encoder: int
    text_encoder: int
    held: int
    denoise: int
    coding: tuple[int, ...]


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


def dit_sizes(config: DiTConfig, dtype_bytes: int, float8: bool) -> DiTSizes:
    """Bytes of a DiT in the form it runs in."""
    block = text_layers = outside = 0
    for key, shape in dit_tensors(config):
        in_block = key.startswith("blocks.")
        name = key.split(".", 2)[2].rpartition(".")[0] if in_block else ""
        size = math.prod(shape) * (FLOAT if keep_float32(key) else dtype_bytes)
        if float8 and name in QUANTIZED and key.endswith(".weight"):
            size = math.prod(shape) + shape[0] * FLOAT
        if not in_block:
            outside += size
        elif name in ("cross_attn.k", "cross_attn.v"):
            text_layers += size
        else:
            block += size
    layers = config.num_layers
    return DiTSizes(layers, block // layers, text_layers // layers, outside)


def shared_out(sizes: DiTSizes, ranks: int) -> DiTSizes:
    """What one of `ranks` holds when they share the blocks: its part of each, and RING whole ones."""
    block, text = -(-sizes.block // ranks), -(-sizes.text_layers // ranks)
    whole = RING * sizes.block + sizes.text_layers
    return DiTSizes(sizes.blocks, block, text, sizes.outside + whole)


def denoise_bytes(
    config: DiTConfig,
    tokens: int,
    dtype_bytes: int,
    fused: bool,
    branches: int,
    cached: bool,
    float8: bool = False,
) -> int:
    """What is alive in a forward, the residuals of a step cache included.

    float8: the feed-forward layer's result is there twice for a moment, the second time in float8.
    """
    width, hidden = tokens * config.dim * dtype_bytes, tokens * config.ffn_dim * dtype_bytes
    if float8:
        hidden += tokens * config.ffn_dim
    counted = max(8 * width, 3 * width + hidden) if fused else max(12 * width, 5 * width + 2 * hidden)
    residuals = (branches + 2) * width if cached else 0
    return int(SLACK * counted) + residuals


def held_bytes(config: DiTConfig, texts: int, dtype_bytes: int) -> int:
    """Keys and values of this many texts in every block."""
    return texts * config.num_layers * 2 * TEXT_TOKENS * config.dim * dtype_bytes


def coding_bytes(
    channels: int,
    size: tuple[int, int],
    dtype_bytes: int,
    latents: int,
    overlap: int,
    fast: bool,
    ranks: int = 1,
) -> int:
    """What is alive while the VAE decodes `latents` a pass, or encodes the hand-over of `overlap` frames.

    In frames of the last stage: 18 past ones and 29 for each latent, encoding 20 and 5 for each frame (fast;
    measured on an H100: decoding 70 at two latents a pass, two ranks 58, encoding 77 and 41, the larger of
    them at one latent 47); the scores of a frame's attention are float32 and there twice. Where ranks share
    the rows, the largest run of them counts with its border, times the latents of a pass, which are `ranks`
    times as many, and what is whole on each: the portrait encoded by the leader, three times the pixels of a
    pass in float32.
    """
    height, width = size
    frame = height * width * channels * dtype_bytes
    if not fast:
        return 28 * frame
    rows = height // 8
    scores = 2 * latents * (rows * width // 8) ** 2 * FLOAT
    encoded = min(overlap - 1, frames_of_pass(latents))
    if 1 < ranks <= rows:
        most = -(-rows // ranks)
        share = frame * (8 * most + 2) // height
        decoding = 18 * share + ranks * max(29 * latents * share, scores * most // rows)
        pixels = 3 * 4 * ranks * latents * height * width * 3 * FLOAT
        return int(max(decoding + pixels, (20 + 5 * encoded) * share, 25 * frame))
    return int(max(18 * frame + max(29 * latents * frame, scores), (20 + 5 * encoded) * frame))


def tensor_bytes(tensors: Iterable[tuple[str, Shape]], dtype_bytes: int) -> int:
    """Bytes of all tensors in one dtype."""
    return sum(math.prod(shape) for _, shape in tensors) * dtype_bytes


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
