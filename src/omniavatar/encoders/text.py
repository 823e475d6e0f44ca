"""Computes prompt embeddings with the UMT5 encoder of Wan 2.1, through transformers.

`library_key` maps the tensor names of Wan's file to those of transformers. Sizes come from the file. As in
UMT5 (Chung et al. 2023), each layer has its own table of relative positions, 32 buckets up to distance 128,
and attention scores are not scaled. Padding is not computed: no token attends to it, and its embeddings are
zero by definition.

If 11 GB of weights do not fit on the device, they stay in host memory and each layer moves to the device
while it runs (`layer_by_layer`). The embeddings are bit-identical; the run takes some seconds longer.

Limits: attention computes all scores (64 heads x 512 x 512), which is little memory beside the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from omniavatar.checkpoint.dit_sizes import count_blocks
from omniavatar.checkpoint.initial import fill_random
from omniavatar.checkpoint.outside import fitting
from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.checkpoint.strict import file_sources, load_strict
from omniavatar.encoders.tokens import (
    TEXT_TOKENS,
    ByteTokenizer,
    FolderTokenizer,
    Tokenizer,
    clean_prompt,
    warn_of_cuts,
)
from omniavatar.errors import CheckpointError

if TYPE_CHECKING:
    from transformers.models.umt5.modeling_umt5 import UMT5Stack

MAX_DISTANCE = 128
REMEDY = "use Wan's models_t5_umt5-xxl-enc-bf16.pth or a file like it"
WHOLE_MODEL_KEYS = {"token_embedding.weight": "embed_tokens.weight", "norm.weight": "final_layer_norm.weight"}
BLOCK_KEYS = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
UMT5_XXL: Mapping[str, int] = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32,
}  # fmt: skip


def library_key(key: str) -> str:
    """The name in transformers' UMT5 encoder stack of a key in the released file; others are kept."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if block and block[2] in BLOCK_KEYS:
        return f"block.{block[1]}.{BLOCK_KEYS[block[2]]}"
    return WHOLE_MODEL_KEYS.get(key, key)


