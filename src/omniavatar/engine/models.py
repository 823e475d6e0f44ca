"""The models of a pipeline, each loaded when it is first used, from the files the configuration names.

Where they lie is `engine.residency`; how they are read is `engine.loading`; in which order they are
accelerated is `engine.accelerate`; prompts have an encoder of their own (`engine.prompts`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from omniavatar.accel.vae_runners import choose_vae, create_vae
from omniavatar.device import choose_device, torch_dtype
from omniavatar.engine.events import Message
from omniavatar.engine.host import Host
from omniavatar.engine.residency import Residency
from omniavatar.parallel.rank_layout import Layout
from omniavatar.parallel.team import ONE, Team
from omniavatar.plan.limit import enforce_limit
from omniavatar.plan.preview import read_dit_config
from omniavatar.plan.sizes import vae_ranks

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from omniavatar.checkpoint.dit import WeightForm
    from omniavatar.config.schema import PipelineConfig
    from omniavatar.encoders.audio import AudioEncoder
    from omniavatar.engine.prompts import PromptEncoder
    from omniavatar.model.dit import WanDiT
    from omniavatar.model.vae import VideoVAE, WanVAE
    from omniavatar.types import Recorder

TEXT_ROOM = 1.1
"""Memory of the text encoder at work over that of its weights."""


class Models:
    """The models one configuration names, on one device.

    - team: the processes of one video.
    - residency: where a request's models lie; adopt a placement there before the DiT is used.
    """

    def __init__(
        self, config: PipelineConfig, recorder: Recorder, team: Team = ONE, host: Host | None = None
    ) -> None:
        from omniavatar.accel.attention.timing import choose_attention

        self.config, self.recorder, self.team = config, recorder, team
        self.device, self.dtype = choose_device(config.runtime.device), torch_dtype(config.model.dtype)
        self.vae_name = choose_vae(config.runtime.vae, self.device)
        self.vae_ranks = vae_ranks(config, self.vae_name)
        if config.model.weights == "files":
            config.model.check_files_named()
        self.dit_config = dit = read_dit_config(config.model)
        self.attention_name, self._attention, measured = choose_attention(
            config.runtime.attention, self.device, self.dtype, dit.num_heads, dit.dim // dit.num_heads
        )
        layout = Layout(config.runtime.cfg_parallel, config.runtime.sp_size, dit.num_heads)
        for text in (measured, team.arrange(layout, config.runtime.exchange)):
            if text is not None:
                recorder.event(Message(text))
        self.residency = Residency(config, dit, self.vae_name, self.device, recorder, team.captures, host)
        enforce_limit(config.runtime.memory, self.device)

    @functools.cached_property
    def dit(self) -> WanDiT:
        """The diffusion transformer with the configured optimisations, placed as `residency` says."""
        from omniavatar.engine.accelerate import accelerated_dit

        placement = self.residency.placement
        if self.device.type == "cuda":
            from omniavatar.accel.pinned import check_host_room

            check_host_room(placement.streamed_bytes)
        with self.recorder.stage("load_dit"):
            dit = accelerated_dit(
                self._load_dit, placement.quantize, self.config.runtime, self.team, self.device
            )
            self.residency.hold(dit)
        return dit

    @functools.cached_property
    def vae(self) -> VideoVAE:
        """The video VAE of this process alone, run as `vae_name` says."""
        from omniavatar.accel.vae import coding_dtype
        from omniavatar.engine.loading import VAELoader

        with self.recorder.stage("load_vae"):
            dtype = coding_dtype(self.dtype, self.device)
            return VAELoader(self.config.model, dtype, self.device, self._run_vae).load()

    @functools.cached_property
    def window_vae(self) -> VideoVAE | None:
        """The VAE that codes the windows: all processes together, or the leader's, None elsewhere."""
        if self.vae_ranks > 1:
            from omniavatar.parallel.vae import apply_shared_vae

            return apply_shared_vae(self.vae, self.team.picture_rows)
        return self.vae if self.team.leads else None

    @functools.cached_property
    def audio_encoder(self) -> AudioEncoder:
        """wav2vec 2.0 in float32."""
        from omniavatar.engine.loading import load_audio_encoder

        with self.recorder.stage("load_audio_encoder"):
            return load_audio_encoder(self.config.model, self.dit_config.audio_dim, self.device)

    @functools.cached_property
    def prompts(self) -> PromptEncoder:
        """The encoder of prompts, which holds the text encoder only while it needs it."""
        from omniavatar.engine.prompts import PromptEncoder

        return PromptEncoder(self.config, self.device, self.dtype, self.recorder, self._text_encoder_fits)

    def load_for_windows(self) -> None:
        """Load what makes the windows and is not loaded yet, with less on the device where needed."""
        self.residency.retry(lambda: self.window_vae)
        self.residency.retry(lambda: self.dit)

    def audio_features(self, waveform: np.ndarray, frames: int, path: Path) -> np.ndarray:
        """One audio vector a video frame, (frames, D), from the file at `path` or else encoded into it."""
        from omniavatar.encoders.audio import open_features

        if path.is_file() and len(features := open_features(path)) == frames:
            return features
        return self.audio_encoder.encode(waveform, frames, self.config.video.fps, path)

    @torch.inference_mode()
    def time_projections(self, timesteps: tuple[float, ...]) -> np.ndarray:
        """What TeaCache reads: the DiT's time projections (steps, 6, dim) float32."""
        steps = torch.tensor(timesteps, dtype=torch.float32, device=self.device)
        return self.dit.embed_time(steps)[1].float().cpu().numpy()

    def _load_dit(self, form: WeightForm | None) -> WanDiT:
        """The merged weights; blocks that will be streamed or shared out are read into host memory."""
        from omniavatar.engine.loading import load_dit_weights, loading_device

        resident = 0 if self.config.runtime.use_fsdp else self.residency.placement.memory.resident_blocks
        device_of = loading_device(self.dit_config.num_layers, resident, self.device)
        return load_dit_weights(
            self.config.model, self.dit_config, self._attention, self.dtype, self.device, form, device_of
        )

    def _run_vae(self, vae: WanVAE) -> VideoVAE:
        from omniavatar.accel.vae import FastVAE

        running = create_vae(self.vae_name, vae, self.device)
        if isinstance(running, FastVAE):
            self.residency.hold_vae(running)
        return running

    def _text_encoder_fits(self) -> bool:
        return self.residency.has_room_for(int(self.residency.placement.run.text_encoder * TEXT_ROOM))
