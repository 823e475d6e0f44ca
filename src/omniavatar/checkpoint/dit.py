"""The DiT from its files: base weights, OmniAvatar's adapter and further LoRAs become one plain model.

Sizes come from the shapes in the file headers. Each weight is read once, brought to float32 (on the GPU when
there is one), all low-rank and whole deltas are added there, and the sum is cast once to its final dtype; the
adapter's whole tensors (33-channel patch embedding, audio layers) stand in place of or beside the base's.
An already merged checkpoint (plain names, 33 channels, audio layers) loads the same way without an adapter.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from omniavatar.checkpoint.initial import random_weight
from omniavatar.checkpoint.lora import Delta, plan_lora
from omniavatar.checkpoint.lora_keys import strip_prefixes
from omniavatar.checkpoint.reader import PathLike, TensorFiles
from omniavatar.checkpoint.staging import Staging
from omniavatar.checkpoint.strict import DeviceOf, TensorSource, file_sources, load_strict
from omniavatar.errors import CheckpointError
from omniavatar.model.attention import AttentionFn
from omniavatar.model.audio_adapter import FRAMES_PER_LATENT
from omniavatar.model.dit import DiTConfig, WanDiT

HEAD_DIM = 128
FORM_KEY = "omniavatar.form"
HEADS_KEY = "omniavatar.num_heads"
"""Entries of a converted file's header: the form of its weights (absent: plain), its attention heads."""


@dataclass(frozen=True)
class LoraFile:
    """A further LoRA to merge: `path` of a file or folder, `strength` multiplies its change."""

    path: PathLike
    strength: float = 1.0


@dataclass(frozen=True)
class AdapterConfig:
    """What the `config.json` beside OmniAvatar's `pytorch_model.pt` says about its weights."""

    path: Path
    lora_rank: int | None
    lora_alpha: float | None
    model_config: Mapping[str, Any]


def keep_float32(key: str) -> bool:
    """Whether a weight of the DiT stays float32 whatever the model's dtype.

    These are small, and the sampler's precision depends on them: the way in and out of the latent space
    (patch embedding, head), time and audio layers, modulation, the scales of all norms (1.4 % of the 14B).
    """
    return (
        key.startswith(("patch_embedding.", "head.", "time_embedding.", "time_projection.", "audio_"))
        or key.endswith("modulation")
        or ".norm" in key
    )


def read_adapter_config(adapter_dir: PathLike) -> AdapterConfig:
    """The adapter's `config.json`. Raises CheckpointError when it is absent or not as released."""
    path = Path(adapter_dir) / "config.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = table.get("lora_rank"), table.get("lora_alpha")
        model_config = table.get("model_config") or {}
        return AdapterConfig(
            path,
            None if rank is None else int(rank),
            None if alpha is None else float(alpha),
            {str(name): value for name, value in model_config.items()},
        )
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; it comes with the adapter: run `omniavatar download 14B|1.3B`"
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a valid adapter configuration ({error})") from None


def inspect_dit(
    dit_paths: PathLike | Sequence[PathLike],
    adapter_dir: PathLike | None = None,
    *,
    num_heads: int | None = None,
) -> DiTConfig:
    """Sizes of the model these files make, from headers alone.

    num_heads: overrides `model_config.num_heads` of the adapter, else heads are 128 wide as in all released
    models. Raises CheckpointError when the files are not a Wan DiT or contradict the adapter's configuration.
    """
    with ExitStack() as stack:
        base = stack.enter_context(TensorFiles(dit_paths))
        adapter = None if adapter_dir is None else stack.enter_context(TensorFiles(adapter_dir))
        settings = None if adapter_dir is None else read_adapter_config(adapter_dir)
        return _config(base, adapter, settings, num_heads)


class WeightForm(Protocol):
    """A form the weights run in other than plain tensors of the model's dtype, such as float8 with scales."""

    @property
    def name(self) -> str: ...

    def prepare(self, model: WanDiT) -> None:
        """Give a model on meta the form's modules."""

    def convert(self, sources: Mapping[str, TensorSource], device: torch.device) -> dict[str, TensorSource]:
        """Sources of the form's tensors from those of the merged weights, computed on `device`."""


