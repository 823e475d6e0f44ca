"""Sizes of the DiT, read from the headers of its files and the adapter's `config.json`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniavatar.checkpoint.lora_keys import strip_prefixes
from omniavatar.checkpoint.outside import fitting, read_table, shown
from omniavatar.checkpoint.reader import PathLike, TensorFiles
from omniavatar.errors import CheckpointError
from omniavatar.model.sizes import FRAMES_PER_LATENT, LATENT_ROWS, WINDOW_ROWS, DiTConfig

HEAD_DIM = 128
MAX_VALUE = 1e9
"""Ranks, alphas and numbers of heads are far below it."""
HEADS_KEY = "omniavatar.num_heads"
"""Header key of a converted file: the number of attention heads."""
FAMILY_KEY = "omniavatar.family"
"""Header key of a converted file: the model's family, where its keys do not tell it."""
TOKENS_KEY = "audio_proj.proj1.weight"
"""A weight of `model.audio_tokens`."""
UNUSED = ("text_embedding.", "audio_emb.")
"""Layers in the released file of FlashHead that its code never runs."""


@dataclass(frozen=True)
class AdapterConfig:
    """Content of the `config.json` beside OmniAvatar's `pytorch_model.pt`."""

    path: Path
    lora_rank: int | None
    lora_alpha: float | None
    model_config: Mapping[str, Any]


def read_adapter_config(adapter_dir: PathLike) -> AdapterConfig:
    """The adapter's `config.json`. Raises CheckpointError if it is missing or malformed."""
    path = Path(adapter_dir) / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{path}: file not found; it belongs to the adapter: run `omniavatar download 14B|1.3B`"
        )
    table = read_table(path)
    rank, alpha = table.get("lora_rank"), table.get("lora_alpha")
    model_config = table.get("model_config") or {}
    heads = model_config.get("num_heads") if isinstance(model_config, dict) else None
    for name, value, fits in (
        ("lora_rank", rank, rank is None or (type(rank) is int and 0 < rank < MAX_VALUE)),
        ("lora_alpha", alpha, alpha is None or (type(alpha) in (int, float) and 0 < alpha < MAX_VALUE)),
        ("model_config", model_config, type(model_config) is dict),
        ("model_config.num_heads", heads, heads is None or (type(heads) is int and 0 < heads < MAX_VALUE)),
    ):
        if not fits:
            raise CheckpointError(
                f"{path}: not a valid adapter configuration ({name} is {shown(repr(value))}); "
                "download it again"
            )
    return AdapterConfig(path, rank, None if alpha is None else float(alpha), model_config)


def inspect_dit(
    dit_paths: PathLike | Sequence[PathLike],
    adapter_dir: PathLike | None = None,
    *,
    num_heads: int | None = None,
) -> DiTConfig:
    """Sizes of the model in these files; reads headers only.

    num_heads: overrides `model_config.num_heads` of the adapter. Without either, heads are 128 wide, as in
    all released models.

    Raises CheckpointError if the files are not a Wan DiT or contradict the adapter's configuration.
    """
    with ExitStack() as stack:
        base = stack.enter_context(TensorFiles(dit_paths))
        adapter = None if adapter_dir is None else stack.enter_context(TensorFiles(adapter_dir))
        settings = None if adapter_dir is None else read_adapter_config(adapter_dir)
        return dit_config(base, adapter, settings, num_heads)


def unused_layers(keys: Iterable[str]) -> list[str]:
    """Names in a DiT's file that the model does not have, because its code never uses them."""
    names = list(keys)
    return [key for key in names if key.startswith(UNUSED)] if TOKENS_KEY in names else []


def family_name(base: TensorFiles, projector: bool) -> str:
    """The family of a DiT, by its keys.

    projector: another audio projector is configured, as LeapTalk's.
    """
    if TOKENS_KEY not in base:
        return "omniavatar"
    return base.metadata.get(FAMILY_KEY) or ("leaptalk" if projector else "flashhead")


def dit_config(
    base: TensorFiles, adapter: TensorFiles | None, settings: AdapterConfig | None, num_heads: int | None
) -> DiTConfig:
    """`inspect_dit` for files that are open already; `settings`: the adapter's `config.json`."""
    with fitting(base.origin, "use the released files of Wan 2.1 T2V"):
        return _dit_config(base, adapter, settings, num_heads)


