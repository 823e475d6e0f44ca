"""Muon for many matrices: matrices of one shape are stacked and orthogonalised by batched products.

The steps equal those of `torch.optim.Muon` (Jordan et al. 2024, with `adjust_lr_fn="match_rms_adamw"` of Liu
et al. 2025, "Muon is scalable for LLM training"). That implementation processes matrices one by one and
spends most of its time on launching small kernels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
STEPS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (N, R, C) with singular values near 1, by five Newton-Schulz steps; bfloat16 on CUDA."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum; a step has the root mean square of an AdamW step.

    Parameters must be 2-D weights. lr, weight_decay (decoupled) and momentum as in `torch.optim.Muon`.
    """

    def __init__(
        self, weights: Iterable[Tensor], lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            if any(weight.dim() != 2 for weight in group["params"]):
                raise ValueError("Muon accepts only matrices")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step for the weights with a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                gradients = torch.stack([weight.grad for weight in weights if weight.grad is not None])
                state = self.state[weights[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(gradients)
                moving: Tensor = state["momentum"]
                moving.lerp_(gradients, 1 - group["momentum"])
                step = orthogonalised(gradients.lerp(moving, group["momentum"])).to(weights[0].dtype)
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(step.unbind()), alpha=-rate)
