"""What the three stages share: a wall-clock budget, the optimiser with its rate, a pool of clips, a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training.nets import Average, cosine
from training.ranks import Ranks
from training.settings import StageSettings

CLIP_NORM = 1.0


@dataclass(eq=False)
class Budget:
    """Minutes of one stage in this session, after those of earlier ones; it is `over` on all ranks at the
    same step."""

    minutes: float
    planned: float
    before: float
    ranks: Ranks = field(default_factory=Ranks)
    over: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """Minutes since this session's stage began."""
        return (time.monotonic() - self.started) / 60

    def check(self, device: torch.device) -> None:
        """Once a step: is it over on any rank?"""
        self.over = self.ranks.any(self.spent >= self.minutes, device)

    def measuring(self, measured: float, seconds: float, steps: int) -> bool:
        """Whether to measure after `steps` steps, the last time having been at `measured` minutes; the first
        rank does."""
        due = (self.spent - measured) * 60 > seconds
        return self.ranks.leads and (due or self.over or steps == 1)

    @property
    def progress(self) -> float:
        """Share of all planned minutes that is behind us."""
        return (self.before + self.spent) / self.planned


class Log:
    """Rows of numbers of one run, printed as they come, by the first rank. A row has a stage, minutes, a
    step and measurements."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def add(self, stage: str, budget: Budget, step: int, **values: float) -> None:
        if not budget.ranks.leads:
            return
        minutes = round(budget.before + budget.spent, 3)
        self.rows.append({"stage": stage, "minutes": minutes, "step": step, **values})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"{stage} {minutes:6.2f} min  step {step:6d}  {shown}", flush=True)


class Optimiser:
    """AdamW over some modules with warm-up, cosine by time, clipped gradients and an average of the
    weights."""

    def __init__(self, modules: dict[str, nn.Module], settings: StageSettings, budget: Budget) -> None:
        self.parameters = [weight for module in modules.values() for weight in module.parameters()]
        matrices = [weight for weight in self.parameters if weight.dim() > 1]
        others = [weight for weight in self.parameters if weight.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        fused = self.parameters[0].is_cuda
        self.adam = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98), fused=fused)
        self.settings, self.budget, self.steps = settings, budget, 0
        self.average = Average(modules, settings.decay)

    def step(self, loss: Tensor) -> None:
        """One step down the ranks' mean `loss`; a step whose gradient is not finite is left out."""
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.budget.ranks.average([weight.grad for weight in self.parameters if weight.grad is not None])
        self.budget.check(loss.device)
        warm = min(1.0, (self.steps + 1) / self.settings.warmup)
        for group in self.adam.param_groups:
            group["lr"] = self.settings.rate * warm * cosine(self.budget.progress)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.steps += 1
        if not norm.isfinite():
            return
        self.adam.step()
        self.average.update()


class Pool:
    """Equal tensors of many clips on the device; new clips replace the oldest."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.filled, self.place = capacity, 0, 0
        self.tensors: dict[str, Tensor] = {}

    def add(self, clips: dict[str, Tensor]) -> None:
        """Put clips (n, ...) in."""
        if not self.tensors:
            self.tensors = {
                name: torch.empty(self.capacity, *value.shape[1:], dtype=value.dtype, device=value.device)
                for name, value in clips.items()
            }
        count = len(next(iter(clips.values())))
        rows = torch.arange(self.place, self.place + count, device=next(iter(clips.values())).device)
        for name, value in clips.items():
            self.tensors[name][rows % self.capacity] = value
        self.place = (self.place + count) % self.capacity
        self.filled = min(self.capacity, self.filled + count)

    def fill(
        self, make: Callable[[int], dict[str, Tensor]], at_once: int, budget: Budget, share: float
    ) -> None:
        """Fill the pool with `make(n)`, for at most a share of the budget, but never leave it empty."""
        while self.filled < self.capacity and (not self.filled or budget.spent < share * budget.minutes):
            self.add(make(min(at_once, self.capacity - self.filled)))

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`count` random clips; rows may repeat."""
        device = next(iter(self.tensors.values())).device
        rows = torch.randint(self.filled, (count,), device=device, generator=generator)
        return {name: value[rows] for name, value in self.tensors.items()}
