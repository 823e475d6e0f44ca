"""Settings of sparse attention: which blocks of the self-attention matrix are computed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from omniavatar.config.backends import backend_name
from omniavatar.config.values import FieldError, Real, Section, Whole, choice_or_path
from omniavatar.errors import ConfigError

SPARSE_NAME = "sparse_attention.safetensors"
"""Default name of the file of measured blocks."""
DENSITY = 0.5
"""The density of a plan for which none is set."""
MEASURED = frozenset({"sparse_mass", "sparse_file"})
"""Fields that only `sparse_attention: calibrated` reads."""
DENSE_PART = 4
"""Without `sparse_dense_steps`, one step of this many stays dense, rounded up."""


def _file(value: Any) -> Any:
    """`auto` or a path; there is no plan without a file, so no `none`."""
    if value == "none":
        raise ValueError("must be a path or auto; set sparse_attention to dense to compute every block")
    return choice_or_path(value)


class SparsityConfig(Section):
    """Which blocks of the self-attention matrix are computed (docs/sparse_attention.md)."""

    sparse_attention: Literal["dense", "window", "calibrated"] = "dense"
    """dense: every block. window: the nearest blocks in time and space. calibrated: the blocks that
    `omniavatar calibrate --mode sparse` found to matter on this model."""
    sparse_density: Real | None = Field(None, gt=0, le=1)
    """Share of the matrix that a sparse step computes; unset: 0.5."""
    sparse_mass: Real | None = Field(None, gt=0, le=1)
    """With calibrated, instead of sparse_density: the share of the softmax that is kept in each row."""
    sparse_dense_steps: Whole | None = Field(None, ge=0)
    """First steps that stay dense; unset: a quarter of the steps, rounded up (1 of 4, 7 of 25)."""
    sparse_block_size: Whole = Field(128, ge=1, le=4096)
    """Tokens of a block. The fast backends take 128; small models on a CPU need smaller blocks."""
    sparse_file: Annotated[Literal["auto"] | Path, BeforeValidator(_file)] = "auto"
    """With calibrated: the file to use; auto: the file beside the checkpoint."""
    sparse_backend: Annotated[str, BeforeValidator(backend_name("sparsity.sparse_backend"))] = "auto"
    """Implementation of sparse attention; auto: the fastest one for this device and attention backend."""

    @property
    def density(self) -> float:
        """The density to compute where no mass is set."""
        return DENSITY if self.sparse_density is None else self.sparse_density

    def dense_steps(self, steps: int) -> int:
        """How many of `steps` stay dense, from the first one."""
        configured = self.sparse_dense_steps
        return math.ceil(steps / DENSE_PART) if configured is None else min(steps, configured)

    def check_steps(self, steps: int) -> None:
        """Raise ConfigError if all of `steps` stay dense."""
        dense = self.dense_steps(steps)
        if self.sparse_attention != "dense" and dense >= steps:
            raise ConfigError(
                f"sparse_dense_steps: {dense} of {steps} steps stay dense, so nothing is sparse; lower it, "
                "use more steps, or set sparse_attention to dense"
            )

    @model_validator(mode="after")
    def _combined(self) -> SparsityConfig:
        name = self.sparse_attention
        fields = type(self).model_fields
        unread = {"dense": set(fields), "window": MEASURED, "calibrated": frozenset()}[name]
        for field in fields:
            if field in unread - {"sparse_attention"} and getattr(self, field) != fields[field].default:
                others = "calibrated" if field in MEASURED else "window or calibrated"
                raise FieldError(
                    f"has no effect with sparse_attention: {name}; leave it out or set sparse_attention to "
                    f"{others}",
                    field,
                    "sparse_attention",
                )
        if self.sparse_mass is not None and self.sparse_density is not None:
            raise FieldError(
                "sparse_mass and sparse_density both say how much is kept; set only one",
                "sparse_mass",
                "sparse_density",
            )
        return self
