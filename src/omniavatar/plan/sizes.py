"""Bytes that a model and a request need, known before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from omniavatar.accel.decoder import DECODERS, tiny_vae_tensors
from omniavatar.accel.precision import QUANTIZED
from omniavatar.accel.vae_runners import VAES, pass_sizes
from omniavatar.checkpoint.dit_sizes import keep_float32
from omniavatar.checkpoint.layout import SCALES, Shape, dit_tensors, text_tensors, wav2vec_tensors
from omniavatar.checkpoint.layout_vae import vae_tensors
from omniavatar.config.backends import alternatives
from omniavatar.errors import ConfigError
from omniavatar.model.sizes import frames_of_pass

if TYPE_CHECKING:
    from omniavatar.config.schema import PipelineConfig
    from omniavatar.model.sizes import DiTConfig
    from omniavatar.plan.run import WindowShape

GB = 10**9
"""All limits and messages use decimal gigabytes."""
RING = 2
"""Whole blocks on the device beside the resident ones: one computes while the next one arrives."""
TEXT_TOKENS = 512
"""Every prompt is padded to this many tokens."""
FLOAT = 4
"""Bytes of a float32 number."""
SLACK = 1.15
"""Factor on counted activations, for scratch memory and holes in the allocator."""
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of a number, by `model.dtype`."""


@dataclass(frozen=True)
class DiTSizes:
    """Bytes of a DiT's weights.

    - blocks: how many blocks the DiT has.
    - block: one block without `text_layers`; a streamed block brings these bytes to the device.
    - text_layers: one block's layers for keys and values of the text; they are offloaded with the block.
    - outside: everything outside the blocks.
    """

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

    - vae, audio_encoder, text_encoder: weights.
    - held: keys and values of the texts, and of earlier blocks of a block-causal video, kept in every window.
    - denoise: activations of a forward, and a step cache's residuals.
    - coding: activations of the VAE, for each size of its passes, the largest first.
    """

    vae: int
    audio_encoder: int
    text_encoder: int
    held: int
    denoise: int
    coding: tuple[int, ...]


def dit_sizes(config: DiTConfig, dtype_bytes: int, float8: bool) -> DiTSizes:
    """Bytes of a DiT in the form in which it runs; `float8` stands for any 8-bit form."""
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
    """Bytes on one of `ranks` that share the blocks: its part of each block, and RING whole blocks."""
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
    """Bytes of a forward's activations and of a step cache's residuals.

    - tokens: video tokens of one forward.
    - branches: guidance branches. cached: counts a step cache's tensors, one a branch and two more.
    - float8: adds the 8-bit copy of the feed-forward layer's result.
    """
    width, hidden = tokens * config.dim * dtype_bytes, tokens * config.ffn_dim * dtype_bytes
    if float8:
        hidden += tokens * config.ffn_dim
    counted = max(8 * width, 3 * width + hidden) if fused else max(12 * width, 5 * width + 2 * hidden)
    residuals = (branches + 2) * width if cached else 0
    return int(SLACK * counted) + residuals


def held_bytes(config: DiTConfig, texts: int, dtype_bytes: int, frames: int = 0) -> int:
    """Bytes of the keys and values of `texts` prompts, in all blocks.

    frames: latent frames of a window, whose audio tokens take the text's place in some models.
    """
    tokens = config.audio_tokens * frames or TEXT_TOKENS
    return texts * config.num_layers * 2 * tokens * config.dim * dtype_bytes


def coding_bytes(
    channels: int,
    size: tuple[int, int],
    dtype_bytes: int,
    latents: int,
    overlap: int,
    fast: bool,
    ranks: int = 1,
) -> int:
    """Bytes of the VAE's activations: the larger of decoding and of encoding the hand-over.

    The unit of the counts is one frame of the last stage, `height * width * channels` numbers.

    - Decoding (fast): 18 for past frames and 29 for each latent of a pass. Encoding: 20 and 5 for each frame.
    - Measured on an H100: decoding 70 at two latents a pass, 58 on two ranks; encoding 77 and 41; at one
      latent a pass, the larger of both is 47.
    - The scores of one frame's attention are float32 and exist twice.
    - Ranks that share the rows: the largest share counts, with its border. A pass has `ranks` times as many
      latents. Whole on each rank are the portrait that the leader encodes, and three times the pixels of a
      pass in float32.

    Arguments:

    - channels: of the VAE's last stage. size: (height, width) in pixels.
    - latents: of one pass on one rank. overlap: frames of the hand-over.
    - fast: the VAE backend that works in passes.
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


