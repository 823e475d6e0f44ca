"""Loads the DiT from base weights, OmniAvatar's adapter and additional LoRAs, merged into one plain model.

Sizes come from the shapes in the file headers (`dit_sizes`). Each weight is read once and converted to
float32, on the GPU if available. All low-rank and whole deltas are added there, and the sum is cast once to
its final dtype. Whole tensors of the adapter (33-channel patch embedding, audio layers) replace those of the
base or are added to the model. A merged checkpoint (plain names, 33 channels, audio layers) loads in the same
way without an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from omniavatar.checkpoint.dit_sizes import (
    FAMILY_KEY,
    dit_config,
    family_name,
    keep_float32,
    read_adapter_config,
    unused_layers,
)
from omniavatar.checkpoint.initial import random_weight
from omniavatar.checkpoint.lora import Delta, plan_lora
from omniavatar.checkpoint.outside import fitting
from omniavatar.checkpoint.reader import PathLike, TensorFiles
from omniavatar.checkpoint.staging import Staging
from omniavatar.checkpoint.strict import DeviceOf, TensorSource, abbreviated, file_sources, load_strict
from omniavatar.errors import CheckpointError
from omniavatar.model.attention import AttentionFn
from omniavatar.model.dit import WanDiT
from omniavatar.model.sizes import DiTConfig

PROJECTOR = "audio_proj."
"""Prefix of the audio projector's weights in the model."""
FORM_KEY = "omniavatar.form"
"""Header key of a converted file: the form of its weights; missing for plain weights."""


@dataclass(frozen=True)
class LoraFile:
    """An additional LoRA to merge.

    path: file or folder.
    strength: factor on its weight differences.
    """

    path: PathLike
    strength: float = 1.0


class WeightForm(Protocol):
    """A storage form of the weights other than plain tensors of the model's dtype, such as float8 with
    scales."""

    @property
    def name(self) -> str: ...

    def prepare(self, model: WanDiT) -> None:
        """Replace modules of a model on the meta device by those of the form."""

    def convert(self, sources: Mapping[str, TensorSource], device: torch.device) -> dict[str, TensorSource]:
        """Sources of the form's tensors, computed on `device` from those of the merged weights."""


