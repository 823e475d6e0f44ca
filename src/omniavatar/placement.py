"""How one request runs on the memory there is: sizes read off configuration and plan, the limit, the choice.

The plan itself is `accel.memory_plan`. Here are its inputs, and the one choice that is not about places:
`quantize: auto` takes float8 layers where exact weights would have to be streamed and the device can. Both
that and the VAE's pass size may change the video's last bits, so they belong to a request's identity
(`Placement.identity`), and a run that is resumed keeps those it began with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from omniavatar.accel.graphs import launches_show
from omniavatar.accel.memory_plan import (
    FLOAT,
    GB,
    DiTSizes,
    MemoryPlan,
    RunSizes,
    coding_bytes,
    denoise_bytes,
    dit_sizes,
    held_bytes,
    plan_memory,
    plan_parameters,
    resident_blocks,
    shared_out,
    smaller,
    tensor_bytes,
)
from omniavatar.accel.quantized import best_quantize
from omniavatar.accel.vae import pass_sizes
from omniavatar.checkpoint.layout import SCALES, Shape, text_tensors, wav2vec_tensors
from omniavatar.checkpoint.layout_vae import vae_tensors
from omniavatar.checkpoint.tiny_decoder import light_vae_config, tiny_decoder_config, tiny_decoder_tensors
from omniavatar.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from omniavatar.accel.apply import Quantize
    from omniavatar.config.schema import PipelineConfig
    from omniavatar.model.dit import DiTConfig
    from omniavatar.model.vae import VAEConfig
    from omniavatar.plan import RunPlan

CONTEXT_BYTES = GB // 2
"""Left free under `memory: auto`, for CUDA modules that are loaded later and for other programs."""
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
QUANTIZED_FORMS: tuple[Quantize, ...] = ("fp8", "int8")
SHARED_DECODERS = ("full", "lightvae")
"""Those that the fast VAE's layers run; the tiny ones take less time than sharing them would save."""
QUANTIZE_FIELD, PASS_FIELD = "runtime.quantize", "runtime.vae_latents_a_pass"


@dataclass(frozen=True)
class Placement:
    """The precision and places of one request; `vae_passes`: latents of each pass size the VAE has."""

    quantize: Quantize
    memory: MemoryPlan
    dit: DiTSizes
    run: RunSizes
    vae_passes: tuple[int, ...]
    note: str = ""
    graphs: bool = False
    """The blocks run as CUDA graphs (`accel.graphs`)."""

    @property
    def vae_latents(self) -> int:
        """Latents a decoding pass."""
        return self.vae_passes[self.memory.coding_pass]

    @property
    def streamed_bytes(self) -> int:
        """Host memory that streamed blocks take."""
        streamed = self.memory.blocks - self.memory.resident_blocks
        return streamed * (self.dit.block + self.dit.text_layers)

    def identity(self) -> dict[str, str | int]:
        """What of it decides the frames."""
        values: dict[str, str | int] = {QUANTIZE_FIELD: self.quantize}
        return {**values, PASS_FIELD: self.vae_latents} if len(self.vae_passes) > 1 else values

    def describe(self) -> str:
        """One line for the user."""
        graphs = "; blocks replayed as CUDA graphs" if self.graphs else ""
        return self.memory.describe() + graphs + self.note

    def step_down(self) -> Placement | None:
        """The next smaller one of the same precision, None when there is none."""
        plan = smaller(self.memory, self.dit, self.run)
        return None if plan is None else replace(self, memory=plan, note="", graphs=False)


def device_limit(memory: Literal["auto"] | float, device: torch.device) -> int | None:
    """Bytes of `device` this process may hold in all, None on a CPU without a number.

    auto: what is free and what this process holds already, less `CONTEXT_BYTES`. On CUDA never more than the
    fraction set with `torch.cuda.set_per_process_memory_fraction`.
    """
    asked = None if memory == "auto" else int(memory * GB)
    if device.type != "cuda":
        return asked
    free, total = torch.cuda.mem_get_info(device)
    there = free + torch.cuda.memory_reserved(device) - CONTEXT_BYTES
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(there, allowed) if asked is None else min(there, allowed, asked)


def enforce_limit(memory: Literal["auto"] | float, device: torch.device) -> None:
    """Hold torch's allocator to a number of GB; what CUDA itself takes (about 0.5 GB) comes besides."""
    if memory != "auto" and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory * GB / total), device)


@dataclass(frozen=True)
class Request:
    """What of a request decides its memory. cached: a step cache keeps residuals."""

    plan: RunPlan
    cached: bool


def vae_ranks(config: PipelineConfig, vae_name: str) -> int:
    """Processes that share the VAE's work: all that make a video, or one.

    Raises ConfigError where `vae_parallel` asks for what cannot be.
    """
    runtime = config.runtime
    can = runtime.processes > 1 and vae_name == "fast" and config.model.decoder in SHARED_DECODERS
    if runtime.vae_parallel and not can:
        raise ConfigError(
            f"vae_parallel: needs several processes, vae: fast and one of the decoders "
            f"{', '.join(SHARED_DECODERS)}, not {runtime.processes}, {vae_name} and {config.model.decoder}; "
            "leave it out to share the VAE where it can be"
        )
    return runtime.processes if can and runtime.vae_parallel is not False else 1


