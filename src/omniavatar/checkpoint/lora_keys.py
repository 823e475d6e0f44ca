"""Translates the tensor names of published LoRAs to the plain Wan names of the model.

A key is prefixes + layer + role. Prefixes (`diffusion_model.`, `base_model.model.`, ...) are dropped. The
suffix gives the role (`.lora_A.default.weight`, `.lora_up.weight`, `.alpha`, `.diff_b`, ...). The layer is
looked up in a table made from the model's own names: each plain name, its diffusers name, and both with
underscores instead of dots (kohya, musubi, LyCORIS). A name that is not in the table is an error.
Sources: key lists of lightx2v, Kijai, VideoX-Fun, musubi-tuner, peft and diffusers LoRAs for Wan 2.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Role = Literal["down", "up", "mid", "alpha", "diff", "diff_b", "diff_m"]

PREFIXES = (
    "base_model.model.",
    "diffusion_model.",
    "pipe.dit.",
    "transformer.",
    "model.",
    "unet.",
    "dit.",
)
FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")

_ADAPTER = r"(?:\.(?P<adapter>(?!(?:weight|bias)$)\w+))?(?:\.weight)?$"
_OLD = r"(?:_lora|\.lora|\.lora_linear_layer)"
_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("down", re.compile(rf"^(?P<layer>.+?)\.lora_(?:down|A){_ADAPTER}")),
    ("up", re.compile(rf"^(?P<layer>.+?)\.lora_(?:up|B){_ADAPTER}")),
    ("down", re.compile(rf"^(?P<layer>.+?){_OLD}\.down\.weight$")),
    ("up", re.compile(rf"^(?P<layer>.+?){_OLD}\.up\.weight$")),
    ("mid", re.compile(r"^(?P<layer>.+?)\.lora_mid(?:\.weight)?$")),
    ("alpha", re.compile(r"^(?P<layer>.+)\.alpha$")),
    ("diff_b", re.compile(r"^(?P<layer>.+)\.diff_b$")),
    ("diff_m", re.compile(r"^(?P<layer>.+)\.diff_m$")),
    ("diff", re.compile(r"^(?P<layer>.+)\.diff$")),
)
_IMAGE_LAYER = re.compile(
    r"img_emb|[._](?:k|v|norm_k)_img\b|[._]norm_k_img|add_[kv]_proj|norm_added_[kq]|image_embedder"
)

_DIFFUSERS_LAYERS = (
    (r"^(blocks\.\d+)\.self_attn\.([qkv])$", r"\1.attn1.to_\2"),
    (r"^(blocks\.\d+)\.cross_attn\.([qkv])$", r"\1.attn2.to_\2"),
    (r"^(blocks\.\d+)\.self_attn\.o$", r"\1.attn1.to_out.0"),
    (r"^(blocks\.\d+)\.cross_attn\.o$", r"\1.attn2.to_out.0"),
    (r"^(blocks\.\d+)\.self_attn\.(norm_[qk])$", r"\1.attn1.\2"),
    (r"^(blocks\.\d+)\.cross_attn\.(norm_[qk])$", r"\1.attn2.\2"),
    (r"^(blocks\.\d+)\.norm3$", r"\1.norm2"),
    (r"^(blocks\.\d+)\.ffn\.0$", r"\1.ffn.net.0.proj"),
    (r"^(blocks\.\d+)\.ffn\.2$", r"\1.ffn.net.2"),
    (r"^text_embedding\.0$", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2$", "condition_embedder.text_embedder.linear_2"),
    (r"^time_embedding\.0$", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2$", "condition_embedder.time_embedder.linear_2"),
    (r"^time_projection\.1$", "condition_embedder.time_proj"),
    (r"^head\.head$", "proj_out"),
    (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^head\.modulation$", "scale_shift_table"),
)


@dataclass(frozen=True)
class LoraKey:
    """A parsed key.

    layer: plain Wan name, None if the model has no such layer.
    """

    layer: str | None
    role: Role
    adapter: str | None


def diffusers_name(layer: str) -> str:
    """The name of a plain Wan layer in diffusers, which may be the same."""
    for pattern, replacement in _DIFFUSERS_LAYERS:
        if re.match(pattern, layer):
            return re.sub(pattern, replacement, layer)
    return layer


def is_image_layer(key: str) -> bool:
    """Whether a key belongs to the image-conditioning layers that only Wan's I2V models have."""
    return bool(_IMAGE_LAYER.search(key))


def strip_prefixes(key: str) -> str:
    """`key` without the prefixes that training tools add."""
    while True:
        for prefix in PREFIXES:
            if key.startswith(prefix):
                key = key[len(prefix) :]
                break
        else:
            return key


class LayerNames:
    """Looks up the layers of one model by every known spelling; built from its state-dict keys."""

    def __init__(self, model_keys: Iterable[str]) -> None:
        self.model_keys = frozenset(model_keys)
        layers = {key.rpartition(".")[0] for key in self.model_keys}
        layers |= {key for key in self.model_keys if key.endswith("modulation")}
        self._dotted: dict[str, str] = {}
        self._flat: dict[str, str] = {}
        for layer in sorted(layers):
            for name in (layer, diffusers_name(layer)):
                self._dotted[name] = layer
                self._flat[name.replace(".", "_")] = layer

    def layer(self, name: str) -> str | None:
        """The plain layer name for `name` (with prefixes), or None."""
        bare = strip_prefixes(name).replace("_orig_mod_", "_")
        if bare in self._dotted:
            return self._dotted[bare]
        for prefix in FLAT_PREFIXES:
            if bare.startswith(prefix):
                return self._flat.get(bare[len(prefix) :])
        return None

    def parse(self, key: str) -> LoraKey | None:
        """The parts of a LoRA key; None if its suffix is not a known role."""
        for role, pattern in _ROLES:
            match = pattern.match(key)
            if match:
                return LoraKey(self.layer(match["layer"]), role, match.groupdict().get("adapter"))
        return None

    def target(self, layer: str, role: Role) -> str | None:
        """The key of the weight that a role of a layer changes; None if the layer has no such weight."""
        if layer in self.model_keys:
            return layer if role in ("diff", "diff_m") else None
        leaf = {"diff_b": "bias", "diff_m": "modulation"}.get(role, "weight")
        key = f"{layer}.{leaf}"
        return key if key in self.model_keys else None
