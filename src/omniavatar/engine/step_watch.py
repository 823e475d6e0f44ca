"""What a caller sees of each step: a callback as diffusers has it, and a progress bar.

A step is reported when the host has queued it. A callback that only looks at numbers of the host costs the
time of its own code. One that reads the latents waits for the device, which then no longer runs ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omniavatar.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from omniavatar.plan.run import RunPlan
    from omniavatar.types import Window

StepCallback = Callable[[Any, int, float, dict[str, Any]], "Mapping[str, Any] | None"]
"""Called as `callback(pipe, step, timestep, kwargs)` after each step."""
TENSORS = ("latents",)
"""Tensors that a callback can get."""


class StepWatch:
    """Passes the steps of one run on to a callback and to a progress bar.

    - pipe: the callback's first argument.
    - tensors: names of the tensors in the callback's last argument, of `TENSORS`.
    - bar: makes the progress bar for a number of steps; None: no bar.

    Raises InputError for another name.
    """

    def __init__(
        self,
        pipe: object,
        callback: StepCallback | None,
        tensors: Sequence[str],
        bar: Callable[[int], Any] | None,
    ) -> None:
        if isinstance(tensors, str) or (unknown := [name for name in tensors if name not in TENSORS]):
            shown = tensors if isinstance(tensors, str) else ", ".join(map(str, unknown))
            raise InputError(
                f"callback_on_step_end_tensor_inputs: {shown} is no list of known tensors; "
                f"give a list of {', '.join(TENSORS)}, or an empty one"
            )
        self._pipe, self._callback, self._tensors, self._make_bar = pipe, callback, tensors, bar
        self._bar: Any = None
        self._first = self._windows = 0
        self._timesteps: tuple[float, ...] = ()

    def begin(self, plan: RunPlan, first: int) -> None:
        """Windows from number `first` on follow."""
        self._first, self._windows, self._timesteps = first, len(plan.windows), plan.schedule.timesteps
        if self._make_bar is not None:
            self._bar = self._make_bar((self._windows - first) * plan.steps)

    def step(self, window: Window, step: int, sample: Tensor) -> None:
        """Report a step. Raises InputError if the callback returns other latents, and what it raises."""
        if self._bar is not None:
            done = (window.index - self._first) * len(self._timesteps) + step + 1
            self._bar.update(done - self._bar.n)
        if self._callback is None:
            return
        given = {"latents": sample.clone()} if "latents" in self._tensors else {}
        values: dict[str, Any] = {**given, "window": window.index, "windows": self._windows}
        returned = self._callback(self._pipe, step, self._timesteps[step], values)
        if returned is None:
            return
        if not isinstance(returned, Mapping):
            raise InputError(
                f"callback_on_step_end: returned {type(returned).__name__}; return its last argument, or None"
            )
        latents = given.get("latents")
        if returned.get("latents", latents) is not latents:
            raise InputError(
                "callback_on_step_end: returned other latents; a video depends on its request and settings "
                "only, so return the latents that it got, or None"
            )

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
