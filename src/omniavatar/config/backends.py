"""The settings whose values are backends, and the registry of each.

The rooms that own the backends hold the registries; some of these rooms are above this one. A registry is
imported by name when a value is checked, so the configuration does not depend on a room above it and loads no
heavy package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from omniavatar.device import Registry

REGISTRIES: Mapping[str, str] = MappingProxyType(
    {
        "model.family": "omniavatar.config.families:FAMILIES",
        "model.decoder": "omniavatar.accel.decoder:DECODERS",
        "sampling.sampler": "omniavatar.sampling.samplers:SAMPLERS",
        "output.encoder": "omniavatar.media.h264:ENCODERS",
        "runtime.attention": "omniavatar.accel.attention.registry:ATTENTION",
        "runtime.quantize": "omniavatar.accel.precision:PRECISIONS",
        "runtime.vae": "omniavatar.accel.vae_runners:VAES",
        "sparsity.sparse_backend": "omniavatar.accel.attention.sparse_registry:SPARSE",
    }
)
"""Setting: module and name of its registry."""


@dataclass(frozen=True)
class BackendRow:
    """One row of the settings page.

    exact: whether the backend changes results only by rounding.
    """

    setting: str
    name: str
    exact: bool
    doc: str
    needs: str


def registry(setting: str) -> Registry[Any]:
    """The registry of a setting in `REGISTRIES`."""
    module, _, name = REGISTRIES[setting].partition(":")
    found: Registry[Any] = getattr(import_module(module), name)
    return found


def backend_rows() -> list[BackendRow]:
    """All backends of all settings, in the order of the settings and of registration."""
    return [
        BackendRow(setting, backend.name, backend.exact, backend.doc, backend.needs)
        for setting in REGISTRIES
        for backend in registry(setting)
    ]


def backend_name(setting: str) -> Callable[[Any], Any]:
    """A check for the values of a setting, which raises ValueError with the allowed values."""

    def check(value: Any) -> Any:
        allowed = registry(setting).values
        if value not in allowed:
            raise ValueError(f"must be {alternatives(map(repr, allowed))}")
        return value

    return check


def alternatives(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
