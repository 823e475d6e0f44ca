"""Facts about weights without loading them: sizes from file headers, TeaCache's time projections.

A plan is made before a run, often on a machine without the weights. Then the sizes are those of the
configured scale, or of the scale that the file names mention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omniavatar.checkpoint.dit_sizes import FAMILY_KEY, family_name, inspect_dit
from omniavatar.checkpoint.layout import FLASHHEAD, TOKEN_FAMILIES, ScaleSpec, scale_spec
from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.config.change import with_family as changed_family
from omniavatar.config.families import family_of
from omniavatar.config.schema import ModelConfig, PipelineConfig
from omniavatar.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import numpy as np

    from omniavatar.model.sizes import DiTConfig

WEIGHT_FIELDS = (
    "dit_path",
    "vae_path",
    "decoder_path",
    "text_encoder_path",
    "tokenizer_path",
    "wav2vec_path",
    "exp_path",
    "audio_proj_path",
)
"""Fields of `ModelConfig` that name files or folders of weights; LoRAs are apart."""


def files_exist(model: ModelConfig) -> bool:
    """Whether the DiT is read from files and all of them exist."""
    return model.weights == "files" and bool(model.dit_path) and all(path.exists() for path in model.dit_path)


def weight_paths(model: ModelConfig) -> list[Path]:
    """All configured files and folders of the models; none for random weights."""
    if model.weights == "random":
        return []
    values = {name: getattr(model, name) for name in WEIGHT_FIELDS} | {
        "tokenizer_path": model.tokenizer_folder
    }
    if not family_of(model.family).text:
        values |= {"text_encoder_path": None, "tokenizer_path": None}
    paths = (*values.pop("dit_path"), *values.values(), *(lora.path for lora in model.loras))
    return [path for path in paths if path is not None]


def missing_files(model: ModelConfig) -> list[Path]:
    """Configured files and folders that do not exist; none for random weights."""
    return [path for path in weight_paths(model) if not path.exists()]


def with_family(config: PipelineConfig) -> PipelineConfig:
    """`config` with the family that the DiT's keys tell, and that family's settings where none are given.

    A configuration of OmniAvatar is returned as it is. If the files are not on this disk, the name of their
    folder tells the family.

    Raises ConfigError if the settings do not fit the family, CheckpointError if the weights are of another
    one or broken.
    """
    model = config.model
    found, stated = "omniavatar", None
    if files_exist(model):
        with TensorFiles(model.dit_path) as files:
            found = family_name(files, model.audio_proj_path is not None)
            stated = files.metadata.get(FAMILY_KEY)
    elif model.weights == "files" and any(FLASHHEAD in path.parts for path in model.dit_path):
        found = "flashhead" if model.audio_proj_path is None else "leaptalk"
    elif model.family != "auto":
        found = model.family
    if model.family != "auto" and model.family != found:
        same_keys = {model.family, found} == set(TOKEN_FAMILIES)
        told_by = "header" if same_keys else "keys"
        if not same_keys or (stated == found and model.audio_proj_path is None):
            raise CheckpointError(
                f"{model.dit_path[0]}: has the {told_by} of {found}, but family is {model.family}; "
                "leave family out"
            )
        if model.audio_proj_path is None:
            raise ConfigError(
                f"family: {model.dit_path[0]} is FlashHead's, and LeapTalk's projector and LoRA are not "
                "given; set audio_proj_path and loras, or leave family out"
            )
        found = model.family
    return changed_family(config, found)


def model_spec(model: ModelConfig, scale: str | None = None) -> ScaleSpec:
    """The sizes of the configured scale, or of `scale`, in the model's family."""
    return scale_spec(scale or model.scale, family_of(model.family).name)


def find_dit_config(model: ModelConfig) -> tuple[DiTConfig, str | None]:
    """The DiT's sizes and the assumed scale; the scale is None if the sizes come from the files.

    Raises CheckpointError if the files are broken.
    """
    if files_exist(model):
        exp = model.exp_path if model.exp_path is not None and model.exp_path.exists() else None
        return inspect_dit(model.dit_path, adapter_dir=exp, num_heads=model.dit_config.num_heads), None
    scale = assumed_scale(model)
    return model_spec(model, scale).dit, scale


def assumed_scale(model: ModelConfig) -> str:
    """The configured scale, else the scale that the DiT's file names mention, else 14B (the largest)."""
    if model.scale != "auto":
        return model.scale
    names = " ".join(str(path) for path in model.dit_path)
    largest = "14B" if family_of(model.family).text else "1.3B"
    return next((scale for scale in ("nano", "1.3B", "14B") if scale in names), largest)


def time_projections(model: ModelConfig, config: DiTConfig, timesteps: Sequence[float]) -> np.ndarray:
    """Time projections (steps, 6, dim) float32 of the base DiT, which decide TeaCache's plan.

    Reads six small tensors. Ignores LoRAs that change the time embedding. Raises CheckpointError if the files
    lack the tensors.
    """
    import torch

    from omniavatar.model.dit import WanDiT

    with torch.device("meta"):
        dit = WanDiT(
            replace(config, num_layers=0, audio_dim=0), torch.nn.functional.scaled_dot_product_attention
        )
    names = [name for name in dit.state_dict() if name.startswith(("time_embedding.", "time_projection."))]
    with TensorFiles(model.dit_path) as files:
        tensors = {name: files.load(name).float() for name in names}
    dit.load_state_dict(tensors, strict=False, assign=True)
    with torch.inference_mode():
        return dit.embed_time(torch.tensor(timesteps, dtype=torch.float32))[1].numpy()


def read_dit_config(model: ModelConfig) -> DiTConfig:
    """The DiT's sizes from file headers. Raises CheckpointError if they differ from the configuration."""
    if model.weights == "random":
        return model_spec(model).dit
    family = family_of(model.family)
    absent = next((path for path in model.dit_path if not path.exists()), None)
    if absent is not None and not family.text:
        raise CheckpointError(
            f"{absent}: weight file not found; run `omniavatar download {family.name}`, or correct the path"
        )
    found = inspect_dit(model.dit_path, adapter_dir=model.exp_path, num_heads=model.dit_config.num_heads)
    if found.audio_tokens:
        return found
    if found.in_dim != model.dit_config.in_dim:
        remedy = "set exp_path to the OmniAvatar folder" if found.in_dim == 16 else "set model_config.in_dim"
        raise CheckpointError(
            f"{model.dit_path[0]}: patch embedding with {found.in_dim} input channels, "
            f"{model.dit_config.in_dim} expected; {remedy}"
        )
    if found.audio_dim and found.audio_hidden != model.dit_config.audio_hidden_size:
        raise CheckpointError(
            f"{model.exp_path or model.dit_path[0]}: audio packed to {found.audio_hidden} channels, "
            f"model_config.audio_hidden_size says {model.dit_config.audio_hidden_size}; correct it"
        )
    if bool(found.audio_dim) != model.use_audio:
        has = "has" if found.audio_dim else "has no"
        raise CheckpointError(
            f"{model.exp_path or model.dit_path[0]}: the checkpoint {has} audio layers, "
            f"but use_audio is {model.use_audio}; correct use_audio or exp_path"
        )
    return found
