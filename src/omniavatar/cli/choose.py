"""The configuration of a command without `--config`: the best model whose weights are here, or `pocket`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

CONFIGS = Path("configs")
POCKET = Path("pocket")
BEST_FIRST = ("inference_optimized", "inference", "inference_1.3B_optimized", "inference_1.3B")
"""Configurations of the released models in `configs/`, the larger model first, the faster settings first."""


class Choice(NamedTuple):
    """A configuration, and the line that says why it was taken."""

    config: Path
    reason: str


def best_config(folder: Path) -> Choice:
    """The first of `BEST_FIRST` in `folder` that is ready to run on this machine, else the packaged model."""
    from omniavatar.device import choose_device
    from omniavatar.measure.doctor import config_row

    for path in (folder / f"{name}.yaml" for name in BEST_FIRST):
        if path.is_file() and config_row(path, choose_device("auto"))["ready"]:
            return Choice(path, f"no --config: taking {path}, the best model whose weights are here")
    return Choice(
        POCKET,
        "no --config: taking the packaged model, --config pocket; it knows rendered heads only "
        "(for photographs: omniavatar download 1.3B)",
    )
