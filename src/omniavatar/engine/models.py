"""The models of a pipeline, each loaded when it is first needed, from the files the configuration names.

The text encoder is loaded only for prompts whose embedding is not cached, and released at once: it is the
largest thing beside the DiT and is needed for seconds. The DiT is loaded as the request's `Placement` says
(`adopt`): streamed blocks go to host memory as they are read and never lie on the device together. Later
requests and `make_room` may send more blocks there; none come back. Everything else stays on the device.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omniavatar.accel.apply import AccelConfig, Quantize, apply_accelerations, row_dtype, weight_form
from omniavatar.accel.attention.timing import choose_attention
from omniavatar.accel.graphs import CudaCapture, GraphedBlocks
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.accel.offload import OffloadConfig, Offloader, streamed_blocks
from omniavatar.accel.pinned import check_host_room
from omniavatar.accel.vae import FastVAE, choose_vae, coding_dtype, create_vae
from omniavatar.checkpoint.dit import (
    WeightForm,
    inspect_dit,
    load_dit,
    random_dit,
)
from omniavatar.checkpoint.layout import scale_spec, text_tensors
from omniavatar.device import choose_device
from omniavatar.encoders.audio import AudioEncoder, open_features
from omniavatar.encoders.text import TextEncoder, random_text_encoder, sizes_of
from omniavatar.encoders.text_cache import TextCache, encode_cached, encoder_identity
from omniavatar.engine.loading import DTYPES, VAELoader, dit_files
from omniavatar.engine.retry import with_room
from omniavatar.errors import CheckpointError, ResourceError
from omniavatar.parallel.rank_layout import Layout
from omniavatar.parallel.team import ONE, Team
from omniavatar.parallel.vae import apply_shared_vae
from omniavatar.parallel.weights import apply_shared_weights
from omniavatar.plan.calibration import find_constants
from omniavatar.plan.limit import device_limit, enforce_limit
from omniavatar.plan.memory import fewer_resident
from omniavatar.plan.placement import QUANTIZE_FIELD, Placement, place
from omniavatar.plan.run import make_step_plan, model_scale, sampling_schedule
from omniavatar.plan.sizes import Request, vae_ranks

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from omniavatar.config.schema import PipelineConfig, SamplingConfig
    from omniavatar.model.dit import DiTConfig, WanDiT
    from omniavatar.model.layers import BlockInputs
    from omniavatar.model.vae import VideoVAE, WanVAE
    from omniavatar.sampling.cache_constants import CacheConstants
    from omniavatar.types import Recorder, StepPlan

TEXT_ROOM = 1.1
"""Memory of the text encoder at work over that of its weights."""


class Components:
    """The models one configuration names, on one device; `team`: the processes of one video."""

    def __init__(self, config: PipelineConfig, recorder: Recorder, team: Team = ONE) -> None:
        self.config, self.team = config, team
        self.device = choose_device(config.runtime.device)
        self.dtype = DTYPES[config.model.dtype]
        self._recorder = recorder
        self.vae_name = choose_vae(config.runtime.vae, self.device)
        self.vae_ranks = vae_ranks(config, self.vae_name)
        if config.model.weights == "files":
            config.model.check_files_named()
        self.dit_config = self._inspect()
        dit = self.dit_config
        self.attention_name, self._attention, measured = choose_attention(
            config.runtime.attention, self.device, self.dtype, dit.num_heads, dit.dim // dit.num_heads
        )
        if measured is not None:
            recorder.event("message", text=measured, level="info")
        layout = Layout(config.runtime.cfg_parallel, config.runtime.sp_size, dit.num_heads)
        exchange = team.arrange(layout, config.runtime.exchange)
        if exchange is not None:
            recorder.event("message", text=exchange, level="info")
        self._graphs: GraphedBlocks | None = None
        self._embeddings: dict[str, Tensor] = {}
        self._offloader: Offloader | None = None
        self._fast_vaes: list[FastVAE] = []
        self.placement: Placement | None = None
        enforce_limit(config.runtime.memory, self.device)

    @property
    def quantize(self) -> Quantize:
        """Precision of the DiT's linear layers: what the last placement says, else the configuration."""
        if self.placement is not None:
            return self.placement.quantize
        configured = self.config.runtime.quantize
        return "none" if configured == "auto" else configured

    @property
    def placed(self) -> Placement:
        """The placement of the request at hand, once one is adopted."""
        assert self.placement is not None
        return self.placement

    def place(self, request: Request, kept: Mapping[str, str | int]) -> Placement:
        """Where the models lie for a request; changes nothing yet.

        kept: values of `Placement.identity` of the run that is resumed. What is loaded stays as it is.
        Raises ResourceError when the request does not fit.
        """
        limit = device_limit(self.config.runtime.memory, self.device)
        if self._offloader is not None:
            kept = {**kept, QUANTIZE_FIELD: self.quantize}
        placement = place(
            self.config, self.dit_config, request, self.vae_name, self.device, limit, kept, self.team.captures
        )
        if self._offloader is None or self.placement is None:
            return placement
        resident = self.placement.memory.resident_blocks
        memory = fewer_resident(placement.memory, resident, placement.dit, placement.run)
        return replace(placement, memory=memory, graphs=placement.graphs and not memory.streams)

    def adopt(self, placement: Placement) -> None:
        """Bring what is loaded into these places; what is not loaded yet will go there."""
        before, self.placement = self.placement, placement
        if before is None or before.describe() != placement.describe():
            self._recorder.event("message", text=placement.describe(), level="info")
        with_room(self._arrange, self.make_room)

    def make_room(self, reason: str) -> None:
        """One step down after an allocation failed; everything computed stays equal to the bit, except that
        the last step changes the VAE's passes. Raises ResourceError at the end."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        smaller = None
        if self.placement is not None and not self.config.runtime.use_fsdp:
            smaller = self.placement.step_down()
        if smaller is None:
            raise ResourceError(
                f"max_tokens: {self.config.video.max_tokens} needs more GPU memory than is free ({reason}); "
                "lower max_tokens, use quantize=fp8 or the 1.3B model"
            )
        self.placement = smaller
        text = f"{reason}: once more with less. {smaller.describe()}"
        self._recorder.event("message", text=text, level="warning")
        with_room(self._arrange, self.make_room)

    def _arrange(self) -> None:
        memory = self.placed.memory
        if self._graphs is not None and not self.placed.graphs:
            self._graphs.clear()
        if self._offloader is not None:
            self._offloader.apply(OffloadConfig(memory.resident_blocks, memory.ring))
        self.use_vae_pass(self.placed.vae_latents)

    def _inspect(self) -> DiTConfig:
        """The DiT's sizes from file headers, checked against what the configuration promises."""
        model = self.config.model
        if model.weights == "random":
            return scale_spec(model.scale).dit
        found = inspect_dit(model.dit_path, adapter_dir=model.exp_path, num_heads=model.dit_config.num_heads)
        if found.in_dim != model.dit_config.in_dim:
            remedy = (
                "set exp_path to the OmniAvatar folder" if found.in_dim == 16 else "set model_config.in_dim"
            )
            raise CheckpointError(
                f"{model.dit_path[0]}: patch embedding with {found.in_dim} input channels, "
                f"{model.dit_config.in_dim} expected; {remedy}"
            )
        if found.audio_dim and found.audio_hidden != model.dit_config.audio_hidden_size:
            raise CheckpointError(
                f"{model.exp_path or model.dit_path[0]}: audio packed to {found.audio_hidden} channels, "
                f"model_config.audio_hidden_size says {model.dit_config.audio_hidden_size}; correct it"
            )
        if bool(found.audio_dim) != model.use_audio:
            there = "has" if found.audio_dim else "has no"
            raise CheckpointError(
                f"{model.exp_path or model.dit_path[0]}: the checkpoint {there} audio layers, "
                f"but use_audio is {model.use_audio}; correct use_audio or exp_path"
            )
        return found

    @functools.cached_property
    def dit(self) -> WanDiT:
        """The merged diffusion transformer, with the configured optimisations applied."""
        runtime = self.config.runtime
        fuse = self.device.type == "cuda" if runtime.fuse is None else runtime.fuse
        accel, ops = AccelConfig(self.quantize, fuse), create_fused(self.device, row_dtype(self.quantize))
        if self.placement is not None and self.device.type == "cuda":
            check_host_room(self.placement.streamed_bytes)
        with self._recorder.stage("load_dit"):
            dit = self._load_dit(weight_form(accel, ops, self.device))
            apply_accelerations(dit, accel, ops)
            self.team.apply(dit)
            peers = self.team.weight_peers() if runtime.use_fsdp else None
            if peers is not None:
                apply_shared_weights(dit, peers, self.device)
            offloader = Offloader(dit, self.device)
            if self.placement is not None:
                memory = self.placement.memory
                offloader.apply(OffloadConfig(memory.resident_blocks, memory.ring))
        self._offloader = offloader
        return dit

    def run_blocks(self, tokens_BLC: Tensor, inputs: BlockInputs) -> Tensor:
        """The DiT's blocks as they are, or captured where the placement says so now: `make_room` may have
        sent some of them away since the window began."""
        dit = self.dit
        if self.placement is None or not self.placement.graphs:
            return dit.run_blocks(tokens_BLC, inputs)
        if self._graphs is None:
            self._graphs = GraphedBlocks(dit.run_blocks, CudaCapture())
        return self._graphs(tokens_BLC, inputs)

    def load_for_windows(self) -> None:
        """Load what makes the windows and is not loaded yet, with less on the device if need be."""
        with_room(lambda: self.window_vae, self.make_room)
        with_room(lambda: self.dit, self.make_room)

    def _load_dit(self, form: WeightForm | None) -> WanDiT:
        model = self.config.model
        layers = self.dit_config.num_layers
        resident = layers if self.placement is None else self.placement.memory.resident_blocks
        resident = 0 if self.config.runtime.use_fsdp else resident
        streamed = set(streamed_blocks(layers, resident))

        def home(key: str) -> torch.device:
            """Host memory for what will be streamed or shared out, else the device."""
            match = re.match(r"blocks\.(\d+)\.", key)
            return torch.device("cpu") if match and int(match[1]) in streamed else self.device

        if model.weights == "random":
            return random_dit(
                self.dit_config,
                attention=self._attention,
                dtype=self.dtype,
                device=self.device,
                seed=0,
                form=form,
                place=home,
            )
        return load_dit(
            dit_files(model),
            attention=self._attention,
            dtype=self.dtype,
            device=self.device,
            form=form,
            place=home,
        )

    @functools.cached_property
    def vae(self) -> VideoVAE:
        """The video VAE of this process alone, run as `vae_name` says."""
        with self._recorder.stage("load_vae"):
            dtype = coding_dtype(self.dtype, self.device)
            return VAELoader(self.config.model, dtype, self.device, self._create_vae).load()

    @functools.cached_property
    def window_vae(self) -> VideoVAE | None:
        """What codes the windows: all processes together, or the leader's VAE and None elsewhere."""
        if self.vae_ranks > 1:
            return apply_shared_vae(self.vae, self.team.picture_rows)
        return self.vae if self.team.leads else None

    def use_vae_pass(self, latents: int) -> None:
        """Code in passes of so many latents, as the leader does: ranks that share a picture go in step."""
        for vae in self._fast_vaes:
            vae.use_pass(latents)

    def _create_vae(self, vae: WanVAE) -> VideoVAE:
        """What runs `vae`, in passes of the placement's size."""
        running = create_vae(self.vae_name, vae, self.device)
        if isinstance(running, FastVAE):
            self._fast_vaes.append(running)
            if self.placement is not None:
                running.use_pass(self.placement.vae_latents)
        return running

    @functools.cached_property
    def audio_encoder(self) -> AudioEncoder:
        """wav2vec 2.0, always in float32: its features are normalised, small and cheap to compute."""
        model = self.config.model
        with self._recorder.stage("load_audio_encoder"):
            if model.weights == "random":
                spec = scale_spec(model.scale).wav2vec
                encoder = AudioEncoder.random(
                    hidden=spec.hidden,
                    layers=spec.num_layers,
                    heads=spec.num_heads,
                    intermediate=spec.ffn,
                    conv_dim=spec.conv_dim,
                    device=self.device,
                    seed=0,
                )
            else:
                assert model.wav2vec_path is not None
                encoder = AudioEncoder.load(model.wav2vec_path, self.device)
        if encoder.width != self.dit_config.audio_dim:
            raise CheckpointError(
                f"{model.wav2vec_path}: gives {encoder.width} numbers a frame, the DiT's audio_proj takes "
                f"{self.dit_config.audio_dim}; use the wav2vec folder the checkpoint was trained with"
            )
        return encoder

    def audio_features(self, waveform: np.ndarray, frames: int, path: Path) -> np.ndarray:
        """One audio vector a video frame, (frames, D), from the file at `path` or else encoded into it."""
        if path.is_file() and len(features := open_features(path)) == frames:
            return features
        return self.audio_encoder.encode(waveform, frames, self.config.video.fps, path)

    def cache_constants(self, sampling: SamplingConfig) -> CacheConstants | None:
        """What the step cache decides by (`calibration_file.find_constants`); reads no whole weight file."""
        model = self.config.model
        return find_constants(model, sampling, self.dit_config, model_scale(model.scale, self.dit_config.dim))

    def step_plan(self, sampling: SamplingConfig, constants: CacheConstants | None) -> StepPlan:
        """The step cache's plan by `constants`; loads the DiT where TeaCache reads its time projections."""
        guard = not self.config.runtime.reference_numerics
        return make_step_plan(sampling, constants, lambda: self.time_projections(sampling), guard)

    @torch.inference_mode()
    def time_projections(self, sampling: SamplingConfig) -> np.ndarray:
        """What TeaCache reads: time projections (steps, 6, dim) float32 of the schedule."""
        timesteps = torch.tensor(
            sampling_schedule(sampling).timesteps, dtype=torch.float32, device=self.device
        )
        return self.dit.embed_time(timesteps)[1].float().cpu().numpy()

    def embed_prompts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embeddings (1, 512, text_dim) on the device, kept for the life of the pipeline."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if missing:
            for prompt, embedding in zip(missing, self._embed(missing), strict=True):
                self._embeddings[prompt] = embedding[None].to(self.device)
        return [self._embeddings[prompt] for prompt in prompts]

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (n, 512, text_dim), from the cache on disk or a text encoder loaded for them."""
        if self._text_encoder_fits():
            try:
                return self._embed_with(prompts, layer_by_layer=False)
            except torch.OutOfMemoryError:
                self._recorder.event(
                    "message", text="the text encoder does not fit: layer by layer", level="warning"
                )
        return self._embed_with(prompts, layer_by_layer=True)

    def _embed_with(self, prompts: Sequence[str], layer_by_layer: bool) -> Tensor:
        model = self.config.model
        if model.weights == "random":
            with self._recorder.stage("load_text_encoder"):
                sizes = sizes_of(dict(text_tensors(scale_spec(model.scale).text)), "random weights")
                encoder = random_text_encoder(
                    self.device, self.dtype, seed=0, sizes=sizes, layer_by_layer=layer_by_layer
                )
            return encoder.encode(prompts)
        encoder_path, tokenizer_path = model.text_encoder_path, model.tokenizer_folder
        assert encoder_path is not None and tokenizer_path is not None

        def load() -> TextEncoder:
            self._recorder.event("message", text="loading the text encoder (new prompt)", level="info")
            with self._recorder.stage("load_text_encoder"):
                return TextEncoder.load(encoder_path, tokenizer_path, self.device, self.dtype, layer_by_layer)

        identity = encoder_identity(encoder_path, tokenizer_path, self.dtype)
        return encode_cached(prompts, TextCache(self.config.runtime.text_cache, identity), load)

    def _text_encoder_fits(self) -> bool:
        """Whether the text encoder fits beside what is on the device now; it computes the same either way."""
        limit = device_limit(self.config.runtime.memory, self.device)
        if limit is None or self.placement is None:
            return True
        held = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        return held + self.placement.run.text_encoder * TEXT_ROOM <= limit
