"""The model section of the configuration: weight files and their precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from omniavatar.config.backends import alternatives, backend_name, registry
from omniavatar.config.families import family_of
from omniavatar.config.values import (
    FieldError,
    FilePath,
    FilePaths,
    Flag,
    Real,
    Section,
    Whole,
    dtype_name,
    lora_entry,
    scale_name,
)
from omniavatar.errors import ConfigError


class DitOverrides(Section):
    """Sizes of the DiT that `config.json` states; the other sizes are read from the weights."""

    in_dim: Whole = Field(33, ge=16)
    """Input channels of the patch embedding: 16 noise + 16 portrait + 1 mask."""
    num_heads: Whole | None = Field(None, ge=1)
    """Attention heads; unset: width / 128."""
    audio_hidden_size: Whole = Field(32, ge=1)
    """Width between the audio packing and the audio projections of the blocks."""


class LoraSetting(Section):
    """An additional LoRA that is merged into the DiT."""

    path: FilePath
    """The LoRA file (.safetensors, .pt)."""
    strength: Real = 1.0
    """Factor on the weight differences of the LoRA."""


class ModelConfig(Section):
    """Weights and their precision."""

    family: Annotated[str, BeforeValidator(backend_name("model.family"))] = "auto"
    """The kind of model: omniavatar, flashhead or leaptalk; auto: by the keys of the DiT's file."""
    dit_path: FilePaths = ()
    """Base DiT, one file or all shards: a list, a comma-separated text or a pattern."""
    vae_path: FilePath | None = None
    """Wan 2.1 VAE (`Wan2.1_VAE.pth`)."""
    decoder: Annotated[str, BeforeValidator(backend_name("model.decoder"))] = "full"
    """Decoder from latents to pixels: full is the VAE's own; the others are smaller, faster and softer."""
    decoder_path: FilePath | None = None
    """File of the smaller decoder (`lightvaew2_1.pth`, `taew2_1.pth`, `lighttaew2_1.pth`)."""
    latent_encoder: Literal["full", "taehv"] = "full"
    """Encoder from pixels to latents: full is the VAE's own; taehv is that of the decoder's file, so no VAE
    is loaded (flashhead and leaptalk only)."""
    text_encoder_path: FilePath | None = None
    """UMT5-XXL encoder (`models_t5_umt5-xxl-enc-bf16.pth`)."""
    tokenizer_path: FilePath | None = None
    """Tokenizer folder; unset: `google/umt5-xxl` beside the text encoder."""
    wav2vec_path: FilePath | None = None
    """wav2vec 2.0 folder (`wav2vec2-base-960h`)."""
    exp_path: FilePath | None = None
    """OmniAvatar folder with `pytorch_model.pt` and `config.json`; unset: the DiT file is already merged."""
    audio_proj_path: FilePath | None = None
    """File with another audio projector for a FlashHead DiT (`audio_proj_step_*.pt` of LeapTalk)."""
    loras: tuple[Annotated[LoraSetting, BeforeValidator(lora_entry)], ...] = ()
    """Additional LoRAs, merged in float32: a list of {path, strength}."""
    weights: Literal["files", "random"] = "files"
    """files: load the weight files. random: make random weights of `scale` on the device (speed tests)."""
    scale: Annotated[Literal["auto", "nano", "1.3B", "14B"], BeforeValidator(scale_name)] = "auto"
    """Model size; required for random weights, otherwise read from the files."""
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], BeforeValidator(dtype_name)] = "bf16"
    """Precision of the weights; sample, timestep and time embedding stay float32."""
    dit_config: DitOverrides = DitOverrides()
    """Sizes of the DiT (key `model_config` in the checkpoint's config.json)."""
    lora_rank: Whole | None = Field(None, ge=1)
    """Rank of the OmniAvatar LoRA; unset: read from the file."""
    lora_alpha: Real | None = Field(None, gt=0)
    """Alpha of the OmniAvatar LoRA, whose factor is alpha / rank; unset: factor 1."""
    use_audio: Flag = True
    """Whether the checkpoint has audio layers."""
    input_limits: FilePath | None = None
    """File with the range of portraits and sounds that the model was trained for
    (`training/input_limits.py`); inputs outside it cause a warning. Unset: no check."""

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer; None if neither the tokenizer nor the text encoder has a path."""
        if self.tokenizer_path is not None or self.text_encoder_path is None:
            return self.tokenizer_path
        return self.text_encoder_path.parent / "google" / "umt5-xxl"

    def check_files_named(self) -> None:
        """Raise `ConfigError` if a path that `weights: files` needs is not set."""
        if self.weights == "random":
            return
        decoder = () if registry("model.decoder").get(self.decoder).file is None else ("decoder_path",)
        vae = () if self.latent_encoder == "taehv" else ("vae_path",)
        text = ("text_encoder_path",) if family_of(self.family).text else ()
        needed = ("dit_path", *vae, *decoder, *text, "wav2vec_path")
        missing = [name for name in needed if not getattr(self, name)]
        if missing:
            raise ConfigError(
                f"model: {', '.join(missing)} not set; set these paths in the config, "
                "or use weights: random with a scale to run without files"
            )

    @model_validator(mode="after")
    def _combinations(self) -> ModelConfig:
        if self.decoder_path is not None:
            decoders = registry("model.decoder")
            if decoders.get(self.decoder).file is None:
                others = alternatives(each.name for each in decoders if each.file is not None)
                raise FieldError(
                    f"has no effect with decoder: {self.decoder}; set decoder to {others}", "decoder_path"
                )
        if self.latent_encoder == "taehv" and self.decoder != "taehv":
            raise FieldError("needs decoder: taehv, whose file has both halves", "latent_encoder", "decoder")
        if self.weights == "random" and self.scale == "auto":
            raise FieldError(
                "random weights need a scale; set scale to nano, 1.3B or 14B", "weights", "scale"
            )
        return self
