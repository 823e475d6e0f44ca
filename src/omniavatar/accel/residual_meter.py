"""Measures how the block stack's residual changes from step to step, in windows that compute every step.

It takes the place of `ResidualCache` (both are a `PassRunner`) and changes no result. Each branch's residual
is kept until the branch's next step and compared with the new one on the device, in float32, a few thousand
tokens at a time. Nothing waits for the device before `changes`. It costs the memory of one residual for each
branch, and a few passes over the tokens in each forward.
Source of what is measured: MagCache (arXiv 2506.09045), TeaCache (arXiv 2411.19108).
"""

from __future__ import annotations

import torch
from torch import Tensor

from omniavatar.accel.residual_cache import PassRunner
from omniavatar.model.dit import RunBlocks
from omniavatar.model.layers import BlockInputs
from omniavatar.sampling.calibration import ResidualChanges
from omniavatar.sampling.passes import Pass

TOKENS_A_PIECE = 4096
SMALLEST = 1e-12
Figures = dict[str, list[Tensor]]
"""For each branch, from its second step on, the four figures of `ResidualChanges`."""


class ResidualMeter:
    """Pass `window` to `WindowGenerator` as `make_cache`, call `keep` after each window, read `changes`."""

    def __init__(self) -> None:
        self._begun: Figures = {}
        self._windows: list[Figures] = []

    def window(self, run_blocks: RunBlocks) -> PassRunner:
        """The runner of one window. Figures of a window that was not kept are dropped."""
        self._begun = {}
        return _WindowMeter(run_blocks, self._begun)

    def keep(self) -> None:
        """Keep the figures of the last window."""
        self._windows.append(self._begun)

    def changes(self) -> dict[str, ResidualChanges]:
        """For each branch the median over the kept windows, one number for each step."""
        found = {}
        for name in self._windows[0]:
            rows = torch.stack([torch.stack(window[name]) for window in self._windows])
            columns = rows.double().cpu().quantile(0.5, dim=0).T.tolist()
            first = (1.0, 0.0, 0.0, 0.0)
            found[name] = ResidualChanges(*((a, *c) for a, c in zip(first, columns, strict=True)))
        return found


class _WindowMeter:
    """Appends to `rows`; keeps the residuals of one window."""

    def __init__(self, run_blocks: RunBlocks, rows: Figures) -> None:
        self._run_blocks, self._rows = run_blocks, rows
        self._residuals: dict[str, Tensor] = {}

    def runner(self, each: Pass) -> RunBlocks:
        branch = each.branch.name

        def run_and_compare(tokens: Tensor, inputs: BlockInputs) -> Tensor:
            after = self._run_blocks(tokens, inputs)
            residual = after - tokens
            rows = self._rows.setdefault(branch, [])
            if branch in self._residuals:
                rows.append(compare_residuals(residual, self._residuals[branch]))
            self._residuals[branch] = residual
            return after

        return run_and_compare


def compare_residuals(new: Tensor, old: Tensor) -> Tensor:
    """Magnitude ratio, its standard deviation, cosine distance and relative L1 change (4,) float32.

    new, old: (B, L, C), any float dtype; computed in float32.
    """
    new, old = new.flatten(0, -2), old.flatten(0, -2)
    ratios, cosines = [], []
    change = size = torch.zeros((), device=new.device)
    for a, b in zip(new.split(TOKENS_A_PIECE), old.split(TOKENS_A_PIECE), strict=True):
        a, b = a.float(), b.float()
        norm_a, norm_b = a.norm(dim=-1), b.norm(dim=-1)
        ratios.append(norm_a / norm_b.clamp_min(SMALLEST))
        cosines.append((a * b).sum(-1) / (norm_a * norm_b).clamp_min(SMALLEST))
        change = change + (a - b).abs().sum()
        size = size + b.abs().sum()
    ratio = torch.cat(ratios)
    return torch.stack(
        [
            ratio.mean(),
            ratio.std(correction=0),
            1.0 - torch.cat(cosines).mean(),
            change / size.clamp_min(SMALLEST),
        ]
    )
