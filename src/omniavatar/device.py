"""Choosing a device or a backend by name, and copies between host and device that block neither.

A `Backend` is one record: a way to do a job, where it is available, and how good it is. A `Registry` holds
the records of one setting. `auto`, `omniavatar doctor`, error messages, the check of the configuration and
the settings page read it.

An ordinary copy between pageable memory and a GPU drains the GPU's queue, and the GPU then idles until the
host has queued new work. `upload` and `download` use pinned memory and are only queued, in the order of the
current stream. An uploaded tensor may be used at once; a downloaded one may be read after `arrival`.
Without CUDA every copy is complete when the function returns.

torch is imported by the functions that need it: the configuration reads registries without loading torch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from omniavatar.errors import ConfigError, OmniAvatarError, ResourceError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def anywhere(where: Any) -> None:
    """The availability check of a backend that always runs."""


def always(*facts: Any) -> bool:
    """The check of a backend that `auto` may choose wherever it is available."""
    return True


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One backend of a setting: the only thing to write when a backend is added.

    - name: the value of the setting.
    - create: makes the backend; the registry's file states the arguments. Only it imports heavy packages.
    - exact: False if it changes results by more than rounding.
    - doc: one line for the settings page.
    - needs: the hardware and packages it needs, for the settings page.
    - unavailable: takes the device (video encoders: the picture size) and returns None if the backend can be
      used, else the reason with its remedy.
    - rank: `auto` takes the available backend with the highest rank; None: it is used by name only.
    - dtypes: the precisions it computes in, as the setting `dtype` names them; () for all.
    - suits: takes what `auto` passes to `Registry.choose`; False if `auto` must not take the backend.
    """

    name: str
    create: Callable[..., Any]
    exact: bool
    doc: str
    needs: str = "any device"
    unavailable: Callable[[Any], str | None] = anywhere
    rank: int | None = None
    suits: Callable[..., bool] = always
    dtypes: tuple[str, ...] = ()


B = TypeVar("B", bound=Backend)


class Registry(Generic[B]):
    """The backends of one setting by name, in the order they were registered.

    - setting: key of the setting, such as `runtime.attention`.
    - words: values of the setting that are not backends, such as `auto`.
    - unknown: the error of a name that is not registered.
    """

    def __init__(
        self,
        setting: str,
        *backends: B,
        words: tuple[str, ...] = (),
        unknown: type[OmniAvatarError] = ConfigError,
    ) -> None:
        self.setting, self.words = setting, words
        self._unknown = unknown
        self._backends: dict[str, B] = {}
        for backend in backends:
            self.register(backend)

    def __iter__(self) -> Iterator[B]:
        return iter(tuple(self._backends.values()))

    def register(self, backend: B) -> None:
        """Add a backend. Raises ValueError if its name is taken."""
        if backend.name in self.values:
            raise ValueError(f"{self.setting}: {backend.name!r} is registered already")
        self._backends[backend.name] = backend

    def unregister(self, name: str) -> None:
        """Remove the backend called `name`. Raises KeyError if it is not registered."""
        del self._backends[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all backends."""
        return tuple(self._backends)

    @property
    def values(self) -> tuple[str, ...]:
        """All values of the setting: the words, then the names."""
        return (*self.words, *self.names)

    def get(self, name: str) -> B:
        """The backend called `name`. Raises the registry's error if it is not registered."""
        if name not in self._backends:
            raise self._unknown(f"{self._field}: {name!r} is not known; {self._remedy(self.names)}")
        return self._backends[name]

    def usable(self, name: str, where: Any) -> B:
        """The backend called `name`. Raises ResourceError if it cannot be used at `where`."""
        if name not in self._backends:
            available = self._remedy(self.available(where))
            raise self._unknown(f"{self._field}: {name!r} is not known; {available}")
        backend = self._backends[name]
        reason = backend.unavailable(where)
        if reason is not None:
            available = self._remedy(self.available(where))
            raise ResourceError(f"{self._field}: {name} cannot be used here ({reason}); {available}")
        return backend

    def available(self, where: Any) -> tuple[str, ...]:
        """Names of the backends that can be used at `where`."""
        return tuple(name for name, reason in self.reasons(where).items() if reason is None)

    def reasons(self, where: Any) -> dict[str, str | None]:
        """For each name the reason why it cannot be used at `where`, None if it can."""
        return {backend.name: backend.unavailable(where) for backend in self}

    def ranked(self, where: Any) -> list[B]:
        """The available backends that have a rank, the best first."""
        ranked = [each for each in self if each.rank is not None and each.unavailable(where) is None]
        return sorted(ranked, key=lambda each: each.rank or 0, reverse=True)

    def choose(self, where: Any, *facts: Any) -> B | None:
        """What `auto` stands for: the best ranked backend available at `where` that suits `facts`."""
        return next((backend for backend in self.ranked(where) if backend.suits(where, *facts)), None)

    def resolve(self, value: str, where: Any, *facts: Any) -> B:
        """The backend for a value of the setting, `auto` included.

        Raises the registry's error for an unknown name, ResourceError if nothing can be used.
        """
        if value != "auto":
            return self.usable(value, where)
        chosen = self.choose(where, *facts)
        if chosen is None:
            raise ResourceError(f"{self._field}: no backend can be used here; {self._remedy(self.names)}")
        return chosen

    @property
    def _field(self) -> str:
        return self.setting.rpartition(".")[2]

    def _remedy(self, names: tuple[str, ...]) -> str:
        return f"use one of: {', '.join((*self.words, *names))}"


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported."""
    return importlib.util.find_spec(package) is not None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability (major, minor) of a CUDA device, (0, 0) for other devices."""
    import torch

    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def choose_device(name: str) -> torch.device:
    """The device called `name`, a CUDA device with its number; `auto` is CUDA if a GPU is available.

    Raises ResourceError if the device does not exist.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ResourceError("device: no CUDA device is available; use device=cpu or device=auto")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ResourceError(
                f"device: {name} does not exist, this machine has {torch.cuda.device_count()} CUDA devices; "
                "choose a lower number"
            )
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
    return device


PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Torch's names of the dtypes that a configuration can name."""


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a configuration calls bf16, fp16 or fp32."""
    import torch

    dtype: torch.dtype = getattr(torch, PRECISIONS[name])
    return dtype


def precision_name(dtype: torch.dtype) -> str:
    """What a configuration calls a dtype: bf16, fp16 or fp32; torch's name for others."""
    name = str(dtype).removeprefix("torch.")
    return next((ours for ours, torchs in PRECISIONS.items() if torchs == name), name)


def device_name(device: torch.device) -> str:
    """Name of the device for users: the GPU's model, or cpu."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def free_disk(folder: Path) -> int:
    """Free bytes of the disk that holds `folder`, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` of host `values`, which may be changed or freed at once."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def download(values: Tensor) -> Tensor:
    """A copy of `values` in host memory, complete once an `arrival` made after this call has returned."""
    import torch

    if values.device.type != "cuda":
        return values.cpu()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def arrival(device: torch.device) -> Callable[[], None]:
    """A function that blocks until `device` has done all that is queued now; any thread may call it."""
    import torch

    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event.synchronize
