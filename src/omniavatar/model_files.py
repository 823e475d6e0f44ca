"""What a configuration says of the DiT's files: which they are, and the dtype they are loaded in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from omniavatar.checkpoint.dit import DiTFiles, LoraFile

if TYPE_CHECKING:
    from omniavatar.config.schema import ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dit_files(model: ModelConfig) -> DiTFiles:
    """The files the configured DiT is merged from."""
    return DiTFiles(
        model.dit_path,
        adapter=model.exp_path,
        loras=[LoraFile(lora.path, lora.strength) for lora in model.loras],
        num_heads=model.dit_config.num_heads,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
    )