@dataclass(frozen=True, eq=False)
class DiTWeights:
    """An empty model (on meta, in its form and dtypes) and the sources that fill it, in reading order."""

    model: WanDiT
    sources: dict[str, TensorSource]
    origin: str

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype each tensor of the model takes."""
        return {key: tensor.dtype for key, tensor in self.model.state_dict().items()}


@dataclass(frozen=True)
class DiTFiles:
    """The files one model is merged from, and what overrides the adapter's own settings.

    base: file, shards, index or folder. adapter: OmniAvatar's folder, None for a merged checkpoint.
    """

    base: PathLike | Sequence[PathLike]
    adapter: PathLike | None = None
    loras: Sequence[LoraFile] = ()
    num_heads: int | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None


@contextmanager
def open_dit(
    files: DiTFiles,
    *,
    attention: AttentionFn,
    dtype: torch.dtype,
    device: torch.device,
    form: WeightForm | None = None,
) -> Iterator[DiTWeights]:
    """The merged model's weights, not read yet; merging and converting happen on `device`.

    dtype: of all weights but those of `keep_float32`. Raises CheckpointError for files that do not fit.
    """
    with ExitStack() as stack:
        load = stack.enter_context(Staging(device)).load if device.type == "cuda" else TensorFiles.load
        base = stack.enter_context(TensorFiles(files.base))
        adapter = None if files.adapter is None else stack.enter_context(TensorFiles(files.adapter))
        settings = None if files.adapter is None else read_adapter_config(files.adapter)
        config = _config(base, adapter, settings, files.num_heads)
        stored = base.metadata.get(FORM_KEY)
        _check_form(base, stored, form, merging=adapter is not None or bool(files.loras))
        model = empty_dit(config, attention, dtype)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        sources = file_sources(base, load=load)
        deltas: dict[str, list[Delta]] = {}
        if adapter is not None and settings is not None:
            plan = plan_lora(
                adapter,
                shapes,
                rank=files.lora_rank if files.lora_rank is not None else settings.lora_rank,
                alpha=files.lora_alpha if files.lora_alpha is not None else settings.lora_alpha,
                allow_whole=True,
            )
            brought = file_sources(adapter, load=load)
            sources |= {key: brought[stored_key] for key, stored_key in plan.replacements.items()}
            _collect(deltas, plan.deltas)
        for lora in files.loras:
            more = stack.enter_context(TensorFiles(lora.path))
            _collect(deltas, plan_lora(more, shapes, strength=lora.strength).deltas)
        sources = {key: _merged(source, deltas.get(key, ()), device) for key, source in sources.items()}
        if form is not None:
            form.prepare(model)
            sources = sources if stored else form.convert(sources, device)
        origin = base.origin if adapter is None else f"{base.origin} with {adapter.origin}"
        yield DiTWeights(model, sources, origin)


def load_dit(
    files: DiTFiles,
    *,
    attention: AttentionFn,
    dtype: torch.dtype,
    device: torch.device | str,
    form: WeightForm | None = None,
    place: DeviceOf | None = None,
) -> WanDiT:
    """The merged model, in evaluation mode and without gradients; arguments as in `open_dit`.

    place: where each weight goes in the end, `device` for all if None.
    """
    with open_dit(files, attention=attention, dtype=dtype, device=torch.device(device), form=form) as weights:
        return _filled(weights, place or torch.device(device))


def random_dit(
    config: DiTConfig,
    *,
    attention: AttentionFn,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    form: WeightForm | None = None,
    place: DeviceOf | None = None,
) -> WanDiT:
    """A model with random weights made on `device` (see `initial`); form, place as for `load_dit`."""
    weights = random_weights(
        config, attention=attention, dtype=dtype, device=torch.device(device), seed=seed, form=form
    )
    return _filled(weights, place or torch.device(device))


def random_weights(
    config: DiTConfig,
    *,
    attention: AttentionFn,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    form: WeightForm | None = None,
) -> DiTWeights:
    """Like `open_dit`, for numbers from a generator. They depend on the order in which they are read."""
    model = empty_dit(config, attention, dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    sources: dict[str, TensorSource] = {}
    for key, empty in model.named_parameters():
        shape = tuple(empty.shape)
        sources[key] = TensorSource(shape, partial(random_weight, key, shape, empty.dtype, generator))
    if form is not None:
        form.prepare(model)
        sources = form.convert(sources, device)
    return DiTWeights(model, sources, "random weights")


def _filled(weights: DiTWeights, place: torch.device | DeviceOf) -> WanDiT:
    dtypes = weights.dtypes()
    load_strict(weights.model, weights.sources, dtype=dtypes.__getitem__, device=place, origin=weights.origin)
    return weights.model.eval()


def empty_dit(config: DiTConfig, attention: AttentionFn, dtype: torch.dtype) -> WanDiT:
    """A model on meta whose parameters have the dtypes they will be loaded in."""
    with torch.device("meta"):
        model = WanDiT(config, attention)
    for key, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keep_float32(key) else dtype)
    return model


def _check_form(base: TensorFiles, stored: str | None, form: WeightForm | None, merging: bool) -> None:
    """Raise CheckpointError where a converted file's form is not the one asked for, or cannot be merged."""
    if stored is None:
        return
    if form is None or form.name != stored:
        raise CheckpointError(f"{base.origin}: converted to {stored}; set quantize={stored}")
    if merging:
        raise CheckpointError(
            f"{base.origin}: converted to {stored}, nothing can be merged into it; leave exp_path and loras "
            "out, or convert the original files with them"
        )