def sizes_of(shapes: Mapping[str, tuple[int, ...]], source: str) -> dict[str, int]:
    """The sizes of the encoder (fields of `UMT5Config`), from the shapes of the tensors in its file.

    Raises `CheckpointError` that names a tensor missing in `source`.
    """
    try:
        vocabulary, width = shapes["token_embedding.weight"]
        attention_width, _ = shapes["blocks.0.attn.q.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        hidden, _ = shapes["blocks.0.ffn.fc1.weight"]
    except KeyError as error:
        raise CheckpointError(f"{source}: has no tensor {error}; {REMEDY}") from error
    except ValueError:
        raise CheckpointError(f"{source}: its matrices do not have two axes; {REMEDY}") from None
    if not vocabulary or not width or not hidden or not heads or attention_width < heads:
        raise CheckpointError(f"{source}: has matrices without rows or columns; {REMEDY}")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": attention_width // heads,
        "d_ff": hidden,
        "num_layers": count_blocks(shapes, source),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


class TextEncoder:
    """UMT5 that computes on `device`. Embeddings have the dtype of the weights.

    stack: on the device, or in host memory with layers that move to the device while they run.
    """

    def __init__(self, stack: UMT5Stack, tokenizer: Tokenizer, device: torch.device | str) -> None:
        self.stack, self.tokenizer = stack, tokenizer
        self.width: int = stack.config.d_model
        self._device = torch.device(device)

    @classmethod
    def load(
        cls,
        encoder_path: Path,
        tokenizer_path: Path,
        device: torch.device | str,
        dtype: torch.dtype = torch.bfloat16,
        layer_by_layer: bool = False,
    ) -> TextEncoder:
        """The encoder from its released file and tokenizer folder; every key must be used once.

        layer_by_layer: the weights stay in host memory.

        Raises `CheckpointError` if a file is missing or does not fit.
        """
        tokenizer = FolderTokenizer(Path(tokenizer_path))
        with TensorFiles(encoder_path) as files:
            shapes = {key: files.shape(key) for key in files.keys()}  # noqa: SIM118  (not a dict)
            with fitting(files.origin, REMEDY):
                stack = _stack(sizes_of(shapes, files.origin))
            sources = file_sources(files, library_key)
            home = "cpu" if layer_by_layer else device
            load_strict(stack, sources, dtype=dtype, device=home, origin=files.origin)
        return cls(_frozen(stack, torch.device(device), layer_by_layer), tokenizer, device)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embeddings (n, 512, width) of n prompts, in the dtype of the weights; zero after the text.

        Each prompt runs alone, so its embedding does not depend on the others. A prompt of more than 512
        tokens is truncated, with a warning in the log.
        """
        texts = [clean_prompt(prompt) for prompt in prompts]
        tokens = self.tokenizer(texts, TEXT_TOKENS)
        warn_of_cuts(texts, tokens)
        rows = zip(tokens.ids.split(1), tokens.mask.split(1), strict=True)
        return torch.cat([self.encode_tokens(ids, mask) for ids, mask in rows])

    @torch.inference_mode()
    def encode_tokens(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, length, width) of tokens; zero where `mask` is 0.

        ids: (n, length).
        mask: (n, length), 1 for the tokens of a row, which come first, and 0 for its padding.
        """
        largest, known = int(ids.max()), self.stack.config.vocab_size
        if largest >= known:
            raise CheckpointError(
                f"text encoder: knows {known} tokens, the tokenizer gave token {largest}; "
                "use the tokenizer folder that belongs to the text encoder"
            )
        longest = int(mask.sum(1).max())
        rows = self.stack.embed_tokens(ids[:, :longest].to(self.stack.embed_tokens.weight.device))
        mask = mask.to(self._device)
        hidden = self.stack(
            inputs_embeds=rows.to(self._device), attention_mask=mask[:, :longest]
        ).last_hidden_state
        embeddings = hidden.new_zeros(*ids.shape, self.width)
        embeddings[:, :longest] = hidden * mask[:, :longest, None].to(hidden.dtype)
        return embeddings


def random_text_encoder(
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    sizes: Mapping[str, int] = UMT5_XXL,
    layer_by_layer: bool = False,
) -> TextEncoder:
    """An encoder with random weights, made on the device without files; it uses `ByteTokenizer`.

    The numbers depend on seed, device and dtype. Queries are small, since UMT5 does not scale its scores.

    sizes: as from `sizes_of`; the vocabulary must have at least 259 entries.
    layer_by_layer: each weight moves to host memory after it is made.
    """
    stack = _stack(sizes)
    move_to = "cpu" if layer_by_layer else None
    fill_random(stack, dtype=dtype, device=device, seed=seed, move_to=move_to)
    for block in stack.block:
        block.layer[0].SelfAttention.q.weight.mul_(sizes["d_kv"] ** -0.5)
    return TextEncoder(_frozen(stack, torch.device(device), layer_by_layer), ByteTokenizer(), device)


def _stack(sizes: Mapping[str, int]) -> UMT5Stack:
    from transformers import UMT5Config, UMT5EncoderModel

    settings: Any = dict(sizes)
    config = UMT5Config(
        **settings,
        relative_attention_max_distance=MAX_DISTANCE,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        return UMT5EncoderModel(config).encoder


def _frozen(stack: UMT5Stack, device: torch.device, layer_by_layer: bool) -> UMT5Stack:
    if layer_by_layer:
        stack.final_layer_norm.to(device)
        for block in stack.block:
            _run_on_device(block, device)
    return stack.eval().requires_grad_(False)


def _run_on_device(layer: nn.Module, device: torch.device) -> None:
    """Keep the weights of a layer on `device` only while it computes."""
    host_data = {parameter: parameter.data for parameter in layer.parameters()}

    def copy_to_device(*_: object) -> None:
        for parameter, data in host_data.items():
            parameter.data = data.to(device, copy=True)

    def restore(*_: object) -> None:
        for parameter, data in host_data.items():
            parameter.data = data

    layer.register_forward_pre_hook(copy_to_device)
    layer.register_forward_hook(restore, always_call=True)
