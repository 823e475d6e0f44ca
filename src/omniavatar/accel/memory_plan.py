"""What stays on the device, what visits it: a pure function from sizes and a limit to a `MemoryPlan`.

First the VAE's pass is made as large as it can be with every block streamed, then as many blocks stay
resident as fit beside the larger of denoising and decoding. Streaming is nearly free where a block computes
longer than its copy takes, so blocks give way before anything else does.

Weights are exact; activations are fitted to peaks measured on an H100 (14B and 1.3B, 15,750 and 30,375
tokens: 13.8 widths and 2.2 feed-forward widths a token, of the model's dtype) with 15 % on top; the VAE's are
those of `accel.vae`. What the estimate misses, `smaller` takes up: one step less after an allocation failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from omniavatar.accel.float8 import QUANTIZED
from omniavatar.checkpoint.dit import keep_float32
from omniavatar.checkpoint.layout import Shape, dit_tensors
from omniavatar.errors import ResourceError
from omniavatar.model.dit import DiTConfig

GIB = 2**30
RING = 2
LATENTS_AT_ONCE = 2
STEPS_DOWN = 8
TEXT_TOKENS = 512
FLOAT = 4
SLACK = 1.15
TextPlace = Literal["device", "device before the DiT", "host"]


@dataclass(frozen=True)
class DiTSizes:
    """Bytes of a DiT's weights. block: what a block computes with. text_layers: its layers for the text's
    keys and values, which leave the device with it. outside: everything not in a block."""

    blocks: int
    block: int
    text_layers: int
    outside: int


@dataclass(frozen=True)
class RunSizes:
    """Bytes of everything else: weights of the other models, and what is alive while denoising or decoding.

    A decoding pass of n latents takes `decode + n * decode_latent`.
    """

    vae: int
    audio_encoder: int
    text_encoder: int
    denoise: int
    decode: int
    decode_latent: int


@dataclass(frozen=True)
class MemoryPlan:
    """What is where. `peak`: the estimate in bytes; `limit`: what it was made for, None without one."""

    blocks: int
    resident_blocks: int
    ring: int
    latents_at_once: int
    text_encoder: TextPlace
    peak: int
    limit: int | None

    @property
    def streams(self) -> bool:
        return self.resident_blocks < self.blocks

    def as_dict(self) -> dict[str, Any]:
        """For the sidecar and JSON output."""
        return asdict(self)

    def describe(self) -> str:
        """One line for the user."""
        blocks = (
            f"{self.resident_blocks} of {self.blocks} blocks on the device, the others streamed "
            f"through {self.ring} buffers"
            if self.streams
            else "all blocks on the device"
        )
        limit = "" if self.limit is None else f" of {self.limit / GIB:.1f}"
        return (
            f"memory: {blocks}; VAE {self.latents_at_once} latents a pass; text encoder on the "
            f"{self.text_encoder}; about {self.peak / GIB:.1f}{limit} GiB"
        )


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


def denoise_bytes(config: DiTConfig, tokens: int, dtype_bytes: int, branches: int, cached: bool) -> int:
    """What is alive in a forward, the text's keys and values, and the residuals of a step cache."""
    activations = SLACK * tokens * dtype_bytes * (13.8 * config.dim + 2.2 * config.ffn_dim)
    text = 2 * config.num_layers * 2 * TEXT_TOKENS * config.dim * dtype_bytes
    residuals = branches * tokens * config.dim * dtype_bytes if cached else 0
    return int(activations) + text + residuals


def decode_bytes(channels: int, height: int, width: int, dtype_bytes: int, fast: bool) -> tuple[int, int]:
    """(always, a latent of the pass) of decoding at this size; the plain VAE's passes are fixed."""
    frame = height * width * channels * dtype_bytes
    return (24 * frame, 14 * frame) if fast else (28 * frame, 0)


def tensor_bytes(tensors: Iterable[tuple[str, Shape]], dtype_bytes: int) -> int:
    """Bytes of all tensors in one dtype."""
    return sum(math.prod(shape) for _, shape in tensors) * dtype_bytes


def plan_memory(dit: DiTSizes, run: RunSizes, limit: int | None) -> MemoryPlan:
    """The plan with most resident blocks that fits into `limit` bytes (None: everything resident).

    Raises ResourceError when not even one streamed block at a time fits.
    """
    best = _plan(dit, run, limit, dit.blocks, RING, LATENTS_AT_ONCE)
    if limit is None or best.peak <= limit:
        return best
    for ring, latents in ((RING, LATENTS_AT_ONCE), (RING, 1), (1, 1)):
        for resident in range(dit.blocks - 1, -1, -1):
            plan = _plan(dit, run, limit, resident, ring, latents)
            if plan.peak <= limit:
                return plan
    least = _plan(dit, run, limit, 0, 1, 1).peak
    raise ResourceError(
        f"memory: about {least / GIB:.1f} GiB are needed with every block streamed, {limit / GIB:.1f} GiB "
        "are there; lower max_tokens, use quantize=fp8 or the 1.3B model"
    )


def plan_parameters(dit: DiTSizes, run: RunSizes, resident: int, limit: int | None) -> MemoryPlan:
    """The plan with this many resident blocks, whatever `limit` is (it places the text encoder)."""
    return _plan(dit, run, limit, resident, RING, LATENTS_AT_ONCE)


def resident_blocks(config: DiTConfig, parameters: int) -> int:
    """Blocks that stay when `parameters` of the DiT may: those outside the blocks count first."""
    counts = [0, 0]
    for key, shape in dit_tensors(config):
        counts[key.startswith("blocks.")] += math.prod(shape)
    block = counts[1] // config.num_layers
    return min(max(parameters - counts[0], 0) // block, config.num_layers)


def smaller(plan: MemoryPlan, dit: DiTSizes, run: RunSizes) -> MemoryPlan | None:
    """One step down: fewer resident blocks, then smaller VAE passes, then one buffer; None at the end."""
    step = max(1, math.ceil(plan.blocks / STEPS_DOWN))
    if plan.resident_blocks:
        fewer = plan.resident_blocks - step - (0 if plan.streams else plan.ring)
        changed = replace(plan, resident_blocks=max(fewer, 0))
    elif plan.latents_at_once > 1:
        changed = replace(plan, latents_at_once=1)
    elif plan.ring > 1:
        changed = replace(plan, ring=1)
    else:
        return None
    return _plan(dit, run, plan.limit, changed.resident_blocks, changed.ring, changed.latents_at_once)


def _plan(
    dit: DiTSizes, run: RunSizes, limit: int | None, resident: int, ring: int, latents: int
) -> MemoryPlan:
    streamed = dit.blocks - resident
    weights = dit.outside + resident * (dit.block + dit.text_layers) + min(ring, streamed) * dit.block
    beside = run.vae + run.audio_encoder
    peak = weights + beside + max(run.denoise, run.decode + latents * run.decode_latent)
    text: TextPlace = "device"
    if limit is not None and beside + run.text_encoder > limit:
        text = "host"
    elif limit is not None and weights + beside + run.text_encoder > limit:
        text = "device before the DiT"
    return MemoryPlan(dit.blocks, resident, ring, latents, text, peak, limit)
