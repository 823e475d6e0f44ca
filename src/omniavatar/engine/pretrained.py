"""The configuration of a folder of weights, as `omniavatar download` or `make-checkpoint` leaves it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omniavatar.checkpoint.layout import MERGED, SCALES, TOKEN_FAMILIES, ScaleSpec, checkpoint_spec
from omniavatar.checkpoint.layout_families import BUILT_ON, CONFIG_PATHS, NEEDED, OWN, PRO_CONFIG
from omniavatar.checkpoint.layout_files import (
    ADAPTER,
    DIT_STEM,
    MERGED_DIT,
    TEXT_ENCODER,
    TOKENIZER,
    VAE,
    WAV2VEC,
    adapter_folder,
    base_folder,
)
from omniavatar.checkpoint.outside import read_table
from omniavatar.config.load import PACKAGED, Overrides, load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.config.syntax import parse_overrides, read_yaml
from omniavatar.config.values import POCKET
from omniavatar.errors import CheckpointError, ConfigError
from omniavatar.text import quoted, read_text

_SMALL = "-nano"
NAMES = (
    *(spec.name for spec in reversed(SCALES)),
    *MERGED,
    *(f"{family}{size}" for size in ("", _SMALL) for family in TOKEN_FAMILIES),
)
"""Checkpoints with a known layout; without a nearer clue, the first names what is missing."""
_LIVETALK = {
    "sampler": "causal",
    "num_steps": 4,
    "guidance_scale": 1.0,
    "image_sizes_720": [[512, 512]],
    "seq_len": 81,
    "fps": 16,
}
_NANO = {
    "dtype": "fp32",
    "scale": "nano",
    "num_steps": 4,
    "guidance_scale": 2.0,
    "image_sizes_720": [[96, 160], [144, 144], [160, 96]],
    "max_tokens": 600,
    "overlap_frame": 5,
    "seq_len": 50,
}
_HEADS_NANO = {"dtype": "fp32", "scale": "nano", "image_sizes_720": [[96, 96]]}
_TINY_VAE = {"decoder": "taehv", "latent_encoder": "taehv"}
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "14B": {},
    "1.3B": {},
    "nano": _NANO,
    "livetalk": _LIVETALK,
    "livetalk-nano": {
        **_LIVETALK,
        "dtype": "fp32",
        "scale": "nano",
        "image_sizes_720": [[96, 160], [144, 144], [160, 96]],
    },
    "flashhead": {"family": "flashhead"},
    "leaptalk": {"family": "leaptalk", **_TINY_VAE},
    "flashhead-nano": {"family": "flashhead", **_HEADS_NANO},
    "leaptalk-nano": {"family": "leaptalk", **_TINY_VAE, **_HEADS_NANO},
}
"""Settings of a checkpoint that differ from the defaults, as in `configs/`."""
_PATHS = (
    *("vae_path", "decoder_path", "text_encoder_path", "tokenizer_path", "wav2vec_path", "exp_path"),
    *("audio_proj_path", "input_limits", "step_cache_file", "sparse_file"),
)
_WORDS = ("auto", "none")
"""Values of a path's key that are no paths."""
_SHARD = re.compile(r"-(\d+)-of-(\d+)$")


