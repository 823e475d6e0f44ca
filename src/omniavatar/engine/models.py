"""The models of a pipeline, each loaded on first use from the files that the configuration names.

- `engine.residency`: where the models lie.
- `engine.loading`: how they are read.
- `engine.accelerate`: the order of optimisations.
- `engine.prompts`: the encoder of prompts.
"""

from __future__ import annotations

import functools
import gc
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

    from omniavatar.accel.attention.sparse_registry import SparseBackend
    from omniavatar.accel.sparse_steps import SparseSteps
    from omniavatar.checkpoint.dit import WeightForm
    from omniavatar.config.schema import PipelineConfig
    from omniavatar.encoders.audio import AudioEncoder
    from omniavatar.engine.prompts import PromptEncoder
    from omniavatar.model.dit import WanDiT
    from omniavatar.model.vae import VideoVAE, WanVAE
    from omniavatar.plan.run import RunPlan
    from omniavatar.sampling.sparsity import SparsityPlan
    from omniavatar.types import Recorder

THREADS_FIELD = "runtime.threads"
TEXT_ROOM = 1.1
"""Memory of the running text encoder, as a multiple of its weights."""


class Models:
    """The models of one configuration, on one device.

    - team: the processes that make one video.
    - residency: what lies on the device; it must adopt a placement before the DiT is used.
    """

    def __init__(
        self, config: PipelineConfig, recorder: Recorder, team: Team = ONE, host: Host | None = None
    ) -> None:
        from omniavatar.accel.attention.timing import choose_attention

        self.config, self.recorder, self.team = config, recorder, team
        self.device, self.dtype = choose_device(config.runtime.device), torch_dtype(config.model.dtype)
        elsewhere = config.runtime.vae_device
        self.vae_device = self.device if elsewhere is None else choose_device(elsewhere)
        self.vae_name = choose_vae(config.runtime.vae, self.vae_device)
        self.vae_ranks = vae_ranks(config, self.vae_name)
        if config.model.weights == "files":
            config.model.check_files_named()
        self.dit_config = dit = read_dit_config(config.model)
        self.attention_name, self._attention, measured = choose_attention(
            config.runtime.attention, self.device, self.dtype, dit.num_heads, dit.dim // dit.num_heads
        )
        self.sparse = self._choose_sparse()
        self._sparse_steps: SparseSteps | None = None
        layout = Layout(config.runtime.cfg_parallel, config.runtime.sp_size, dit.num_heads)
        for text in (measured, self._threads_note(), team.arrange(layout, config.runtime.exchange)):
            if text is not None:
                recorder.event(Message(text))
        self.residency = Residency(config, dit, self.vae_name, self.device, recorder, team.captures, host)
        enforce_limit(config.runtime.memory, self.device)

    @functools.cached_property
    def dit(self) -> WanDiT:
        """The diffusion transformer, with the configured optimisations and the adopted placement."""
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
        """This process's own video VAE, run by the backend `vae_name`."""
        from omniavatar.accel.vae import coding_dtype
        from omniavatar.engine.loading import load_model_vae

        with self.recorder.stage("load_vae"):
            device = self.vae_device
            dtype = coding_dtype(self.dtype, device)
            vae = load_model_vae(self.config.model, dtype, device, self._run_vae)
            if device == self.device:
                return vae
            from omniavatar.accel.vae_elsewhere import VAEElsewhere

            return VAEElsewhere(vae, device)

    @functools.cached_property
    def window_vae(self) -> VideoVAE | None:
        """The VAE that codes windows: shared by all processes, or only the leader's (None on other ranks)."""
        if self.vae_ranks > 1:
            from omniavatar.parallel.vae import apply_shared_vae

            return apply_shared_vae(self.vae, self.team.picture_rows)
        return self.vae if self.team.leads else None

    @functools.cached_property
    def audio_encoder(self) -> AudioEncoder:
        """wav2vec 2.0 in float32."""
        from omniavatar.engine.loading import load_audio_encoder

        with self.recorder.stage("load_audio_encoder"):
            return load_audio_encoder(self.config.model, self.dit_config, self.device)

    @functools.cached_property
    def prompts(self) -> PromptEncoder:
        """The encoder of prompts; it holds the text encoder only while it runs."""
        from omniavatar.engine.prompts import PromptEncoder

        return PromptEncoder(self.config, self.device, self.dtype, self.recorder, self._text_encoder_fits)

    def sparse_steps(self, plan: SparsityPlan | None) -> SparseSteps | None:
        """The DiT's blocks as `plan` says; None for a dense one. Kept until the next plan."""
        if plan is None or not plan.sparse_steps or self.sparse is None:
            return None
        if self._sparse_steps is None or self._sparse_steps.plan.digest != plan.digest:
            from omniavatar.accel.sparse_steps import SparseSteps

            self._sparse_steps = None  # frees the lists of the plan before
            self._sparse_steps = SparseSteps(
                self.dit,
                plan,
                self.sparse.create(self.device),
                self.residency.run_blocks,
                self.device,
                self.residency.wrap,
                self.team.spread,
                self.team.own_heads(self.dit_config.num_heads),
            )
        return self._sparse_steps

    def sparse_limit(self, tokens: int) -> float:
        """The kept share above which a layer runs dense, because that is faster here."""
        if self.sparse is None:
            return 1.0
        from omniavatar.accel.attention.sparse_registry import break_even

        return break_even(self.sparse.name, self.attention_name, self.dit_config.num_heads, tokens)

    def _choose_sparse(self) -> SparseBackend | None:
        """The backend of sparse attention; None where attention is dense. Raises ResourceError."""
        wanted, dit = self.config.sparsity, self.dit_config
        if wanted.sparse_attention == "dense":
            return None
        from omniavatar.accel.attention.sparse_registry import choose_sparse

        block, width = wanted.sparse_block_size, dit.dim // dit.num_heads
        return choose_sparse(
            wanted.sparse_backend, self.device, self.dtype, self.attention_name, block, width
        )

    @property
    def numerics(self) -> dict[str, int]:
        """What decides the last bits of the frames on this device beside the configuration.

        Sums on a CPU are split among its threads, so their number changes rounding, and later steps enlarge
        the difference.
        """
        return {THREADS_FIELD: torch.get_num_threads()} if self.device.type == "cpu" else {}

    def _threads_note(self) -> str | None:
        if self.device.type != "cpu" or not self.team.leads:
            return None
        count = torch.get_num_threads()
        name = "1 CPU thread" if count == 1 else f"{count} CPU threads"
        return f"computing with {name}; another number (setting `threads`) makes a slightly different video"

    def release(self) -> None:
        """Drop the loaded models and free their memory."""
        for name in ("dit", "vae", "window_vae", "audio_encoder", "prompts"):
            vars(self).pop(name, None)
        self._sparse_steps = None
        self.residency.release()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def load_for_windows(self) -> None:
        """Load the DiT and the VAE if they are not loaded. Retries with less GPU memory if needed."""
        self.residency.retry(lambda: self.window_vae)
        self.residency.retry(lambda: self.dit)

    def audio_features(self, waveform: np.ndarray, plan: RunPlan, path: Path) -> np.ndarray:
        """Rows of audio features for the plan's windows, read from `path`, or encoded and written to it."""
        from omniavatar.encoders.audio import open_features

        rows = plan.padded_audio_frames
        if path.is_file() and len(features := open_features(path)) == rows:
            return features
        if plan.chunk is None:
            return self.audio_encoder.encode(waveform, rows, self.config.video.fps, path)
        from omniavatar.encoders.chunk_audio import ChunkEars

        ChunkEars(self.audio_encoder.model, plan.chunk).write(waveform, len(plan.windows), path)
        return open_features(path)

    @torch.inference_mode()
    def time_projections(self, timesteps: tuple[float, ...]) -> np.ndarray:
        """The DiT's time projections (steps, 6, dim) float32, from which TeaCache decides."""
        steps = torch.tensor(timesteps, dtype=torch.float32, device=self.device)
        return self.dit.embed_time(steps)[1].float().cpu().numpy()

    def _load_dit(self, form: WeightForm | None) -> WanDiT:
        """The DiT with merged weights; blocks to be streamed or shared are read into host memory."""
        from omniavatar.engine.loading import load_dit_weights, loading_device

        resident = 0 if self.config.runtime.use_fsdp else self.residency.placement.memory.resident_blocks
        device_of = loading_device(self.dit_config.num_layers, resident, self.device)
        return load_dit_weights(
            self.config.model,
            self.dit_config,
            self._attention,
            self.dtype,
            self.device,
            form,
            device_of,
            lambda text: self.recorder.event(Message(text)),
        )

    def _run_vae(self, vae: WanVAE) -> VideoVAE:
        from omniavatar.accel.vae import FastVAE

        running = create_vae(self.vae_name, vae, self.vae_device)
        if isinstance(running, FastVAE):
            self.residency.hold_vae(running)
        return running

    def _text_encoder_fits(self) -> bool:
        return self.residency.has_room_for(int(self.residency.placement.run.text_encoder * TEXT_ROOM))