def _dit_config(
    base: TensorFiles, adapter: TensorFiles | None, settings: AdapterConfig | None, num_heads: int | None
) -> DiTConfig:
    shapes = {key: base.shape(key) for key in base.keys()}  # noqa: SIM118  (not a dict)
    if adapter is not None:
        shapes |= {strip_prefixes(key): adapter.shape(key) for key in adapter.keys()}  # noqa: SIM118

    def shape(key: str, axes: int) -> tuple[int, ...]:
        if key not in shapes or len(shapes[key]) != axes or 0 in shapes[key]:
            raise CheckpointError(f"{base.origin}: no weight {key} with {axes} axes; this is not a Wan DiT")
        return shapes[key]

    dim, in_dim, *patch = shape("patch_embedding.weight", 5)
    blocks = count_blocks(shapes, base.origin)
    declared: Mapping[str, Any] = settings.model_config if settings else {}
    stored = base.metadata.get(HEADS_KEY, "")
    beside = _heads_beside(base) if TOKENS_KEY in shapes else None
    heads = num_heads or declared.get("num_heads") or (int(stored) if stored.isdigit() else beside)
    heads = heads or dim // HEAD_DIM
    if heads < 1 or dim % heads:
        raise CheckpointError(
            f"{base.origin}: width {dim} cannot be split into {heads} heads; set num_heads in model_config"
        )
    if TOKENS_KEY in shapes:
        audio = _token_sizes(shape, dim, base.origin)
    elif "audio_proj.proj.weight" in shapes:
        hidden, packed = shape("audio_proj.proj.weight", 2)
        audio = {"audio_dim": packed // FRAMES_PER_LATENT, "audio_hidden": hidden}
    else:
        audio = {"audio_dim": 0}
    with_text = "text_embedding.0.weight" in shapes or TOKENS_KEY not in shapes
    config = DiTConfig(
        dim=dim,
        in_dim=in_dim,
        ffn_dim=shape("blocks.0.ffn.0.weight", 2)[0],
        out_dim=shape("head.head.weight", 2)[0] // math.prod(patch),
        text_dim=shape("text_embedding.0.weight", 2)[1] if with_text else DiTConfig.text_dim,
        freq_dim=shape("time_embedding.0.weight", 2)[1],
        num_heads=heads,
        num_layers=blocks,
        patch_size=(patch[0], patch[1], patch[2]),
        **audio,
    )
    if settings is not None:
        _check_agreement(config, settings)
    return config


def _heads_beside(base: TensorFiles) -> int | None:
    """The number of heads in the `config.json` beside a FlashHead DiT; None if there is none."""
    path = base.paths[0].parent / "config.json"
    if not path.is_file():
        return None
    heads = read_table(path).get("num_heads")
    if heads is not None and (type(heads) is not int or not 0 < heads < MAX_VALUE):
        raise CheckpointError(f"{path}: num_heads is {shown(repr(heads))}; download the file again")
    return heads


def _token_sizes(shape: Callable[[str, int], tuple[int, ...]], dim: int, origin: str) -> dict[str, int]:
    """Sizes of `model.audio_tokens`. Raises CheckpointError if its layers do not fit together."""
    hidden, first = shape(TOKENS_KEY, 2)
    later, out = shape("audio_proj.proj1_vf.weight", 2)[1], shape("audio_proj.proj3.weight", 2)[0]
    if first % WINDOW_ROWS or later != first // WINDOW_ROWS * LATENT_ROWS or out % dim:
        raise CheckpointError(
            f"{origin}: its audio projector takes {first} and {later} numbers and gives {out}, which no "
            f"FlashHead of width {dim} has; download it again"
        )
    return {"audio_dim": first // WINDOW_ROWS, "audio_hidden": hidden, "audio_tokens": out // dim}


def count_blocks(keys: Iterable[str], origin: str) -> int:
    """Number of blocks that names such as `blocks.3.x` mention. Raises CheckpointError if one is missing."""
    blocks = {int(match[1]) for key in keys if (match := re.match(r"blocks\.(\d{1,9})\.", key))}
    missing = next((number for number in range(len(blocks)) if number not in blocks), None)
    if not blocks or missing is not None:
        raise CheckpointError(f"{origin}: has no weights of block {missing or 0}; download it again")
    return len(blocks)


def _check_agreement(config: DiTConfig, settings: AdapterConfig) -> None:
    stored = {
        "in_dim": config.in_dim,
        "audio_hidden_size": config.audio_hidden,
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
    }
    for name, size in stored.items():
        declared = settings.model_config.get(name, size)
        if declared != size:
            raise CheckpointError(
                f"{os.fspath(settings.path)}: model_config.{name} is {shown(str(declared))}, "
                f"the weights have {size}; use the adapter that was made for this base model"
            )


def keep_float32(key: str) -> bool:
    """Whether a weight of the DiT stays float32 for every dtype of the model.

    The precision of the sampler depends on these small weights (1.4 % of the 14B): patch embedding, head,
    time and audio layers, modulation, and the scales of all norms.
    """
    return (
        key.startswith(("patch_embedding.", "head.", "time_embedding.", "time_projection.", "audio_"))
        or key.endswith("modulation")
        or ".norm" in key
    )
