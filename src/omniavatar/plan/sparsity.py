"""The file of measured block masses, and the sparsity plan of a run.

`omniavatar calibrate --mode sparse` writes the file (`measure.sparse_calibration`), by default as
`sparse_attention.safetensors` beside the checkpoint. It holds the levels of `sampling.sparsity.MassLevels`,
so one measurement serves every density. docs/sparse_attention.md describes the format. It is read strictly:
another model, grid, block size or schedule is an error, and so is a file that is cut or changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omniavatar.config.schema import PipelineConfig, SamplingConfig
from omniavatar.config.sparsity import SPARSE_NAME
from omniavatar.errors import CheckpointError, ConfigError
from omniavatar.media.atomic import atomic_write_bytes
from omniavatar.plan.calibration import (
    MeasuredSchedule,
    Model,
    check_model,
    check_schedule,
    default_path,
    model_identity,
)
from omniavatar.plan.run import PATCH, VAE_STRIDE, RunPlan, WindowShape, make_plan, window_shape
from omniavatar.sampling.sparsity import MassLevels, PlanShape, SparsityPlan, cut_of_mass, window_plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from omniavatar.config.sparsity import SparsityConfig
    from omniavatar.model.sizes import DiTConfig
    from omniavatar.types import StepPlan

HEADER, LEVELS = "omniavatar_sparse_attention", "levels"
"""The file's metadata, and its only tensor."""
SPARSE_REMEDY = "run `omniavatar calibrate --mode sparse` with this config"
Limit = Callable[[int], float]
"""By the tokens of a window, the share that a sparse layer may compute at most."""


def always_sparse(tokens: int) -> float:
    """The limit without one: no layer runs dense, however much it keeps."""
    return 1.0


class SparseHeader(BaseModel):
    """The metadata of the file.

    - grid: latent frames, token rows and columns of a window. block: tokens of a block.
    - dense_steps: first steps that were not measured.
    - measured: time, machine and versions, for people; no code reads them.
    - sha256: of the levels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    model: Model
    schedule: MeasuredSchedule
    grid: tuple[int, int, int]
    block: int = Field(ge=1)
    dense_steps: int = Field(ge=0)
    measured: dict[str, Any]
    sha256: str


def write_levels(path: Path, header: SparseHeader, levels: NDArray[np.uint8]) -> SparseHeader:
    """Write the file whole or not at all; returns its header, with the checksum. Raises OutputError."""
    from safetensors.numpy import save

    header = header.model_copy(update={"sha256": _checksum(levels)})
    atomic_write_bytes(path, save({LEVELS: levels}, {HEADER: header.model_dump_json()}))
    return header


def read_levels(path: Path) -> tuple[SparseHeader, NDArray[np.uint8]]:
    """Header and levels of the file, by themselves sound.

    Raises ConfigError if it is missing or no file, CheckpointError if it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise ConfigError(f"sparse_file: {path} {what}; make it with `omniavatar calibrate --mode sparse`")
    try:
        with safe_open(path, "np") as file:
            found = (file.metadata() or {}).get(HEADER)
            if found is None or list(file.keys()) != [LEVELS]:
                raise _damaged(path, f"it does not hold {LEVELS!r} and their description")
            header = SparseHeader.model_validate_json(found)
            levels = file.get_tensor(LEVELS)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise _damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    _check_levels(path, header, levels)
    return header, levels


def is_sparse_file(path: Path) -> bool:
    """Whether `path` is missing, empty, or a file that `write_levels` wrote."""
    from safetensors import SafetensorError, safe_open

    if not path.exists() or not path.stat().st_size:
        return True
    try:
        with safe_open(path, "np") as file:
            return HEADER in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _check_levels(path: Path, header: SparseHeader, levels: NDArray[Any]) -> None:
    sizes = header.model.sizes
    if min(header.grid) < 1 or not {"num_layers", "num_heads"} <= set(sizes):
        raise _damaged(path, "its sizes are not those of a model")
    blocks = PlanShape(1, 1, 1, header.grid, header.block).blocks
    expected = (sizes["num_layers"], sizes["num_heads"], blocks, blocks)
    if levels.dtype != np.uint8 or levels.ndim != 5 or levels.shape[1:] != expected or not len(levels):
        raise _damaged(path, f"levels are {levels.dtype} {levels.shape}, not uint8 (groups, *{expected})")
    if _checksum(levels) != header.sha256:
        raise _damaged(path, "the levels are not those that were written")
    if levels.min(-1).any():
        raise _damaged(path, "a row keeps no block")


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not written by this version of `omniavatar calibrate --mode sparse`, or damaged "
        f"({reason}); {SPARSE_REMEDY}"
    )


