"""The file of measured step-cache constants: its content, its path, and when it may be used.

`omniavatar calibrate` writes it (`measure.calibrate`), by default as `step_cache.json` beside the checkpoint.
It records the model and the schedule of the measurement. Another model or schedule is an error, never
silently ignored. Another number of steps of the same schedule is supported: magnitude ratios are stretched,
and TeaCache's polynomial depends on the time change, not on the step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from omniavatar.checkpoint.fingerprint import content_identity
from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.config.backends import backend_name
from omniavatar.config.schema import ModelConfig, SamplingConfig
from omniavatar.errors import CheckpointError, ConfigError
from omniavatar.plan.steps import model_scale
from omniavatar.sampling.cache_constants import CacheConstants, published_constants
from omniavatar.text import read_json

if TYPE_CHECKING:
    from omniavatar.model.sizes import DiTConfig

NAME = "step_cache.json"
"""Default name of the file."""
MOST_BYTES = 4_000_000
"""Of the file."""
REMEDY = "run `omniavatar calibrate` with this config, or set step_cache_file=none"
SIZES = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "text_dim", "audio_dim", "audio_hidden")
"""Fields of `DiTConfig` that identify the model."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(allow_inf_nan=False, ge=0)]
Positive = Annotated[float, Field(allow_inf_nan=False, gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Model(_Part):
    """The measured model.

    - sizes: of the DiT, by field.
    - weights: hash of each file's content, by the file's role and name.
    """

    sizes: dict[str, int]
    weights: dict[str, str]


class MeasuredSchedule(_Part):
    """Steps and noise levels of the measurement; `timesteps` only if the configuration lists them."""

    steps: int = Field(ge=2)
    shift: Positive
    timesteps: tuple[Positive, ...] | None
    sampler: Annotated[str, BeforeValidator(backend_name("sampling.sampler"))]


class MeasuredBranch(_Part):
    """`sampling.calibration.ResidualChanges` of one branch."""

    magnitude_ratios: tuple[Positive, ...]
    ratio_spread: tuple[Share, ...]
    cosine_distances: tuple[Number, ...]
    changes: tuple[Share, ...]


class TeaCache(_Part):
    """`sampling.calibration.TeaCacheFit`."""

    polynomial: tuple[Number, ...] = Field(min_length=1)
    fitted: tuple[Share, Share]
    rms_error: Share


class Calibration(_Part):
    """Everything in the file.

    - measured: time, machine and versions, for people; no code reads them.
    - time_changes: TeaCache's distances, one a step.
    - magnitude_ratios: one a step, for all branches together.
    """

    format: Literal[1] = 1
    model: Model
    schedule: MeasuredSchedule
    measured: dict[str, Any]
    time_changes: tuple[Share, ...]
    branches: dict[str, MeasuredBranch] = Field(min_length=1)
    magnitude_ratios: tuple[Positive, ...]
    teacache: TeaCache

    @model_validator(mode="after")
    def _one_number_a_step(self) -> Calibration:
        steps = self.schedule.steps
        rows = [self.time_changes, self.magnitude_ratios]
        rows += [row for branch in self.branches.values() for row in vars(branch).values()]
        if any(len(row) != steps for row in rows):
            raise ValueError(f"not {steps} numbers, one a step, in every row")
        return self

    def constants(self, source: str) -> CacheConstants:
        fit = self.teacache
        return CacheConstants(source, self.magnitude_ratios, fit.polynomial, fit.fitted)


def read_calibration(path: Path) -> Calibration:
    """The file's content. Raises ConfigError if it is missing, CheckpointError if it is damaged."""
    if not os.path.exists(path):
        raise ConfigError(f"step_cache_file: {path} does not exist; make it with `omniavatar calibrate`")
    values = read_json(path, MOST_BYTES, CheckpointError, "run `omniavatar calibrate` again")
    try:
        return Calibration.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        message = f"{field}: {first['msg']}" if field else first["msg"]
        raise CheckpointError(
            f"{path}: not written by this version of `omniavatar calibrate`, or damaged "
            f"({message.removeprefix('Value error, ')}); run `omniavatar calibrate` again"
        ) from None


def model_identity(model: ModelConfig, dit: DiTConfig) -> Model:
    """The model of a measurement: sizes of the DiT, and hashes of all its weight files."""
    return Model(sizes={name: getattr(dit, name) for name in SIZES}, weights=_weights(model))


def _weights(model: ModelConfig) -> dict[str, str]:
    if model.weights == "random":
        return {"random weights": model.scale}
    found = _digests("base", model.dit_path)
    if model.exp_path is not None:
        found |= _digests("adapter", [model.exp_path])
        found["adapter scale"] = f"rank {model.lora_rank}, alpha {model.lora_alpha}"
    for lora in model.loras:
        for name, digest in _digests("LoRA", [lora.path]).items():
            found[f"{name} at {lora.strength:g}"] = digest
    return found


def _digests(kind: str, paths: Any) -> dict[str, str]:
    with TensorFiles(paths) as files:
        return {f"{kind} {path.name}": content_identity(path) for path in files.paths}


def default_path(model: ModelConfig, name: str = NAME) -> Path | None:
    """The file `name` in the adapter's folder, else in the DiT's; None for random weights."""
    if model.weights == "random" or not model.dit_path:
        return None
    source = model.exp_path or model.dit_path[0]
    return (source.parent if source.is_file() else source) / name


def constants_file(model: ModelConfig, sampling: SamplingConfig) -> Path | None:
    """The file that `step_cache_file` names, or with `auto` the one at the default path, if it exists."""
    if isinstance(sampling.step_cache_file, Path):
        return sampling.step_cache_file
    path = default_path(model) if sampling.step_cache_file == "auto" else None
    return path if path is not None and path.is_file() else None


def find_constants(model: ModelConfig, sampling: SamplingConfig, dit: DiTConfig) -> CacheConstants | None:
    """The step cache's constants: measured if `step_cache_file` leads to a file, else the published ones.

    None if neither exists, without a step cache, and if the configuration has TeaCache's coefficients.
    Raises ConfigError if the file is missing or of another schedule, CheckpointError if it is damaged or of
    another model.
    """
    policy = sampling.cache_policy
    if policy == "none" or (policy == "teacache" and sampling.teacache_coefficients != "auto"):
        return None
    path = constants_file(model, sampling)
    if path is None:
        return published_constants(model_scale(model.scale, dit.dim))
    calibration = read_calibration(path)
    check_model(path, calibration.model, model_identity(model, dit), REMEDY)
    check_schedule(path, calibration.schedule, sampling, REMEDY)
    return calibration.constants(f"measured on this model at {calibration.schedule.steps} steps ({path})")


def check_model(path: Path, then: Model, now: Model, remedy: str) -> None:
    """Raises CheckpointError, which ends with `remedy`, if a file was measured on another model."""
    for old, new in ((then.sizes, now.sizes), (then.weights, now.weights)):
        change = _first_change(old, new)
        if change is not None:
            raise CheckpointError(f"{path}: measured on another model ({change}); {remedy}")


def _first_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    for name in dict.fromkeys((*old, *new)):
        before, after = (_short(each.get(name, "absent")) for each in (old, new))
        if before != after:
            return f"{name}: {before} then, {after} now"
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def check_schedule(path: Path, then: MeasuredSchedule, sampling: SamplingConfig, remedy: str) -> None:
    """Raises ConfigError, which ends with `remedy`, if a file was measured with another schedule."""
    now = measured_schedule(sampling)
    names = ["sampler", "timesteps", *(["shift"] if now.timesteps is None else [])]
    for name in names:
        before, after = getattr(then, name), getattr(now, name)
        if before != after:
            raise ConfigError(
                f"{path}: measured with {name} {json.dumps(before)}, the run has {json.dumps(after)}; "
                f"{remedy}"
            )


def measured_schedule(sampling: SamplingConfig) -> MeasuredSchedule:
    """The schedule of `sampling`, in the form that the file stores."""
    return MeasuredSchedule(
        steps=sampling.steps, shift=sampling.shift, timesteps=sampling.timesteps, sampler=sampling.sampler
    )