def _collect(deltas: dict[str, list[Delta]], more: Sequence[Delta]) -> None:
    for delta in more:
        deltas.setdefault(delta.target, []).append(delta)


def _merged(source: TensorSource, deltas: Sequence[Delta], place: torch.device) -> TensorSource:
    if not deltas:
        return source

    def load() -> Tensor:
        weight = source.load().to(device=place, dtype=torch.float32)
        for delta in deltas:
            delta.add_to(weight)
        return weight

    return TensorSource(source.shape, load)


def _config(
    base: TensorFiles, adapter: TensorFiles | None, settings: AdapterConfig | None, num_heads: int | None
) -> DiTConfig:
    shapes = {key: base.shape(key) for key in base.keys()}  # noqa: SIM118  (not a dict)
    if adapter is not None:
        shapes |= {strip_prefixes(key): adapter.shape(key) for key in adapter.keys()}  # noqa: SIM118

    def shape(key: str, axes: int) -> tuple[int, ...]:
        if key not in shapes or len(shapes[key]) != axes:
            raise CheckpointError(f"{base.origin}: no weight {key} with {axes} axes; this is not a Wan DiT")
        return shapes[key]

    dim, in_dim, *patch = shape("patch_embedding.weight", 5)
    blocks = {int(match[1]) for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key))}
    declared: Mapping[str, Any] = settings.model_config if settings else {}
    stored = base.metadata.get(HEADS_KEY, "")
    heads = num_heads or declared.get("num_heads") or (int(stored) if stored.isdigit() else dim // HEAD_DIM)
    if heads < 1 or dim % heads:
        raise CheckpointError(
            f"{base.origin}: width {dim} cannot have {heads} heads; set num_heads in model_config"
        )
    with_audio = "audio_proj.proj.weight" in shapes
    config = DiTConfig(
        dim=dim,
        in_dim=in_dim,
        ffn_dim=shape("blocks.0.ffn.0.weight", 2)[0],
        out_dim=shape("head.head.weight", 2)[0] // math.prod(patch),
        text_dim=shape("text_embedding.0.weight", 2)[1],
        freq_dim=shape("time_embedding.0.weight", 2)[1],
        num_heads=heads,
        num_layers=max(blocks) + 1,
        audio_dim=shape("audio_proj.proj.weight", 2)[1] // FRAMES_PER_LATENT if with_audio else 0,
        audio_hidden=shape("audio_proj.proj.weight", 2)[0] if with_audio else 32,
        patch_size=(patch[0], patch[1], patch[2]),
    )
    if settings is not None:
        _agree(config, settings)
    return config


def _agree(config: DiTConfig, settings: AdapterConfig) -> None:
    stored = {
        "in_dim": config.in_dim,
        "audio_hidden_size": config.audio_hidden,
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
    }
    for name, size in stored.items():
        said = settings.model_config.get(name, size)
        if said != size:
            raise CheckpointError(
                f"{os.fspath(settings.path)}: model_config.{name} is {said}, but the weights have {size}; "
                "base model and adapter do not belong together"
            )
