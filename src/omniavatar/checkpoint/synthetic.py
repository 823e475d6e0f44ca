"""Writes a checkpoint with random weights in the official layout: names, shapes, dtypes, shards, side files.

Tests, demos, timings and memory measurements use it. The side files (configurations, tokenizer) work like
real ones: AutoTokenizer reads the tokenizer folder. Its vocabulary is all bytes and a few common pieces of
English; T5's special tokens have T5's ids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omniavatar.checkpoint.layout import (
    CONV_KERNELS,
    CONV_STRIDES,
    LATENT_CHANNELS,
    LORA_LAYERS,
    SHARD_BYTES,
    TOKEN_FAMILIES,
    FileLayout,
    ScaleSpec,
    Wav2VecSpec,
    checkpoint_spec,
)
from omniavatar.checkpoint.layout_families import side_files
from omniavatar.checkpoint.layout_files import (
    DIT_STEM,
    TOKENIZER,
    WAV2VEC,
    adapter_folder,
    base_folder,
    checkpoint_layout,
)
from omniavatar.checkpoint.tensor_writer import Progress, byte_counter, write_random
from omniavatar.device import free_disk
from omniavatar.errors import OutputError
from omniavatar.types import bytes_text

SIDE_FILES_BYTES = 10_000_000

_PIECES = (
    *("the", "and", "ing", "of", "to", "in", "is", "with", "that", "was", "for", "on", "his", "her", "are"),
    *("as", "at", "be", "this", "have", "from", "an", "er", "ed", "es", "ly", "ion", "th", "en", "re", "st"),
    *("person", "man", "woman", "speak", "talk", "head", "hand", "camera", "face", "smile", "light", "look"),
)


def make_checkpoint(
    scale: str,
    out: Path,
    seed: int = 0,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the checkpoint of `scale` ('nano', '14B', 'flashhead-nano', ...) below `out` and return `out`.

    The same seed gives the same bytes.

    progress: called with (bytes written, total bytes).
    shard_bytes: limit of the size of a file of the base model.

    Raises ConfigError for an unknown scale, OutputError if the disk is too small or read-only.
    """
    spec = checkpoint_spec(scale)
    layouts = checkpoint_layout(spec, shard_bytes)
    total = sum(layout.num_bytes for layout in layouts)
    require_space(out, total + SIDE_FILES_BYTES, f"the synthetic {scale} checkpoint")
    on_bytes = byte_counter(progress, total)
    try:
        for layout in layouts:
            write_random(out, layout, seed, on_bytes)
        _write_side_files(out, spec, layouts)
    except OSError as error:
        raise OutputError(
            f"{out}: cannot write the checkpoint ({error.strerror or error}); check the disk and permissions"
        ) from error
    return out


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise OutputError unless the disk of `folder` has `needed` free bytes; `folder` may not exist yet."""
    free = free_disk(folder)
    if free < needed:
        raise OutputError(
            f"{folder}: {what} needs {bytes_text(needed)}, but the disk has {bytes_text(free)} free; "
            "free some space or choose another disk"
        )


def _write_side_files(out: Path, spec: ScaleSpec, layouts: Sequence[FileLayout]) -> None:
    _write_wav2vec(out / WAV2VEC, spec.wav2vec)
    if spec.family in TOKEN_FAMILIES:
        for path, content in side_files(spec).items():
            _write_json(out / path, content)
        return
    base = out / base_folder(spec)
    if not spec.merged:
        _write_json(base / "config.json", _base_config(spec))
    shards = [layout for layout in layouts if f"/{DIT_STEM}" in layout.path]
    if len(shards) > 1:
        names = {entry.key: Path(shard.path).name for shard in shards for entry in shard.tensors}
        index = {
            "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
            "weight_map": dict(sorted(names.items())),
        }
        _write_json(base / f"{DIT_STEM}.safetensors.index.json", index)
    if not spec.merged:
        _write_json(out / adapter_folder(spec) / "config.json", _adapter_config(spec))
    _write_tokenizer(base / TOKENIZER, spec.text.vocab)


def _write_wav2vec(folder: Path, spec: Wav2VecSpec) -> None:
    _write_json(folder / "config.json", wav2vec_config(spec))
    _write_json(
        folder / "preprocessor_config.json",
        {
            "do_normalize": True,
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": False,
            "sampling_rate": 16000,
        },
    )


def _base_config(spec: ScaleSpec) -> dict[str, Any]:
    return {
        "_class_name": "WanModel",
        "dim": spec.dit.dim,
        "eps": spec.dit.eps,
        "ffn_dim": spec.dit.ffn_dim,
        "freq_dim": spec.dit.freq_dim,
        "in_dim": LATENT_CHANNELS,
        "model_type": "t2v",
        "num_heads": spec.dit.num_heads,
        "num_layers": spec.dit.num_layers,
        "out_dim": spec.dit.out_dim,
        "text_len": 512,
    }


def _adapter_config(spec: ScaleSpec) -> dict[str, Any]:
    return {
        "model_config": {"in_dim": spec.dit.in_dim, "audio_hidden_size": spec.dit.audio_hidden},
        "train_architecture": "lora",
        "use_audio": True,
        "i2v": True,
        "random_prefix_frames": True,
        "lora_rank": spec.lora_rank,
        "lora_alpha": spec.lora_alpha,
        "lora_target_modules": ",".join(LORA_LAYERS),
        "init_lora_weights": "kaiming",
    }


def wav2vec_config(spec: Wav2VecSpec) -> dict[str, Any]:
    """Content of `config.json` in the wav2vec folder."""
    return {
        "architectures": ["Wav2Vec2ForCTC"],
        "model_type": "wav2vec2",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
        "conv_bias": False,
        "conv_dim": [spec.conv_dim] * len(CONV_KERNELS),
        "conv_kernel": list(CONV_KERNELS),
        "conv_stride": list(CONV_STRIDES),
        "num_feat_extract_layers": len(CONV_KERNELS),
        "num_conv_pos_embeddings": spec.pos_kernel,
        "num_conv_pos_embedding_groups": spec.pos_groups,
        "feat_extract_norm": "group",
        "feat_extract_activation": "gelu",
        "do_stable_layer_norm": False,
        "vocab_size": spec.vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _write_tokenizer(folder: Path, vocab_limit: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteFallback, Fuse, Metaspace, Sequence
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace as MetaspaceSplit
    from tokenizers.processors import TemplateProcessing

    special = ["<pad>", "</s>", "<unk>"]
    vocab = [(token, 0.0) for token in special]
    vocab += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocab += [("▁", -4.0), *((chr(letter), -6.0) for letter in range(ord("a"), ord("z") + 1))]
    vocab += [(piece, -7.0) for piece in _PIECES]
    tokenizer = Tokenizer(Unigram(vocab[:vocab_limit], unk_id=2, byte_fallback=True))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = MetaspaceSplit(prepend_scheme="always")
    tokenizer.decoder = Sequence([ByteFallback(), Metaspace(prepend_scheme="always"), Fuse()])
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    _write_json(folder / "special_tokens_map.json", names)
    _write_json(
        folder / "tokenizer_config.json",
        {**names, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512},
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