def vae_ranks(config: PipelineConfig, vae_name: str) -> int:
    """How many processes share the VAE's work: all processes of a video, or 1.

    Raises ConfigError if `vae_parallel` is set and they cannot share it.
    """
    runtime = config.runtime
    can = runtime.processes > 1 and VAES.get(vae_name).shares_rows
    can = can and DECODERS.get(config.model.decoder).shares_rows
    if runtime.vae_parallel and not can:
        decoders = ", ".join(each.name for each in DECODERS if each.shares_rows)
        runners = alternatives(each.name for each in VAES if each.shares_rows)
        raise ConfigError(
            f"vae_parallel: needs several processes, vae: {runners} and one of the decoders {decoders}; "
            f"got {runtime.processes}, {vae_name} and {config.model.decoder}; "
            "leave it out to share the VAE when possible"
        )
    return runtime.processes if can and runtime.vae_parallel is not False else 1


def run_sizes(
    config: PipelineConfig, dit: DiTConfig, shape: WindowShape, vae_name: str, device: torch.device
) -> RunSizes:
    """Bytes that a request needs beside the DiT's weights.

    Encoders and VAE have the sizes of the released model that has the DiT's width.
    """
    spec = next((scale for scale in SCALES if scale.dit.dim == dit.dim), SCALES[-1])
    size = DTYPE_BYTES[config.model.dtype]
    fused = config.runtime.fuses(device.type)
    branches, cached = shape.branches, shape.step_cache != "none"
    ranks = vae_ranks(config, vae_name)
    float8 = config.runtime.quantize != "none"
    if config.model.latent_encoder == "taehv":
        coders = tensor_bytes(tiny_vae_tensors(spec.vae), size)
    else:
        coders = tensor_bytes(vae_tensors(spec.vae), size + VAES.get(vae_name).coded_bytes)
        coders += tensor_bytes(DECODERS.get(config.model.decoder).tensors(spec.vae), size)
    contexts = {branch.audio if dit.audio_tokens else branch.text for branch in branches}
    encoded = shape.overlap if shape.chunk is None else shape.window_length
    passes = pass_sizes(vae_name)
    return RunSizes(
        vae=coders,
        audio_encoder=tensor_bytes(wav2vec_tensors(spec.wav2vec), FLOAT),
        text_encoder=tensor_bytes(text_tensors(spec.text), size) if config.family.text else 0,
        held=held_bytes(dit, len(contexts), size, shape.latent_frames)
        + cache_bytes(dit, shape, size)
        + _list_bytes(shape),
        denoise=denoise_bytes(dit, shape.tokens, size, fused, len(branches), cached, float8)
        + order_bytes(dit, shape, size),
        coding=tuple(
            coding_bytes(spec.vae.dim, shape.size, size, latents, encoded, len(passes) > 1, ranks)
            for latents in passes
        ),
    )


def _list_bytes(shape: WindowShape) -> int:
    """Bytes of the lists of kept blocks."""
    if shape.sparsity is None:
        return 0
    from omniavatar.accel.sparse_steps import list_bytes

    return list_bytes(shape.sparsity)


def order_bytes(dit: DiTConfig, shape: WindowShape, dtype_bytes: int) -> int:
    """Bytes of the tokens in their first order, and of audio by token, while blocks run in tile order."""
    return 0 if shape.sparsity is None else 2 * shape.tokens * dit.dim * dtype_bytes


def cache_bytes(dit: DiTConfig, shape: WindowShape, dtype_bytes: int) -> int:
    """Bytes of the keys and values of earlier blocks (`accel.key_value_cache`); 0 for other videos."""
    if shape.causal is None:
        return 0
    return 2 * dit.num_layers * shape.causal.slots * shape.tokens * dit.dim * dtype_bytes


def graph_bytes(config: PipelineConfig, dit: DiTConfig, shape: WindowShape) -> int:
    """Bytes that captured forwards keep: activations, and the text of each captured forward.

    These are two window shapes, or one for each slot that a block-causal video writes over and over.
    """
    size, runtime = DTYPE_BYTES[config.model.dtype], config.runtime
    own = -(-shape.tokens // runtime.sp_size)
    activations = denoise_bytes(dit, own, size, True, 0, False, runtime.quantize != "none")
    captured = 2 if shape.causal is None else shape.causal.rolling + 1
    if shape.sparsity is not None:  # sparse steps are captured apart, in separate memory
        rows = shape.sparsity.table_of[list(shape.sparsity.sparse_steps)]
        captured += 2 * len({row.tobytes() for row in rows})
        activations = 2 * activations + order_bytes(dit, shape, size)
    return activations + held_bytes(dit, captured, size, shape.latent_frames)
