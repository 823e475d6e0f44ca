"""Reads LoRA files as additions to the weights: W + strength * (alpha / rank) * B @ A, plus whole deltas.

A file becomes a list of deltas, which are checked against the model's shapes before any data is read. The
loader adds them to a weight in float32 and casts once, so the order of the files does not matter. alpha is
the pair's `.alpha`, else the value declared by the tool that saved the file (peft's adapter_config.json,
diffusers' header), else the rank. A 16-channel delta of the patch embedding changes the first 16 inputs of a
wider one.
Limits: keys of DoRA, LoHa, LoKr and rank-stabilised LoRA are errors. Deltas of the image layers, which only
I2V models have, are errors too, unless they are exactly zero; some extraction tools store such zeros.
Source of the method: LoRA (arXiv 2106.09685); convolutions as in LyCORIS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omniavatar.checkpoint.finite import Part
from omniavatar.checkpoint.lora_keys import LayerNames, is_image_layer, strip_prefixes
from omniavatar.checkpoint.outside import parse_table, read_table
from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.checkpoint.strict import abbreviated
from omniavatar.errors import CheckpointError

PATCH_EMBEDDING = "patch_embedding.weight"
LATENT_CHANNELS = 16
MAX_ALPHA = 1e9


@dataclass(frozen=True, eq=False)
class Delta:
    """One addition to the weight `target`: scale * up @ down, or scale * whole.

    up, down, mid, whole: names of tensors in `files`.
    channels: number of input channels of the target that change, None for all.
    """

    target: str
    files: TensorFiles
    scale: float
    up: str | None = None
    down: str | None = None
    mid: str | None = None
    whole: str | None = None
    channels: int | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The stored tensors of the delta."""
        keys = (self.down, self.up, self.mid, self.whole)
        return tuple((self.files, key) for key in keys if key is not None)

    def add_to(self, weight: Tensor) -> None:
        """Add the delta to a float32 weight in place, on its device."""
        part = weight if self.channels is None else weight[:, : self.channels]
        if self.whole is not None:
            part.add_(self._load(self.whole, weight.device).view(part.shape), alpha=self.scale)
            return
        assert self.up is not None and self.down is not None
        up = self._load(self.up, weight.device).flatten(1)
        down = self._load(self.down, weight.device)
        if self.mid is not None:
            mid = self._load(self.mid, weight.device)
            down = torch.einsum("pq...,qi->pi...", mid, down.flatten(1))
        if part.is_contiguous() and part.dim() == 2:
            part.addmm_(up, down.flatten(1), alpha=self.scale)
        else:
            part.add_((up @ down.flatten(1)).view(part.shape), alpha=self.scale)

    def _load(self, key: str, device: torch.device) -> Tensor:
        return self.files.load(key).to(device=device, dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class LoraPlan:
    """The changes of one file.

    replacements: whole weights of an adapter, file key by model key.
    """

    deltas: tuple[Delta, ...]
    replacements: Mapping[str, str]


def plan_lora(
    files: TensorFiles,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    strength: float = 1.0,
    rank: int | None = None,
    alpha: float | None = None,
    allow_whole: bool = False,
) -> LoraPlan:
    """The changes in `files`, after a check of every key against the model.

    shapes: shape of each weight of the model, by key.
    rank: rank declared by a configuration; a pair of another rank is an error.
    alpha: alpha declared by a configuration; a pair's own `.alpha` has precedence.
    allow_whole: accept whole weights under the model's names (the adapter).

    Raises CheckpointError that names the keys at fault.
    """
    names = LayerNames(shapes)
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    unknown: list[str] = []
    image: list[str] = []
    for key in files.keys():  # noqa: SIM118  (keys() is the documented order)
        bare = strip_prefixes(key)
        if allow_whole and bare in shapes:
            _once(files, whole, bare, key)
            continue
        parsed = names.parse(key)
        if parsed is None or parsed.layer is None:
            (image if is_image_layer(key) else unknown).append(key)
        else:
            _once(files, parts.setdefault(parsed.layer, {}), parsed.role, key)
    if unknown:
        raise CheckpointError(
            f"{files.origin}: {len(unknown)} keys match no layer of this model: {abbreviated(unknown)}; "
            "use a LoRA for Wan 2.1 T2V of the same size"
        )
    if image:
        _require_zero(files, image)
    declared = alpha if alpha is not None else _declared_alpha(files)
    deltas: list[Delta] = []
    for layer, roles in parts.items():
        deltas += _pair(files, names, shapes, layer, roles, strength, rank, declared)
        deltas += _whole_deltas(files, names, shapes, layer, roles, strength)
    return LoraPlan(tuple(deltas), whole)


def _once(files: TensorFiles, table: dict[str, str], name: str, key: str) -> None:
    if name in table:
        raise CheckpointError(f"{files.origin}: {table[name]} and {key} both mean the same weight")
    table[name] = key


def _require_zero(files: TensorFiles, image: list[str]) -> None:
    nonzero = [
        key
        for key in image
        if not key.endswith((".diff", ".diff_b")) or bool(files.load(key).count_nonzero())
    ]
    if nonzero:
        raise CheckpointError(
            f"{files.origin}: {len(nonzero)} keys change image layers, which only I2V models have: "
            f"{abbreviated(nonzero)}; use a LoRA for a T2V model"
        )


def _pair(
    files: TensorFiles,
    names: LayerNames,
    shapes: Mapping[str, tuple[int, ...]],
    layer: str,
    roles: Mapping[str, str],
    strength: float,
    rank: int | None,
    declared_alpha: float | None,
) -> list[Delta]:
    present = [role for role in ("down", "up", "mid", "alpha") if role in roles]
    if not present:
        return []
    for half in ("down", "up"):
        if half not in roles:
            raise CheckpointError(
                f"{files.origin}: {roles[present[0]]} has no {half} weight to pair with; download the file "
                "again"
            )
    target = names.target(layer, "down")
    down, up = roles["down"], roles["up"]
    if target is None:
        raise CheckpointError(f"{files.origin}: {down}: the layer {layer} of the model has no weight")
    down_shape, up_shape = files.shape(down), files.shape(up)
    inner = down_shape[0] if len(down_shape) > 1 else 0
    if inner < 1 or len(up_shape) < 2 or math.prod(up_shape[1:]) != inner:
        raise CheckpointError(
            f"{files.origin}: {up} {up_shape} and {down} {down_shape} do not have the same rank"
        )
    if rank is not None and inner != rank:
        raise CheckpointError(f"{files.origin}: {down} has rank {inner}, but lora_rank is {rank}")
    columns = math.prod(down_shape[1:])
    mid = roles.get("mid")
    if mid is not None:
        mid_shape = files.shape(mid)
        if mid_shape[:2] != (inner, inner) or columns != down_shape[1]:
            raise CheckpointError(f"{files.origin}: {mid} {mid_shape} does not fit between {up} and {down}")
        columns *= math.prod(mid_shape[2:])
    channels = _channels(files, down, target, shapes[target], (up_shape[0], columns))
    own_alpha = _own_alpha(files, roles["alpha"]) if "alpha" in roles else declared_alpha
    scale = strength * (own_alpha / inner if own_alpha is not None else 1.0)
    return [Delta(target, files, scale, up=up, down=down, mid=mid, channels=channels)]


def _whole_deltas(
    files: TensorFiles,
    names: LayerNames,
    shapes: Mapping[str, tuple[int, ...]],
    layer: str,
    roles: Mapping[str, str],
    strength: float,
) -> list[Delta]:
    deltas = []
    for role in ("diff", "diff_b", "diff_m"):
        if role not in roles:
            continue
        key = roles[role]
        target = names.target(layer, role)  # type: ignore[arg-type]
        if target is None:
            raise CheckpointError(f"{files.origin}: {key}: the layer {layer} of the model has no such weight")
        shape = files.shape(key)
        rows = shape[0] if shape else 1
        channels = _channels(files, key, target, shapes[target], (rows, math.prod(shape[1:])))
        deltas.append(Delta(target, files, strength, whole=key, channels=channels))
    return deltas


def _channels(
    files: TensorFiles, key: str, target: str, shape: tuple[int, ...], matrix: tuple[int, int]
) -> int | None:
    """Channels of the target that a delta changes: None for all, 16 for the patch embedding of a T2V model.

    matrix: (rows, columns) of the delta.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    if matrix == (rows, columns):
        return None
    if target == PATCH_EMBEDDING and matrix == (rows, LATENT_CHANNELS * math.prod(shape[2:])):
        return LATENT_CHANNELS
    raise CheckpointError(
        f"{files.origin}: {key} gives a delta of {matrix[0]}x{matrix[1]}, but {target} is {rows}x{columns}"
    )


def _own_alpha(files: TensorFiles, key: str) -> float:
    """The number in the `.alpha` of a pair. Raises CheckpointError if it is none."""
    info = files.info(key)
    is_number = math.prod(info.shape) == 1 and info.dtype != torch.bool
    alpha = float(files.load(key).item()) if is_number else math.nan
    if not math.isfinite(alpha):
        held = f"{alpha:g}" if is_number else f"{str(info.dtype)[6:]} of shape {list(info.shape)}"
        raise CheckpointError(
            f"{files.path_of(key)}: {key} must be one finite number, it holds {held}; download the LoRA again"
        )
    return alpha


def _declared_alpha(files: TensorFiles) -> float | None:
    """The alpha that peft (adapter_config.json) or diffusers (header) stored for the whole file, if any."""
    beside = files.paths[0].parent / "adapter_config.json"
    declared: dict[str, Any] = {}
    source = files.origin
    if files.paths[0].name.startswith("adapter_model") and beside.is_file():
        source = str(beside)
        declared = read_table(beside)
    elif "lora_adapter_metadata" in files.metadata:
        table = parse_table(files.metadata["lora_adapter_metadata"], f"{source}: its LoRA settings")
        declared = {name.removeprefix("transformer."): value for name, value in table.items()}
    for option in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern"):
        if declared.get(option):
            raise CheckpointError(
                f"{source}: {option} is not supported; merge the LoRA with the tool that made it"
            )
    alpha = declared.get("lora_alpha")
    if alpha is None:
        return None
    if type(alpha) not in (int, float) or abs(alpha) > MAX_ALPHA:
        raise CheckpointError(f"{source}: lora_alpha must be a number; download the LoRA again")
    return float(alpha)
