"""A training step's loss and gradients as one CUDA graph.

Launched one by one, the pocket model's kernels keep the host longer than the device (84 ms a step against 74,
batch 64, H100). Replaying a graph leaves the host free to make the next batch and new clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.nets import forget_gradients

WARM_UP = 3


class GraphedStep:
    """`loss_of(batch)` and its gradients for `weights`, for batches of one form; CUDA only.

    Calls return the loss, which the next call overwrites, and leave the gradients in `weight.grad`: tensors
    that stay where they are and must not be dropped.
    """

    def __init__(
        self,
        loss_of: Callable[[dict[str, Tensor]], Tensor],
        batch: dict[str, Tensor],
        weights: Sequence[Tensor],
    ) -> None:
        self.batch = {name: value.clone() for name, value in batch.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                forget_gradients(weights)
                loss_of(self.batch).backward()  # type: ignore[no-untyped-call]
        torch.cuda.current_stream().wait_stream(side)
        forget_gradients(weights)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            loss = loss_of(self.batch)
            loss.backward()  # type: ignore[no-untyped-call]
            self.loss = loss.detach()

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        for name, value in batch.items():
            self.batch[name].copy_(value)
        self.graph.replay()
        return self.loss
