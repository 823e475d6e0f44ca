"""A live session on disk: what a later one needs to continue the same video.

A safetensors file. Tensors `maker.*` are the maker's (`BlockMaker.state`): cache, position, seed. `fed` is
the sound that the model has but nobody heard. The clock's numbers are in the metadata. Sound that waits for
its block is not kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniavatar.errors import ResumeError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from omniavatar.live.player import Player

_FORM = "omniavatar live session 1"
_MAKER = "maker."


@dataclass(frozen=True, eq=False)
class SavedSession:
    """A session read from a file. path: for messages."""

    path: Path
    maker: dict[str, Tensor]
    fed: np.ndarray
    clock: dict[str, Any]


def save_state(player: Player, path: Path) -> None:
    """Write the session's state, completely or not at all. It runs between two blocks. Raises OutputError."""
    import torch
    from safetensors.torch import save

    from omniavatar.media.atomic import atomic_write_bytes

    player.settle()
    clock = player.clock_state()
    tensors = {_MAKER + name: value.contiguous() for name, value in player.maker.state().items()}
    tensors["fed"] = torch.from_numpy(clock.pop("fed"))
    metadata = {"form": _FORM, "clock": json.dumps(clock)}
    atomic_write_bytes(path, save(tensors, metadata))


def load_state(path: Path) -> SavedSession:
    """A file of `save_state`. Raises ResumeError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("form") != _FORM:
                raise ResumeError(f"{path}: is not a saved live session; give a file of LiveSession.save")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        clock = json.loads(metadata["clock"])
        fed = tensors.pop("fed").numpy()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ResumeError(f"{path}: is no saved live session ({error}); start a new one") from None
    maker = {name.removeprefix(_MAKER): value for name, value in tensors.items()}
    return SavedSession(path, maker, fed, clock)


def restore(player: Player, saved: SavedSession) -> None:
    """Let a new session continue a saved one. Raises ResumeError if it does not fit."""
    try:
        player.maker.restore(saved.maker)
    except ResumeError as error:
        raise ResumeError(f"{saved.path}: {error}") from None
    player.restore_clock({**saved.clock, "fed": saved.fed})