def _checksum(levels: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(levels).tobytes()).hexdigest()


def sparse_path(config: PipelineConfig) -> Path | None:
    """The file that `sparse_file` names, with `auto` the one beside the checkpoint; None: no checkpoint."""
    chosen = config.sparsity.sparse_file
    return chosen if isinstance(chosen, Path) else default_path(config.model, SPARSE_NAME)


def plan_shape(config: PipelineConfig, shape: WindowShape, dit: DiTConfig) -> PlanShape:
    """What a plan for windows of `shape` is for."""
    rows, columns = (side // (VAE_STRIDE * PATCH) for side in shape.size)
    grid = (shape.latent_frames, rows, columns)
    return PlanShape(shape.steps, dit.num_layers, dit.num_heads, grid, config.sparsity.sparse_block_size)


def find_sparsity(
    config: PipelineConfig,
    shape: WindowShape,
    dit: DiTConfig,
    sampling: SamplingConfig | None = None,
    limit: Limit = always_sparse,
) -> SparsityPlan | None:
    """The sparsity plan for windows of `shape`; None where attention is dense.

    - sampling: the request's; None means the configuration's.
    - limit: layers that would compute a larger share than it says run dense (`sparse_registry.break_even`).

    Raises ConfigError if the settings do not fit the run, or the file is missing or of another schedule,
    CheckpointError if the file is damaged or of another model.
    """
    wanted = config.sparsity
    if wanted.sparse_attention == "dense":
        return None
    ranks = config.runtime.sp_size
    if dit.num_heads % ranks:
        raise ConfigError(
            f"sparse_attention: sp_size must divide the model's {dit.num_heads} heads, {ranks} does not; "
            "change sp_size or set sparse_attention to dense"
        )
    wanted.check_steps(shape.steps)
    target, dense = plan_shape(config, shape, dit), wanted.dense_steps(shape.steps)
    if wanted.sparse_attention == "window":
        plan = window_plan(target, target.order, wanted.density, range(dense))
    else:
        levels = _measured_levels(config, target, dit, sampling or config.sampling)
        plan = levels.plan(shape.steps, dense, _cut(wanted, levels))
    return plan.dense_above(limit(target.tokens))


def _cut(wanted: SparsityConfig, levels: MassLevels) -> int:
    if wanted.sparse_mass is not None:
        return cut_of_mass(wanted.sparse_mass)
    return levels.cut_of_density(wanted.density)


def _measured_levels(
    config: PipelineConfig, target: PlanShape, dit: DiTConfig, sampling: SamplingConfig
) -> MassLevels:
    path = sparse_path(config)
    if path is None:
        raise ConfigError("sparse_file: random weights have no folder; name the file, or use window")
    header, levels = read_levels(path)
    remedy = f"{SPARSE_REMEDY}, or set sparse_attention to window"
    check_model(path, header.model, model_identity(config.model, dit), remedy)
    check_schedule(path, header.schedule, sampling, remedy)
    for name, then, now in (
        ("windows of {} latent frames x rows x columns of tokens", header.grid, target.grid),
        ("blocks of {} tokens", (header.block,), (target.block,)),
    ):
        if then != now:
            then_text, now_text = (" x ".join(map(str, each)) for each in (then, now))
            raise ConfigError(
                f"{path}: measured for {name.format(then_text)}, the run has {now_text}; {remedy}"
            )
    return MassLevels(target, levels)


def sparse_shape(
    config: PipelineConfig,
    size: tuple[int, int],
    has_audio: bool,
    dit: DiTConfig,
    sampling: SamplingConfig | None = None,
    limit: Limit = always_sparse,
) -> WindowShape:
    """`plan.run.window_shape`, with its sparsity plan. Raises what `find_sparsity` raises."""
    shape = window_shape(config, size, has_audio, sampling)
    return replace(shape, sparsity=find_sparsity(config, shape, dit, sampling, limit))


def plan_sparse_run(
    config: PipelineConfig,
    size: tuple[int, int],
    audio_samples: int | None,
    dit: DiTConfig,
    step_plan: StepPlan | None = None,
    limit: Limit = always_sparse,
) -> RunPlan:
    """`plan.run.plan_run`, with its sparsity plan. Raises what `find_sparsity` raises."""
    shape = sparse_shape(config, size, audio_samples is not None, dit, None, limit)
    plan = make_plan(config, shape, audio_samples)
    return plan if step_plan is None else plan.decided(step_plan)