def pretrained_config(
    folder: str | Path, overrides: Overrides = (), scale: str | None = None
) -> PipelineConfig:
    """The configuration of the weights in `folder`; see `AvatarPipeline.from_pretrained`.

    Raises ConfigError, and CheckpointError with the files that are missing.
    """
    changes = _mapping(overrides)
    if str(folder) in PACKAGED:
        return load_config(str(folder), changes).config
    root = Path(folder).expanduser()
    if not root.is_dir():
        what = "is a file; use from_config for a configuration" if root.is_file() else "does not exist"
        raise CheckpointError(
            f"{root}: {what}; give the folder that `omniavatar download 1.3B --root {root}` writes"
        )
    if scale is not None and scale not in NAMES:
        raise ConfigError(f"scale: {quoted(scale)} is unknown; choose one of {', '.join(NAMES)}")
    files = sorted(root.glob("*.yaml"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConfigError(f"{root}: holds several configurations ({names}); give one to from_config")
    if files:
        return load_config(files[0], {**_rebased(files[0]), **changes}).config
    name = _chosen(root, scale)
    return load_config(None, {**_SETTINGS[name], **_paths(root, checkpoint_spec(name)), **changes}).config


def _mapping(overrides: Overrides) -> dict[str, Any]:
    if isinstance(overrides, Mapping):
        return dict(overrides)
    texts = [overrides] if isinstance(overrides, str) else overrides
    return {entry.key: entry.value for text in texts for entry in parse_overrides(text)}


def _rebased(file: Path) -> dict[str, Any]:
    """The paths of a configuration as overrides, relative ones taken from its folder."""
    names = (*_PATHS, "dit_path", "loras")
    known = {f"{prefix}{name}": name for name in names for prefix in ("", "model.", "sampling.")}
    found: dict[str, Any] = {}
    text = read_text(file, 1_000_000, ConfigError, "the file is missing")
    for entry in read_yaml(text, str(file), frozenset({"model", "sampling"})):
        name, value = known.get(entry.key), entry.value
        if name in _PATHS and isinstance(value, str) and value not in _WORDS:
            found[entry.key] = _beside(file, value)
        elif name == "loras" and isinstance(value, list):
            found[entry.key] = [_lora_beside(file, lora) for lora in value]
        elif name == "dit_path" and isinstance(value, str | list):
            parts = value.split(",") if isinstance(value, str) else value
            found[entry.key] = [_beside(file, str(part).strip()) for part in parts]
    return found


def _lora_beside(file: Path, lora: Any) -> Any:
    if isinstance(lora, Mapping) and isinstance(lora.get("path"), str):
        return {**lora, "path": _beside(file, lora["path"])}
    return _beside(file, lora) if isinstance(lora, str) else lora


def _beside(file: Path, value: str) -> str:
    return value if value.startswith((POCKET, "~")) else str(file.parent / value)


def _chosen(root: Path, scale: str | None) -> str:
    """The checkpoint to use. Raises ConfigError if several are complete, CheckpointError if none is."""
    missing = {name: _missing(root, checkpoint_spec(name)) for name in ([scale] if scale else _names(root))}
    whole = [name for name, files in missing.items() if not files]
    included = {BUILT_ON.get(checkpoint_spec(name).family) for name in whole}
    whole = [name for name in whole if checkpoint_spec(name).family not in included]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise ConfigError(f"{root}: holds {', '.join(whole)}; choose one with scale={quoted(whole[0])}")
    begun = [name for name in missing if _has_dit(root, checkpoint_spec(name))]
    nearest = min(begun or missing, key=lambda name: len(missing[name]))
    if scale is None and not begun:
        inside = next((name for name in NAMES if root.name in _folders(checkpoint_spec(name))), None)
        if inside is not None:
            raise CheckpointError(f"{root}: is one part of {inside}; give the folder above, {root.parent}")
        raise CheckpointError(
            f"{root}: holds no weights of {', '.join(NAMES)}, nor a configuration; "
            f"`omniavatar download 1.3B --root {root}` fetches some"
        )
    made = nearest.endswith("nano")
    command = f"make-checkpoint --scale {nearest} --out" if made else f"download {nearest} --root"
    raise CheckpointError(
        f"{root}: {nearest} lacks {', '.join(missing[nearest])}; `omniavatar {command} {root}` writes them"
    )


def _names(root: Path) -> list[str]:
    """The checkpoints that `root` may hold: the files of heads have the same names in every size."""
    path = root / PRO_CONFIG
    dim = read_table(path).get("dim") if path.is_file() else None
    small = dim == checkpoint_spec(f"flashhead{_SMALL}").dit.dim
    other = {f"{family}{'' if small else _SMALL}" for family in TOKEN_FAMILIES}
    return [name for name in NAMES if name not in other]


def _folders(spec: ScaleSpec) -> tuple[str, ...]:
    if spec.family in OWN:
        return (OWN[spec.family],)
    return (base_folder(spec), adapter_folder(spec), WAV2VEC, *([spec.merged] if spec.merged else []))


def _has_dit(root: Path, spec: ScaleSpec) -> bool:
    if spec.family in OWN:
        return (root / OWN[spec.family]).is_dir()
    return bool(_dit_files(root, spec)) or (not spec.merged and (root / adapter_folder(spec)).is_dir())


def _dit_files(root: Path, spec: ScaleSpec) -> list[Path]:
    if spec.merged:
        return [path for path in [root / spec.merged / MERGED_DIT] if path.is_file()]
    return sorted((root / base_folder(spec)).glob(f"{DIT_STEM}*.safetensors"))


def _missing(root: Path, spec: ScaleSpec) -> list[str]:
    """Files and folders of a checkpoint that `root` lacks, relative to it."""
    speech = [f"{WAV2VEC}/model.safetensors", f"{WAV2VEC}/config.json"]
    if spec.family in NEEDED:
        return [name for name in (*NEEDED[spec.family], *speech) if not (root / name).exists()]
    base, dit = base_folder(spec), _dit_files(root, spec)
    needed = [
        *(f"{base}/{name}" for name in (TEXT_ENCODER, VAE, TOKENIZER)),
        *speech,
    ]
    if not spec.merged:
        needed += [f"{adapter_folder(spec)}/{name}" for name in (ADAPTER, "config.json")]
    if not dit:
        needed.insert(0, f"{spec.merged}/{MERGED_DIT}" if spec.merged else f"{base}/{DIT_STEM}*.safetensors")
    elif shard := _SHARD.search(dit[0].stem):
        stem = dit[0].stem[: shard.start()]
        total = int(shard[2])
        needed += [f"{base}/{stem}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    return [name for name in needed if "*" in name or not (root / name).exists()]


def _paths(root: Path, spec: ScaleSpec) -> dict[str, Any]:
    if spec.family in CONFIG_PATHS:
        return {name: _below(root, value) for name, value in CONFIG_PATHS[spec.family].items()}
    base = root / base_folder(spec)
    return {
        "dit_path": [str(path) for path in _dit_files(root, spec)],
        "text_encoder_path": str(base / TEXT_ENCODER),
        "vae_path": str(base / VAE),
        "wav2vec_path": str(root / WAV2VEC),
        **({} if spec.merged else {"exp_path": str(root / adapter_folder(spec))}),
    }


def _below(root: Path, value: Any) -> Any:
    """A path below `root`, or LoRAs with such paths."""
    if isinstance(value, str):
        return str(root / value)
    return [{**lora, "path": str(root / lora["path"])} for lora in value]