def run_sizes(
    config: PipelineConfig, dit: DiTConfig, request: Request, vae_name: str, device: torch.device
) -> RunSizes:
    """What a request needs beside the DiT's weights.

    Encoders and VAE are counted at the sizes of the released model of the DiT's width.
    """
    spec = next((scale for scale in SCALES if scale.dit.dim == dit.dim), SCALES[-1])
    size = DTYPE_BYTES[config.model.dtype]
    fused = device.type == "cuda" if config.runtime.fuse is None else config.runtime.fuse
    plan, branches = request.plan, request.plan.branches
    ranks = vae_ranks(config, vae_name)
    float8 = config.runtime.quantize != "none"
    return RunSizes(
        vae=tensor_bytes(vae_tensors(spec.vae), size)
        + tensor_bytes(_decoder_tensors(config, spec.vae), size),
        audio_encoder=tensor_bytes(wav2vec_tensors(spec.wav2vec), FLOAT),
        text_encoder=tensor_bytes(text_tensors(spec.text), size),
        held=held_bytes(dit, len({branch.text for branch in branches}), size),
        denoise=denoise_bytes(dit, plan.tokens, size, fused, len(branches), request.cached, float8),
        coding=tuple(
            coding_bytes(spec.vae.dim, plan.size, size, latents, plan.overlap, vae_name == "fast", ranks)
            for latents in pass_sizes(vae_name)
        ),
    )


def wants_graphs(
    config: PipelineConfig, dit: DiTConfig, tokens: int, device: torch.device, captures: bool = True
) -> bool:
    """Whether the blocks of a forward over `tokens` are to be captured, if they all stay on the device.

    Raises ResourceError where `cuda_graphs` asks for what cannot be.
    """
    runtime = config.runtime
    if device.type != "cuda" or not captures:
        if runtime.cuda_graphs:
            lacking = "needs CUDA" if device.type != "cuda" else "needs exchanges by direct copies"
            raise ResourceError(f"cuda_graphs: {lacking}; leave it out")
        return False
    if runtime.cuda_graphs is not None:
        return runtime.cuda_graphs
    return not runtime.use_fsdp and launches_show(dit, tokens, runtime.sp_size)


def graph_bytes(config: PipelineConfig, dit: DiTConfig, request: Request) -> int:
    """What the captured forwards of a video's windows keep: activations, and two shapes' text."""
    size, runtime = DTYPE_BYTES[config.model.dtype], config.runtime
    own = -(-request.plan.tokens // runtime.sp_size)
    activations = denoise_bytes(dit, own, size, True, 0, False, runtime.quantize != "none")
    return activations + held_bytes(dit, 2, size)


def _decoder_tensors(config: PipelineConfig, vae: VAEConfig) -> Iterable[tuple[str, Shape]]:
    """Weights of a smaller decoder beside the full VAE, which stays for encoding."""
    if config.model.decoder == "full":
        return ()
    if config.model.decoder == "lightvae":
        return vae_tensors(light_vae_config(vae))
    return tiny_decoder_tensors(tiny_decoder_config(vae))


def place(
    config: PipelineConfig,
    dit: DiTConfig,
    request: Request,
    vae_name: str,
    device: torch.device,
    limit: int | None,
    kept: Mapping[str, str | int] | None = None,
    captures: bool = True,
) -> Placement:
    """The placement of a request under `limit`. kept: `identity` values that must stay as they were.
    captures: `parallel.team.Team.captures`.

    Raises ResourceError when it cannot fit.
    """
    runtime, kept = config.runtime, kept or {}
    run = run_sizes(config, dit, request, vae_name, device)
    vae_passes = pass_sizes(vae_name)
    passes = range(len(vae_passes))
    if kept.get(PASS_FIELD) in vae_passes:
        index = vae_passes.index(int(kept[PASS_FIELD]))
        passes = range(index, index + 1)

    def placed(quantize: Quantize) -> Placement:
        plain = arranged(quantize)
        if not wants_graphs(config, dit, request.plan.tokens, device, captures):
            return plain
        memory = replace(plain.memory, peak=plain.memory.peak + graph_bytes(config, dit, request))
        if memory.fits and not memory.streams:
            return replace(plain, memory=memory, graphs=True)
        if runtime.cuda_graphs:
            raise ResourceError(
                "cuda_graphs: needs every block on the device, which does not fit; leave it out"
            )
        return plain

    def arranged(quantize: Quantize) -> Placement:
        sizes = dit_sizes(dit, DTYPE_BYTES[config.model.dtype], quantize != "none")
        if runtime.use_fsdp:
            sizes = shared_out(sizes, runtime.sp_size)
        if runtime.num_persistent_param_in_dit is not None:
            resident = resident_blocks(dit, runtime.num_persistent_param_in_dit)
            memory = plan_parameters(sizes, run, resident, limit, passes)
        else:
            memory = plan_memory(sizes, run, limit, passes)
        if runtime.use_fsdp and memory.streams:
            raise ResourceError(
                f"use_fsdp: the weights do not fit on {runtime.sp_size} GPUs together; raise sp_size, or set "
                "use_fsdp to false so that blocks are streamed from host memory"
            )
        return Placement(quantize, memory, sizes, run, vae_passes)

    wanted = kept.get(QUANTIZE_FIELD) if runtime.quantize == "auto" else runtime.quantize
    for form in QUANTIZED_FORMS:
        if wanted == form:
            return placed(form)
    best = best_quantize(device)
    if wanted == "none" or best is None:
        exact = placed("none")
        if exact.memory.streams and best is not None and runtime.num_persistent_param_in_dit is None:
            stay = placed(best).memory.resident_blocks
            note = f"; with quantize={best} {stay} of {exact.memory.blocks} would stay, at some loss"
            return replace(exact, note=note)
        return exact
    try:
        exact = placed("none")
        if not exact.memory.streams:
            return exact
    except ResourceError:
        pass
    return replace(placed(best), note=f"; {best} layers (quantize=auto: exact ones would be streamed)")
