"""The sizes of OmniAvatar-Pocket and of its clips, in the engine's terms."""

from __future__ import annotations

from omniavatar.checkpoint.layout import ScaleSpec, TextSpec, Wav2VecSpec
from omniavatar.model.sizes import DiTConfig, VAEConfig

SIZE = 192
WINDOW = 41
OVERLAP = 5
LATENTS = (WINDOW + 3) // 4
GIVEN_LATER = (3 + OVERLAP) // 4

WAV2VEC = Wav2VecSpec(
    hidden=192, ffn=640, num_heads=4, num_layers=4, conv_dim=128, pos_kernel=32, pos_groups=8
)
POCKET = ScaleSpec(
    name="pocket",
    dit=DiTConfig(256, 768, 4, 10, text_dim=96, freq_dim=256, audio_dim=WAV2VEC.audio_dim, audio_hidden=64),
    text=TextSpec(vocab=384, dim=96, dim_ffn=192, num_heads=4, num_layers=2, dim_attn=96),
    vae=VAEConfig(dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=1),
    wav2vec=WAV2VEC,
    lora_rank=8,
    lora_alpha=4,
)
