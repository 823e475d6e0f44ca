"""What lies on the device: the placement in force, streamed blocks, captured graphs, the VAE's passes.

`place` plans a request's `Placement`, and `adopt` puts it in force. Streamed blocks are loaded into host
memory and are never all on the device together. Later requests and `step_down` may move more blocks to host
memory; no block moves back.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

from omniavatar.engine.events import Message
from omniavatar.engine.host import Host
from omniavatar.engine.retry import Result, retry_with_less
from omniavatar.errors import ResourceError
from omniavatar.plan.memory import fewer_resident
from omniavatar.plan.placement import QUANTIZE_FIELD, Placement, place

if TYPE_CHECKING:
    from omniavatar.accel.graphs import Capture, GraphedBlocks
    from omniavatar.accel.offload import OffloadConfig, Offloader
    from omniavatar.accel.vae import FastVAE
    from omniavatar.config.schema import PipelineConfig
    from omniavatar.model.dit import RunBlocks, WanDiT
    from omniavatar.model.layers import BlockInputs
    from omniavatar.model.sizes import DiTConfig
    from omniavatar.plan.run import WindowShape
    from omniavatar.types import Recorder


class Residency:
    """Places the models of one configuration on one device.

    - captures: whether the exchanges inside a forward can be captured in a CUDA graph.
    - capture: makes the object that captures graphs; None means CUDA's.
    """

    def __init__(
        self,
        config: PipelineConfig,
        dit: DiTConfig,
        vae_name: str,
        device: torch.device,
        recorder: Recorder,
        captures: bool = True,
        host: Host | None = None,
        capture: Callable[[], Capture] | None = None,
    ) -> None:
        self._config, self._dit_config, self._vae_name, self._device = config, dit, vae_name, device
        self._recorder, self._captures, self._new_capture = recorder, captures, capture
        self._host = host or Host()
        self._placement: Placement | None = None
        self._dit: WanDiT | None = None
        self._offloader: Offloader | None = None
        self._graphs: GraphedBlocks | None = None
        self._capture: Capture | None = None
        self._wrapped: WeakSet[GraphedBlocks] = WeakSet()
        self._vaes: list[FastVAE] = []

    @property
    def placement(self) -> Placement:
        """The placement in force. Raises RuntimeError if none has been adopted."""
        if self._placement is None:
            raise RuntimeError("no placement is in force yet: place and adopt one first")
        return self._placement

    def place(self, shape: WindowShape, kept: Mapping[str, str | int]) -> Placement:
        """Plan where the models lie for a request. Nothing moves yet; the plan keeps what is loaded.

        - kept: values of `Placement.identity` from the run that is resumed.

        Raises ResourceError if the request does not fit.
        """
        if self._offloader is not None:
            kept = {**kept, QUANTIZE_FIELD: self.placement.quantize}
        planned = place(
            self._config,
            self._dit_config,
            shape,
            self._vae_name,
            self._device,
            self._limit,
            kept,
            self._captures,
        )
        if self._offloader is None:
            return planned
        resident = self.placement.memory.resident_blocks
        memory = fewer_resident(planned.memory, resident, planned.dit, planned.run)
        return replace(planned, memory=memory, graphs=planned.graphs and not memory.streams)

    def adopt(self, placement: Placement) -> None:
        """Put `placement` in force: loaded models move now, others follow it when they are loaded."""
        before, self._placement = self._placement, placement
        if before is None or before.describe() != placement.describe():
            self._recorder.event(Message(placement.describe()))
        self.retry(self._arrange)

    def step_down(self, reason: str) -> None:
        """Use less GPU memory, after an allocation failed.

        Results stay equal to the bit, except that the last step makes the VAE's passes smaller.
        Raises ResourceError if no step is left.
        """
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        smaller = None
        if self._placement is not None and not self._config.runtime.use_fsdp:
            smaller = self._placement.step_down()
        if smaller is None:
            sampling = self._config.sampling
            if self._config.family.chunk is not None:
                raise ResourceError(
                    f"a chunk needs more GPU memory than is free ({reason}); use quantize=fp8, decoder=taehv "
                    "or a smaller size (image_sizes_720)"
                )
            name, value = ("max_tokens", self._config.video.max_tokens)
            if sampling.causal is not None:
                name, value = ("causal_window", sampling.causal_window)
            raise ResourceError(
                f"{name}: {value} needs more GPU memory than is free ({reason}); "
                f"lower {name}, use quantize=fp8 or the 1.3B model"
            )
        self._placement = smaller
        text = f"{reason}: retrying with less GPU memory. {smaller.describe()}"
        self._recorder.event(Message(text, "warning"))
        self.retry(self._arrange)

    def retry(self, run: Callable[[], Result]) -> Result:
        """`run()`; after a failed allocation, runs it again with less GPU memory."""
        return retry_with_less(run, self.step_down)

    def hold(self, dit: WanDiT) -> None:
        """Manage a loaded DiT: move the blocks that do not stay to host memory, prepare CUDA graphs."""
        from omniavatar.accel.offload import Offloader

        offloader = Offloader(dit, self._device)
        offloader.apply(self._offload)
        self._dit, self._offloader = dit, offloader
        self._capture_blocks()

    def hold_vae(self, vae: FastVAE) -> None:
        """Manage a VAE that works in passes."""
        self._vaes.append(vae)
        if self._placement is not None:
            vae.use_pass(self._placement.vae_latents)

    def release(self) -> None:
        """Forget everything that lies on the device."""
        self._clear_graphs()
        self._placement = self._dit = self._offloader = self._graphs = None
        self._vaes.clear()

    def use_vae_pass(self, latents: int) -> None:
        """Set the latents of one VAE pass. Ranks that share a picture need the leader's number."""
        for vae in self._vaes:
            vae.use_pass(latents)

    def wrap(self, run: RunBlocks) -> RunBlocks:
        """`run`, another way to run the DiT's blocks, as CUDA graphs while the placement in force says so."""
        graphs: list[GraphedBlocks] = []

        def run_blocks(tokens_BLC: Tensor, inputs: BlockInputs) -> Tensor:
            if not self.placement.graphs:
                return run(tokens_BLC, inputs)
            if not graphs:
                graphs.append(self._graphed(run))
            return graphs[0](tokens_BLC, inputs)

        return run_blocks

    def _graphed(self, run: RunBlocks) -> GraphedBlocks:
        from omniavatar.accel.graphs import CudaCapture, GraphedBlocks

        if self._capture is None:
            self._capture = (self._new_capture or CudaCapture)()
        graphed = GraphedBlocks(run, self._capture)
        self._wrapped.add(graphed)
        return graphed

    def run_blocks(self, tokens_BLC: Tensor, inputs: BlockInputs) -> Tensor:
        """Run the DiT's blocks, as CUDA graphs if the placement in force says so."""
        assert self._dit is not None
        if self._graphs is None:
            return self._dit.run_blocks(tokens_BLC, inputs)
        return self._graphs(tokens_BLC, inputs)

    def has_room_for(self, count: int) -> bool:
        """Whether `count` more bytes fit on the device."""
        limit = self._limit
        if limit is None:
            return True
        held = torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0
        return held + count <= limit

    @property
    def _limit(self) -> int | None:
        return self._host.memory_limit(self._config.runtime, self._device)

    @property
    def _offload(self) -> OffloadConfig:
        from omniavatar.accel.offload import OffloadConfig

        memory = self.placement.memory
        return OffloadConfig(memory.resident_blocks, memory.ring)

    def _arrange(self) -> None:
        placement = self.placement
        if not placement.graphs:
            self._clear_graphs()
            self._graphs = None
        self._capture_blocks()
        if self._offloader is not None:
            self._offloader.apply(self._offload)
        self.use_vae_pass(placement.vae_latents)

    def _clear_graphs(self) -> None:
        for graphed in (*([] if self._graphs is None else [self._graphs]), *self._wrapped):
            graphed.clear()

    def _capture_blocks(self) -> None:
        if self._dit is not None and self._graphs is None and self.placement.graphs:
            from omniavatar.accel.graphs import CudaCapture, GraphedBlocks

            self._graphs = GraphedBlocks(self._dit.run_blocks, (self._new_capture or CudaCapture)())
