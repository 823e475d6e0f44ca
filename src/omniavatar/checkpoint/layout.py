"""Content of the official weight files: name, shape and dtype of every tensor, for each model size.

Synthetic checkpoints are written from these lists, and tests compare the models with them. The lists do not
use `model/`, so a test notices a renamed layer there.
Sources: the released files of Wan-AI/Wan2.1-T2V-{14B,1.3B} (DiT and VAE float32, UMT5-XXL bfloat16) and
facebook/wav2vec2-base-960h (float32, weight norm as weight_g/weight_v, no masked_spec_embed);
Soul-AILab/SoulX-FlashHead-1_3B (float32) and z-rx/leaptalk (LoRA float32, projector bfloat16). OmniAvatar's
adapter and GAIR/LiveTalk's merged DiT are written as float32; the dtype of these releases is not documented,
and the loader accepts any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from omniavatar.errors import ConfigError
from omniavatar.model.sizes import LATENT_ROWS, WINDOW_ROWS, DiTConfig, VAEConfig

SHARD_BYTES = 10_000_000_000
LORA_LAYERS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
CONV_KERNELS = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)
LATENT_CHANNELS = 16

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TextSpec:
    """Sizes of the UMT5 encoder."""

    vocab: int
    dim: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    dim_attn: int
    num_buckets: int = 32


@dataclass(frozen=True)
class Wav2VecSpec:
    """Sizes of wav2vec 2.0; its front end always has the official kernels and strides."""

    hidden: int
    ffn: int
    num_heads: int
    num_layers: int
    conv_dim: int
    pos_kernel: int
    pos_groups: int
    vocab: int = 32

    @property
    def audio_dim(self) -> int:
        """Width of the vector of one video frame: the last hidden state and all layers + 1 hidden states."""
        return (self.num_layers + 2) * self.hidden


@dataclass(frozen=True)
class ScaleSpec:
    """All sizes of one checkpoint.

    dit: the merged model; the base file has 16 input channels.
    family: see `config.families`.
    merged: folder of a DiT that is released merged, in one file, instead of a base and an adapter.
    """

    name: str
    dit: DiTConfig
    text: TextSpec
    vae: VAEConfig
    wav2vec: Wav2VecSpec
    lora_rank: int
    lora_alpha: int
    merged: str = ""
    family: str = "omniavatar"


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor."""

    key: str
    shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileLayout:
    """One weight file: its path below the root of the checkpoint, and its tensors."""

    path: str
    format: Literal["safetensors", "torch"]
    tensors: tuple[TensorEntry, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


UMT5_XXL = TextSpec(256384, 4096, 10240, 64, 24, 4096)
WAV2VEC_BASE = Wav2VecSpec(768, 3072, 12, 12, 512, 128, 16)
NANO_WAV2VEC = Wav2VecSpec(64, 128, 4, 2, 32, 16, 4)
SCALES: tuple[ScaleSpec, ...] = (
    ScaleSpec(
        "nano",
        DiTConfig(256, 512, 2, 6, text_dim=64, audio_dim=NANO_WAV2VEC.audio_dim),
        TextSpec(384, 64, 128, 4, 2, 64),
        VAEConfig(dim=8),
        NANO_WAV2VEC,
        8,
        4,
    ),
    ScaleSpec("1.3B", DiTConfig(1536, 8960, 12, 30), UMT5_XXL, VAEConfig(), WAV2VEC_BASE, 128, 64),
    ScaleSpec("14B", DiTConfig(5120, 13824, 40, 40), UMT5_XXL, VAEConfig(), WAV2VEC_BASE, 128, 64),
)


AUDIO_TOKENS, AUDIO_TOKENS_HIDDEN = 32, 512
"""Of FlashHead: tokens a latent frame, and the width of its audio projector."""
NANO_TOKENS_HIDDEN = 40
IN_CHANNELS = 32
"""Of FlashHead: noise and portrait, without a mask."""
TOKEN_FAMILIES = ("flashhead", "leaptalk")
FLASHHEAD = "SoulX-FlashHead-1_3B"
"""Folder of FlashHead below the root, and its repository's name."""


def scale_spec(name: str, family: str = "omniavatar") -> ScaleSpec:
    """The sizes of the model size `name` in a family. Raises ConfigError if it is unknown."""
    for spec in SCALES:
        if spec.name == name:
            return spec if family not in TOKEN_FAMILIES else _with_tokens(spec, family)
    raise ConfigError(f"scale: {name!r} is unknown; choose one of {', '.join(spec.name for spec in SCALES)}")


def _with_tokens(spec: ScaleSpec, family: str) -> ScaleSpec:
    """The sizes of a FlashHead or a LeapTalk as large as `spec`."""
    released = spec.name != "nano"
    dit = replace(
        spec.dit,
        in_dim=IN_CHANNELS,
        audio_dim=spec.wav2vec.num_layers * spec.wav2vec.hidden,
        audio_hidden=AUDIO_TOKENS_HIDDEN if released else NANO_TOKENS_HIDDEN,
        audio_tokens=AUDIO_TOKENS,
    )
    return replace(
        spec, dit=dit, lora_rank=64 if released else 8, lora_alpha=64 if released else 12, family=family
    )


MERGED = {"livetalk": ("1.3B", "LiveTalk-1.3B-V0.1"), "livetalk-nano": ("nano", "LiveTalk-nano")}
"""Checkpoints with a merged DiT: the model size, and the folder of the DiT."""


def checkpoint_spec(name: str) -> ScaleSpec:
    """The sizes of the checkpoint `name`: a model size, one of `MERGED`, or one of `TOKEN_FAMILIES`.

    Raises ConfigError.
    """
    family = name.removesuffix("-nano")
    if family in TOKEN_FAMILIES:
        return scale_spec("1.3B" if name == family else "nano", family)
    scale, folder = MERGED.get(name, (name, ""))
    return replace(scale_spec(scale), merged=folder)


def merged_name(dit_paths: Sequence[Path]) -> str | None:
    """The checkpoint of `MERGED` whose folder holds the DiT's files; None if there is none."""
    folders = {path.parent.name for path in dit_paths}
    return next((name for name, (_, folder) in MERGED.items() if folder in folders), None)


def _linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _conv(name: str, outputs: int, inputs: int, *kernel: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs, *kernel)
    yield f"{name}.bias", (outputs,)


def dit_tensors(config: DiTConfig) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of a DiT with plain Wan names; with audio layers if `audio_dim` is not 0."""
    dim, patch = config.dim, config.patch_size
    yield from _conv("patch_embedding", dim, config.in_dim, *patch)
    if not config.audio_tokens:
        yield from _text_embedding(config)
    yield from _linear("time_embedding.0", dim, config.freq_dim)
    yield from _linear("time_embedding.2", dim, dim)
    yield from _linear("time_projection.1", 6 * dim, dim)
    for block in range(config.num_layers):
        prefix = f"blocks.{block}"
        yield f"{prefix}.modulation", (1, 6, dim)
        for attention in ("self_attn", "cross_attn"):
            for layer in "qkvo":
                yield from _linear(f"{prefix}.{attention}.{layer}", dim, dim)
            for norm in ("norm_q", "norm_k"):
                yield f"{prefix}.{attention}.{norm}.weight", (dim,)
        yield f"{prefix}.norm3.weight", (dim,)
        yield f"{prefix}.norm3.bias", (dim,)
        yield from _linear(f"{prefix}.ffn.0", config.ffn_dim, dim)
        yield from _linear(f"{prefix}.ffn.2", dim, config.ffn_dim)
    yield "head.modulation", (1, 2, dim)
    yield from _linear("head.head", config.out_dim * math.prod(patch), dim)
    yield from _audio_tensors(config)


def _text_embedding(config: DiTConfig) -> Iterator[tuple[str, Shape]]:
    yield from _linear("text_embedding.0", config.dim, config.text_dim)
    yield from _linear("text_embedding.2", config.dim, config.dim)


def flashhead_tensors(config: DiTConfig, speech_width: int) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of FlashHead's file, with the layers that its code never uses.

    speech_width: of wav2vec 2.0's hidden states.
    """
    yield from dit_tensors(config)
    yield from _text_embedding(config)
    yield from _norm("audio_emb.proj.0", speech_width)
    yield from _linear("audio_emb.proj.1", speech_width, speech_width)
    yield from _linear("audio_emb.proj.3", config.dim, speech_width)
    yield from _norm("audio_emb.proj.4", config.dim)


def leaptalk_lora_tensors(config: DiTConfig, rank: int) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of LeapTalk's LoRA, as peft writes them."""
    for block in range(config.num_layers):
        for layer in ("self_attn", "cross_attn"):
            for name in "qkvo":
                for key, shape in _pair(f"blocks.{block}.{layer}.{name}", config.dim, config.dim, rank):
                    yield f"base_model.model.{key.replace('.default', '')}", shape


def _audio_tensors(config: DiTConfig) -> Iterator[tuple[str, Shape]]:
    if config.audio_tokens:
        dim, hidden, tokens = config.dim, config.audio_hidden, config.audio_tokens
        yield from _linear("audio_proj.proj1", hidden, WINDOW_ROWS * config.audio_dim)
        yield from _linear("audio_proj.proj1_vf", hidden, LATENT_ROWS * config.audio_dim)
        yield from _linear("audio_proj.proj2", hidden, hidden)
        yield from _linear("audio_proj.proj3", tokens * dim, hidden)
        yield from _norm("audio_proj.norm", dim)
    elif config.audio_dim:
        yield from _linear("audio_proj.proj", config.audio_hidden, 4 * config.audio_dim)
        yield "audio_proj.norm_out.weight", (config.audio_hidden,)
        yield "audio_proj.norm_out.bias", (config.audio_hidden,)
        for number in range(config.num_layers // 2 - 1):
            yield from _linear(f"audio_cond_projs.{number}", config.dim, config.audio_hidden)


def adapter_tensors(config: DiTConfig, rank: int) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of OmniAvatar's `pytorch_model.pt`: LoRA pairs, patch embedding, audio layers."""
    dim = config.dim
    for block in range(config.num_layers):
        for layer in ("self_attn", "cross_attn"):
            for name in "qkvo":
                yield from _pair(f"blocks.{block}.{layer}.{name}", dim, dim, rank)
        yield from _pair(f"blocks.{block}.ffn.0", config.ffn_dim, dim, rank)
        yield from _pair(f"blocks.{block}.ffn.2", dim, config.ffn_dim, rank)
    yield from _conv("patch_embedding", dim, config.in_dim, *config.patch_size)
    yield from _audio_tensors(config)


def _pair(layer: str, outputs: int, inputs: int, rank: int) -> Iterator[tuple[str, Shape]]:
    yield f"{layer}.lora_A.default.weight", (rank, inputs)
    yield f"{layer}.lora_B.default.weight", (outputs, rank)


def text_tensors(spec: TextSpec) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of `models_t5_umt5-xxl-enc-bf16.pth`."""
    yield "token_embedding.weight", (spec.vocab, spec.dim)
    for block in range(spec.num_layers):
        prefix = f"blocks.{block}"
        yield f"{prefix}.norm1.weight", (spec.dim,)
        for name in "qkv":
            yield f"{prefix}.attn.{name}.weight", (spec.dim_attn, spec.dim)
        yield f"{prefix}.attn.o.weight", (spec.dim, spec.dim_attn)
        yield f"{prefix}.norm2.weight", (spec.dim,)
        yield f"{prefix}.ffn.gate.0.weight", (spec.dim_ffn, spec.dim)
        yield f"{prefix}.ffn.fc1.weight", (spec.dim_ffn, spec.dim)
        yield f"{prefix}.ffn.fc2.weight", (spec.dim, spec.dim_ffn)
        yield f"{prefix}.pos_embedding.embedding.weight", (spec.num_buckets, spec.num_heads)
    yield "norm.weight", (spec.dim,)


def wav2vec_tensors(spec: Wav2VecSpec) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of wav2vec2-base-960h, a CTC model with the prefix `wav2vec2.` and an `lm_head`."""
    front, body = "wav2vec2.feature_extractor.conv_layers", "wav2vec2.encoder"
    for number, kernel in enumerate(CONV_KERNELS):
        yield f"{front}.{number}.conv.weight", (spec.conv_dim, spec.conv_dim if number else 1, kernel)
    yield from _norm(f"{front}.0.layer_norm", spec.conv_dim)
    yield from _norm("wav2vec2.feature_projection.layer_norm", spec.conv_dim)
    yield from _linear("wav2vec2.feature_projection.projection", spec.hidden, spec.conv_dim)
    yield f"{body}.pos_conv_embed.conv.bias", (spec.hidden,)
    yield f"{body}.pos_conv_embed.conv.weight_g", (1, 1, spec.pos_kernel)
    yield (
        f"{body}.pos_conv_embed.conv.weight_v",
        (spec.hidden, spec.hidden // spec.pos_groups, spec.pos_kernel),
    )
    yield from _norm(f"{body}.layer_norm", spec.hidden)
    for number in range(spec.num_layers):
        prefix = f"{body}.layers.{number}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{prefix}.attention.{name}", spec.hidden, spec.hidden)
        yield from _norm(f"{prefix}.layer_norm", spec.hidden)
        yield from _linear(f"{prefix}.feed_forward.intermediate_dense", spec.ffn, spec.hidden)
        yield from _linear(f"{prefix}.feed_forward.output_dense", spec.hidden, spec.ffn)
        yield from _norm(f"{prefix}.final_layer_norm", spec.hidden)
    yield from _linear("lm_head", spec.vocab, spec.hidden)


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)
