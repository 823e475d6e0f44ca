"""Bytes that a model and a request take, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from omniavatar.accel.decoder import DECODERS
from omniavatar.accel.precision import QUANTIZED
from omniavatar.accel.vae_runners import frames_of_pass, pass_sizes
from omniavatar.checkpoint.dit_sizes import keep_float32
from omniavatar.checkpoint.layout import SCALES, Shape, dit_tensors, text_tensors, wav2vec_tensors
from omniavatar.checkpoint.layout_vae import vae_tensors
from omniavatar.errors import ConfigError

if TYPE_CHECKING:
    from omniavatar.config.schema import PipelineConfig
    from omniavatar.model.sizes import DiTConfig
    from omniavatar.plan.run import WindowShape

GB = 10**9

RING = 2

TEXT_TOKENS = 512

FLOAT = 4

SLACK = 1.15


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


DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def vae_ranks(config: PipelineConfig, vae_name: str) -> int:
    """Processes that share the VAE's work: all that make a video, or one.

    Raises ConfigError where `vae_parallel` asks for what cannot be.
    """
    runtime = config.runtime
    can = runtime.processes > 1 and vae_name == "fast" and DECODERS.get(config.model.decoder).shares_rows
    if runtime.vae_parallel and not can:
        shared = ", ".join(each.name for each in DECODERS if each.shares_rows)
        raise ConfigError(
            f"vae_parallel: needs several processes, vae: fast and one of the decoders "
            f"{shared}, not {runtime.processes}, {vae_name} and {config.model.decoder}; "
            "leave it out to share the VAE where it can be"
        )
    return runtime.processes if can and runtime.vae_parallel is not False else 1


def run_sizes(
    config: PipelineConfig, dit: DiTConfig, shape: WindowShape, vae_name: str, device: torch.device
) -> RunSizes:
    """What a request needs beside the DiT's weights.

    Encoders and VAE are counted at the sizes of the released model of the DiT's width.
    """
    spec = next((scale for scale in SCALES if scale.dit.dim == dit.dim), SCALES[-1])
    size = DTYPE_BYTES[config.model.dtype]
    fused = device.type == "cuda" if config.runtime.fuse is None else config.runtime.fuse
    branches, cached = shape.branches, shape.step_cache != "none"
    ranks = vae_ranks(config, vae_name)
    float8 = config.runtime.quantize != "none"
    return RunSizes(
        vae=tensor_bytes(vae_tensors(spec.vae), size)
        + tensor_bytes(DECODERS.get(config.model.decoder).tensors(spec.vae), size),
        audio_encoder=tensor_bytes(wav2vec_tensors(spec.wav2vec), FLOAT),
        text_encoder=tensor_bytes(text_tensors(spec.text), size),
        held=held_bytes(dit, len({branch.text for branch in branches}), size),
        denoise=denoise_bytes(dit, shape.tokens, size, fused, len(branches), cached, float8),
        coding=tuple(
            coding_bytes(spec.vae.dim, shape.size, size, latents, shape.overlap, vae_name == "fast", ranks)
            for latents in pass_sizes(vae_name)
        ),
    )


def graph_bytes(config: PipelineConfig, dit: DiTConfig, tokens: int) -> int:
    """What the captured forwards of a video's windows keep: activations of `tokens`, two shapes' text."""
    size, runtime = DTYPE_BYTES[config.model.dtype], config.runtime
    own = -(-tokens // runtime.sp_size)
    activations = denoise_bytes(dit, own, size, True, 0, False, runtime.quantize != "none")
    return activations + held_bytes(dit, 2, size)
