"""Parts that the three stages share: a wall-clock budget, the optimiser and its rate, a clip pool, a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training.muon import Muon
from training.nets import Average, cosine, forget_gradients
from training.ranks import TrainingRanks
from training.settings import StageSettings

CLIP_NORM = 1.0
CHECK_EVERY = 10
"""Steps between two checks with the other ranks whether the time is over; a check waits for the device."""


def mixed(device: torch.device, cached: bool = True) -> torch.autocast:
    """bfloat16 on CUDA.

    - cached: keep converted weights until the context ends. Off for captured steps, and where some parts run
      without gradients: weights converted there have none, and the other parts would use them.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=cached)


@dataclass(eq=False)
class Budget:
    """Time budget of one stage in this session; `over` becomes true on all ranks in the same step.

    minutes: budget of this session.
    planned: minutes of all sessions.
    before: minutes spent in earlier sessions.
    """

    minutes: float
    planned: float
    before: float
    ranks: TrainingRanks = field(default_factory=TrainingRanks)
    over: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """Minutes since the stage began in this session."""
        return (time.monotonic() - self.started) / 60

    def check(self, device: torch.device) -> None:
        """Set `over` if the budget is spent on any rank."""
        self.over = self.ranks.any(self.spent >= self.minutes, device)

    def measuring(self, measured: float, seconds: float, steps: int) -> bool:
        """Whether this rank measures after `steps` steps; only the first rank does.

        measured: minutes at the last measurement.
        seconds: time between two measurements.
        """
        due = (self.spent - measured) * 60 > seconds
        return self.ranks.leads and (due or self.over or steps == 1)

    @property
    def progress(self) -> float:
        """Share of the planned minutes that is spent."""
        return (self.before + self.spent) / self.planned


class Log:
    """The measurements of one run, printed by the first rank. A row has a stage, minutes, a step and
    values."""

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
    """AdamW with warm-up, a cosine schedule by time, clipped gradients and averaged weights.

    With `muon_rate`, Muon trains the matrices of the transformer blocks (attention and feed-forward);
    embeddings, biases, norms and the head stay with AdamW. No step waits for the device.
    """

    def __init__(self, modules: dict[str, nn.Module], settings: StageSettings, budget: Budget) -> None:
        named = {
            f"{part}.{name}": weight
            for part, module in modules.items()
            for name, weight in module.named_parameters()
        }
        self.parameters = list(named.values())
        muon = settings.muon_rate > 0
        hidden, matrices, others = [], [], []
        for name, weight in named.items():
            if muon and ".blocks." in name and weight.dim() == 2:
                hidden.append(weight)
            else:
                (matrices if weight.dim() > 1 else others).append(weight)
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        fused = self.parameters[0].is_cuda
        adam = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98), fused=fused)
        self.rates: list[tuple[torch.optim.Optimizer, float]] = [(adam, settings.rate)]
        if hidden:
            self.rates.append((Muon(hidden, settings.muon_rate, weight_decay=0.01), settings.muon_rate))
        self.settings, self.budget, self.steps = settings, budget, 0
        self.average = Average(modules, settings.decay)

    def step(self, loss: Tensor) -> None:
        """One step on `loss`, averaged over the ranks."""
        forget_gradients(self.parameters)
        loss.backward()
        self.update()

    def update(self) -> None:
        """One step with the current gradients; gradients that are not finite count as zeros."""
        gradients = [weight.grad for weight in self.parameters if weight.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.budget.ranks.average(flat)
        norm = flat.norm()
        flat = flat.nan_to_num(0.0, 0.0, 0.0) * (CLIP_NORM / norm).clamp(max=1.0).nan_to_num(0.0)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        )
        share = min(1.0, (self.steps + 1) / self.settings.warmup) * cosine(self.budget.progress)
        for each, rate in self.rates:
            for group in each.param_groups:
                group["lr"] = rate * share
            each.step()
        self.steps += 1
        self.average.update()
        if self.budget.ranks.count == 1 or self.steps % CHECK_EVERY == 0:
            self.budget.check(flat.device)


class Pool:
    """Tensors of many clips on the device; new clips replace the oldest."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.filled, self.next_row = capacity, 0, 0
        self.tensors: dict[str, Tensor] = {}

    def add(self, clips: dict[str, Tensor]) -> None:
        """Add clips (n, ...)."""
        if not self.tensors:
            self.tensors = {
                name: torch.empty(self.capacity, *value.shape[1:], dtype=value.dtype, device=value.device)
                for name, value in clips.items()
            }
        count = len(next(iter(clips.values())))
        rows = torch.arange(self.next_row, self.next_row + count, device=next(iter(clips.values())).device)
        for name, value in clips.items():
            self.tensors[name][rows % self.capacity] = value
        self.next_row = (self.next_row + count) % self.capacity
        self.filled = min(self.capacity, self.filled + count)

    def fill(
        self, make: Callable[[int], dict[str, Tensor]], at_once: int, budget: Budget, share: float
    ) -> None:
        """Fill the pool with `make(n)` for at most `share` of the budget; at least one call is made."""
        while self.filled < self.capacity and (not self.filled or budget.spent < share * budget.minutes):
            self.add(make(min(at_once, self.capacity - self.filled)))

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`count` random clips; rows may repeat."""
        device = next(iter(self.tensors.values())).device
        rows = torch.randint(self.filled, (count,), device=device, generator=generator)
        return {name: value[rows] for name, value in self.tensors.items()}