@dataclass(frozen=True, eq=False)
class DiTWeights:
    """A model on the meta device in its form and dtypes, and the sources of its weights in reading order.

    - unused: names in the files that the model does not have.
    - metadata: header entries that a converted file needs.
    """

    model: WanDiT
    sources: dict[str, TensorSource]
    origin: str
    unused: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each tensor of the model, by name."""
        return {key: tensor.dtype for key, tensor in self.model.state_dict().items()}


@dataclass(frozen=True)
class DiTFiles:
    """The files of one model; the last three fields override the adapter's own settings.

    base: file, shards, index or folder.
    adapter: OmniAvatar's folder, None for a merged checkpoint.
    projector: file with another audio projector (LeapTalk's), with or without the prefix `audio_proj.`.
    """

    base: PathLike | Sequence[PathLike]
    adapter: PathLike | None = None
    loras: Sequence[LoraFile] = ()
    projector: PathLike | None = None
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
    """The weights of the merged model; reading, merging and converting happen later, on `device`.

    dtype: of all weights except those of `keep_float32`.

    Raises CheckpointError if the files do not fit together.
    """
    with ExitStack() as stack:
        load = stack.enter_context(Staging(device)).load if device.type == "cuda" else TensorFiles.load
        base = stack.enter_context(TensorFiles(files.base))
        adapter = None if files.adapter is None else stack.enter_context(TensorFiles(files.adapter))
        settings = None if files.adapter is None else read_adapter_config(files.adapter)
        config = dit_config(base, adapter, settings, files.num_heads)
        stored = base.metadata.get(FORM_KEY)
        _check_form(base, stored, form, merging=adapter is not None or bool(files.loras))
        with fitting(base.origin, "use the released files of Wan 2.1 T2V"):
            model = empty_dit(config, attention, dtype)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        unused = unused_layers(base.keys())
        left_out = frozenset(unused)
        sources = file_sources(base, lambda key: None if key in left_out else key, load=load)
        if files.projector is not None:
            if stored is not None:
                raise CheckpointError(
                    f"{base.origin}: was converted to {stored} with its audio projector; remove "
                    "audio_proj_path"
                )
            projector = stack.enter_context(TensorFiles(files.projector))
            sources |= _projector_sources(projector, shapes, load)
        deltas: dict[str, list[Delta]] = {}
        if adapter is not None and settings is not None:
            plan = plan_lora(
                adapter,
                shapes,
                rank=files.lora_rank if files.lora_rank is not None else settings.lora_rank,
                alpha=files.lora_alpha if files.lora_alpha is not None else settings.lora_alpha,
                allow_whole=True,
            )
            adapter_sources = file_sources(adapter, load=load)
            sources |= {key: adapter_sources[stored_key] for key, stored_key in plan.replacements.items()}
            _collect(deltas, plan.deltas)
        for lora in files.loras:
            lora_files = stack.enter_context(TensorFiles(lora.path))
            _collect(deltas, plan_lora(lora_files, shapes, strength=lora.strength).deltas)
        sources = {key: _merged(source, deltas.get(key, ()), device) for key, source in sources.items()}
        if form is not None:
            form.prepare(model)
            sources = sources if stored else form.convert(sources, device)
        origin = base.origin if adapter is None else f"{base.origin} with {adapter.origin}"
        family = family_name(base, files.projector is not None)
        metadata = {FAMILY_KEY: family} if config.audio_tokens else {}
        yield DiTWeights(model, sources, origin, tuple(unused), metadata)


def load_dit(
    files: DiTFiles,
    *,
    attention: AttentionFn,
    dtype: torch.dtype,
    device: torch.device | str,
    form: WeightForm | None = None,
    device_of: DeviceOf | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> WanDiT:
    """The merged model, in evaluation mode and without gradients; arguments as in `open_dit`.

    device_of: final device of each weight by name; None for `device`.
    note: called with a sentence that names the layers of the files that are not loaded.
    """
    with open_dit(files, attention=attention, dtype=dtype, device=torch.device(device), form=form) as weights:
        if weights.unused:
            note(
                f"{weights.origin}: not loaded, because the model never uses them: "
                + ", ".join(weights.unused)
            )
        return _filled(weights, device_of or torch.device(device))


def random_dit(
    config: DiTConfig,
    *,
    attention: AttentionFn,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    form: WeightForm | None = None,
    device_of: DeviceOf | None = None,
) -> WanDiT:
    """A model with random weights made on `device` (see `initial`); form and device_of as in `load_dit`."""
    weights = random_weights(
        config, attention=attention, dtype=dtype, device=torch.device(device), seed=seed, form=form
    )
    return _filled(weights, device_of or torch.device(device))


def random_weights(
    config: DiTConfig,
    *,
    attention: AttentionFn,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    form: WeightForm | None = None,
) -> DiTWeights:
    """Like `open_dit`, with random weights, which depend on the order in which they are read."""
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


def _filled(weights: DiTWeights, device: torch.device | DeviceOf) -> WanDiT:
    dtypes = weights.dtypes()
    load_strict(
        weights.model, weights.sources, dtype=dtypes.__getitem__, device=device, origin=weights.origin
    )
    return weights.model.eval()


def empty_dit(config: DiTConfig, attention: AttentionFn, dtype: torch.dtype) -> WanDiT:
    """A model on the meta device, with the dtypes of the weights that will be loaded."""
    with torch.device("meta"):
        model = WanDiT(config, attention)
    for key, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keep_float32(key) else dtype)
    return model


def _projector_sources(
    files: TensorFiles, shapes: Mapping[str, tuple[int, ...]], load: Callable[[TensorFiles, str], Tensor]
) -> dict[str, TensorSource]:
    """Sources of all weights of the audio projector.

    Raises CheckpointError if one is missing, unknown or of another shape.
    """
    sources = file_sources(files, lambda key: PROJECTOR + key.removeprefix(PROJECTOR), load=load)
    expected = {key for key in shapes if key.startswith(PROJECTOR)}
    problems = [
        f"{kind}: {abbreviated(sorted(names))}"
        for kind, names in (("missing", expected - set(sources)), ("unexpected", set(sources) - expected))
        if names
    ]
    misshaped = [key for key in sorted(expected & set(sources)) if sources[key].shape != shapes[key]]
    if misshaped:
        problems.append(f"of another shape: {abbreviated(misshaped)}")
    if problems or not expected:
        raise CheckpointError(
            f"{files.origin}: does not replace the model's audio projector ({'; '.join(problems)}); use "
            "audio_proj_step_*.pt of LeapTalk with the DiT of FlashHead"
        )
    return sources


def _check_form(base: TensorFiles, stored: str | None, form: WeightForm | None, merging: bool) -> None:
    """Raise CheckpointError if a converted file's form is not the configured one, or is to be merged."""
    if stored is None:
        return
    if form is None or form.name != stored:
        raise CheckpointError(f"{base.origin}: was converted to {stored}; set quantize={stored}")
    if merging:
        raise CheckpointError(
            f"{base.origin}: was converted to {stored}, so no adapter or LoRA can be merged; remove exp_path "
            "and loras, or convert the original files together with them"
        )


def _collect(deltas: dict[str, list[Delta]], more: Sequence[Delta]) -> None:
    for delta in more:
        deltas.setdefault(delta.target, []).append(delta)


def _merged(source: TensorSource, deltas: Sequence[Delta], device: torch.device) -> TensorSource:
    if not deltas:
        return source

    def load() -> Tensor:
        weight = source.load().to(device=device, dtype=torch.float32)
        for delta in deltas:
            delta.add_to(weight)
        return weight

    parts = [part for delta in deltas for part in delta.parts]
    return TensorSource(source.shape, load, (*source.parts, *parts))
