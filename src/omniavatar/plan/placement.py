"""How one request runs in the available memory: precision, resident blocks, VAE passes, CUDA graphs.

`plan.memory` makes the memory plan. This module gathers its inputs and chooses the precision: with
`quantize: auto`, 8-bit layers if exact weights would have to be streamed and the device supports them. The
precision and the VAE's pass size may change the video's last bits. So they belong to a request's identity
(`Placement.identity`), and a resumed run keeps the ones it started with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from omniavatar.accel.precision import PRECISIONS, best_quantize
from omniavatar.accel.vae_runners import pass_sizes
from omniavatar.errors import ResourceError
from omniavatar.model.sizes import DiTConfig
from omniavatar.plan.memory import MemoryPlan, plan_memory, plan_parameters, resident_blocks, smaller
from omniavatar.plan.sizes import (
    DTYPE_BYTES,
    DiTSizes,
    RunSizes,
    dit_sizes,
    graph_bytes,
    run_sizes,
    shared_out,
)

if TYPE_CHECKING:
    from omniavatar.config.schema import PipelineConfig
    from omniavatar.plan.run import WindowShape

QUANTIZE_FIELD, PASS_FIELD = "runtime.quantize", "runtime.vae_latents_a_pass"
IDENTITY_FIELDS = (QUANTIZE_FIELD, PASS_FIELD)
"""The values of a placement that decide the frames; a resumed run keeps them."""


@dataclass(frozen=True)
class Placement:
    """Precision and memory plan of one request.

    - vae_passes: latents of each pass size of the VAE.
    - note: added to the user's line about memory.
    """

    quantize: str
    memory: MemoryPlan
    dit: DiTSizes
    run: RunSizes
    vae_passes: tuple[int, ...]
    note: str = ""
    graphs: bool = False
    """The blocks run as CUDA graphs (`accel.graphs`)."""

    @property
    def vae_latents(self) -> int:
        """Latents of one decoding pass."""
        return self.vae_passes[self.memory.coding_pass]

    @property
    def streamed_bytes(self) -> int:
        """Bytes of host memory that streamed blocks take."""
        streamed = self.memory.blocks - self.memory.resident_blocks
        return streamed * (self.dit.block + self.dit.text_layers)

    def identity(self) -> dict[str, str | int]:
        """The values that decide the frames."""
        values: dict[str, str | int] = {QUANTIZE_FIELD: self.quantize}
        return {**values, PASS_FIELD: self.vae_latents} if len(self.vae_passes) > 1 else values

    def describe(self) -> str:
        """One line for the user."""
        graphs = "; blocks replayed as CUDA graphs" if self.graphs else ""
        return self.memory.describe() + graphs + self.note

    def step_down(self) -> Placement | None:
        """The next smaller placement with the same precision; None if there is none."""
        plan = smaller(self.memory, self.dit, self.run)
        return None if plan is None else replace(self, memory=plan, note="", graphs=False)


def wants_graphs(
    config: PipelineConfig,
    dit: DiTConfig,
    tokens: int,
    device: torch.device,
    captures: bool = True,
    share: float = 1.0,
) -> bool:
    """Whether to capture the blocks of a forward over `tokens` as graphs, if all stay on the device.

    - share: of the attention matrix that is computed.

    Raises ResourceError if `cuda_graphs` is set and not supported.
    """
    runtime = config.runtime
    if device.type != "cuda" or not captures:
        if runtime.cuda_graphs:
            lacking = "needs CUDA" if device.type != "cuda" else "needs exchanges by direct copies"
            raise ResourceError(f"cuda_graphs: {lacking}; leave it out")
        return False
    if runtime.cuda_graphs is not None:
        return runtime.cuda_graphs
    quantised = runtime.quantize not in ("none", "auto")
    return not runtime.use_fsdp and launches_show(dit, tokens, runtime.sp_size, share, quantised)


def place(
    config: PipelineConfig,
    dit: DiTConfig,
    shape: WindowShape,
    vae_name: str,
    device: torch.device,
    limit: int | None,
    kept: Mapping[str, str | int] | None = None,
    captures: bool = True,
) -> Placement:
    """The placement of a request within `limit` bytes.

    - kept: values of `Placement.identity` that must not change.
    - captures: `parallel.team.Team.captures`.

    Raises ResourceError if the request does not fit.
    """
    runtime, kept = config.runtime, kept or {}
    run = run_sizes(config, dit, shape, vae_name, device)
    lower = "max_tokens" if shape.causal is None else "causal_window"
    lower = lower if shape.chunk is None else "the size"
    vae_passes = pass_sizes(vae_name)
    passes = range(len(vae_passes))
    if kept.get(PASS_FIELD) in vae_passes:
        index = vae_passes.index(int(kept[PASS_FIELD]))
        passes = range(index, index + 1)

    def with_precision(quantize: str) -> Placement:
        plain = without_graphs(quantize)
        share = 1.0 if shape.sparsity is None else shape.sparsity.kept_share
        if not wants_graphs(config, dit, shape.tokens, device, captures, share):
            return plain
        memory = replace(plain.memory, peak=plain.memory.peak + graph_bytes(config, dit, shape))
        if memory.fits and not memory.streams:
            return replace(plain, memory=memory, graphs=True)
        if runtime.cuda_graphs:
            raise ResourceError(
                "cuda_graphs: needs every block on the device, which does not fit; leave it out"
            )
        return plain

    def without_graphs(quantize: str) -> Placement:
        sizes = dit_sizes(dit, DTYPE_BYTES[config.model.dtype], quantize != "none")
        if runtime.use_fsdp:
            sizes = shared_out(sizes, runtime.sp_size)
        if runtime.num_persistent_param_in_dit is not None:
            resident = resident_blocks(dit, runtime.num_persistent_param_in_dit)
            memory = plan_parameters(sizes, run, resident, limit, passes)
        else:
            memory = plan_memory(sizes, run, limit, passes, lower)
        if runtime.use_fsdp and memory.streams:
            raise ResourceError(
                f"use_fsdp: the weights do not fit on {runtime.sp_size} GPUs together; raise sp_size, or set "
                "use_fsdp to false so that blocks are streamed from host memory"
            )
        return Placement(quantize, memory, sizes, run, vae_passes)

    chosen = kept.get(QUANTIZE_FIELD) if runtime.quantize == "auto" else runtime.quantize
    if isinstance(chosen, str) and chosen in PRECISIONS.names and not PRECISIONS.get(chosen).exact:
        return with_precision(chosen)
    best = best_quantize(device)
    if chosen == "none" or best is None:
        exact = with_precision("none")
        if exact.memory.streams and best is not None and runtime.num_persistent_param_in_dit is None:
            stay = with_precision(best).memory.resident_blocks
            note = f"; quantize={best} would keep {stay} of {exact.memory.blocks}, at some loss of quality"
            return replace(exact, note=note)
        return exact
    try:
        exact = with_precision("none")
        if not exact.memory.streams:
            return exact
    except ResourceError:
        pass
    note = f"; {best} layers (quantize=auto: exact ones would be streamed)"
    return replace(with_precision(best), note=note)


SMALL_BLOCK = 2.4e12
"""Floating-point operations (4 ms at 600 TFLOP/s) below which a block takes less time than its launches.
On slower devices such a block takes longer; then a graph neither saves nor costs time."""
QUANTISED_SPEED = 1.5
"""How many more operations blocks of 8-bit layers do in that time: a 4-step window of the 1.3B has graphs."""


def launches_show(
    config: DiTConfig, tokens: int, ranks: int = 1, kept: float = 1.0, quantised: bool = False
) -> bool:
    """Whether a block over `tokens`, shared by `ranks`, computes faster than the host launches it.

    - kept: the share of the attention matrix that is computed. quantised: the layers are 8-bit ones.
    """
    own, width = tokens / ranks, config.dim
    products = 2 * own * width * (6 * width + 2 * config.ffn_dim)
    limit = SMALL_BLOCK * (QUANTISED_SPEED if quantised else 1)
    return products + kept * 4 * own * tokens * width < limit
