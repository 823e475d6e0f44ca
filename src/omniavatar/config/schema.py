"""The configuration: one frozen, validated tree.

Leaf names are unique over the whole tree, so the original's flat key (`num_steps`) and the dotted one
(`sampling.num_steps`) name the same field. `config_load.load_config` fills the tree from a YAML file,
the checkpoint's `config.json` and `--hp` overrides; only the command line and the pipeline import it.
Keys of the original that an inference engine has no use for are listed in `config_values` and reported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from omniavatar.config.backends import alternatives, backend_name, registry
from omniavatar.config.values import (
    NEGATIVE_PROMPT,
    FieldError,
    FilePath,
    FilePaths,
    Flag,
    Real,
    Size,
    Whole,
    choice_or_path,
    coefficients,
    descending_timesteps,
    device_setting,
    dtype_name,
    lora_entry,
    memory_limit,
    rising_fractions,
    scale_name,
)
from omniavatar.errors import ConfigError
from omniavatar.sampling.windows import window_length
from omniavatar.types import StepCache


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


class DitOverrides(_Section):
    """Architecture of the DiT as the `config.json` states it; the rest is read off the weights."""

    in_dim: Whole = Field(33, ge=16)
    """Input channels of the patch embedding: 16 noise + 16 portrait + 1 mask."""
    num_heads: Whole | None = Field(None, ge=1)
    """Attention heads; unset: width / 128."""
    audio_hidden_size: Whole = Field(32, ge=1)
    """Width between the audio packing and the projections of the blocks."""


class LoraFile(_Section):
    """A further LoRA merged into the DiT."""

    path: FilePath
    """The LoRA file (.safetensors, .pt)."""
    strength: Real = 1.0
    """Factor on its weight differences."""


class ModelConfig(_Section):
    """Which weights, and in which precision."""

    dit_path: FilePaths = ()
    """Base DiT: one file or all shards; a list, a comma-separated text or a pattern."""
    vae_path: FilePath | None = None
    """Wan 2.1 VAE (`Wan2.1_VAE.pth`)."""
    decoder: Annotated[str, BeforeValidator(backend_name("model.decoder"))] = "full"
    """What makes pixels of latents: the VAE itself, or a smaller decoder (faster, softer)."""
    decoder_path: FilePath | None = None
    """File of the smaller decoder (`lightvaew2_1.pth`, `taew2_1.pth`, `lighttaew2_1.pth`)."""
    text_encoder_path: FilePath | None = None
    """UMT5-XXL encoder (`models_t5_umt5-xxl-enc-bf16.pth`)."""
    tokenizer_path: FilePath | None = None
    """Tokenizer folder; unset: `google/umt5-xxl` beside the text encoder."""
    wav2vec_path: FilePath | None = None
    """wav2vec 2.0 folder (`wav2vec2-base-960h`)."""
    exp_path: FilePath | None = None
    """OmniAvatar folder with `pytorch_model.pt` and `config.json`; unset: the DiT file is already merged."""
    loras: tuple[Annotated[LoraFile, BeforeValidator(lora_entry)], ...] = ()
    """Further LoRAs, merged in float32: a list of {path, strength}."""
    weights: Literal["files", "random"] = "files"
    """files: load them; random: make a random model of `scale` on the device (speed tests)."""
    scale: Annotated[Literal["auto", "nano", "1.3B", "14B"], BeforeValidator(scale_name)] = "auto"
    """Model size; needed for random weights, else read off the files."""
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], BeforeValidator(dtype_name)] = "bf16"
    """Precision of the weights; sample, timestep and time embedding stay float32."""
    dit_config: DitOverrides = DitOverrides()
    """Architecture of the DiT (key `model_config` of the checkpoint's config.json)."""
    lora_rank: Whole | None = Field(None, ge=1)
    """Rank of the OmniAvatar LoRA; unset: read off the file."""
    lora_alpha: Real | None = Field(None, gt=0)
    """Alpha of the OmniAvatar LoRA; its factor is alpha / rank; unset: 1."""
    use_audio: Flag = True
    """The checkpoint has audio layers."""
    input_limits: FilePath | None = None
    """What portraits and sounds the model is made for (`training/input_limits.py`), to warn of others; unset:
    nothing is checked."""

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer, or None when neither it nor the text encoder is named."""
        if self.tokenizer_path is not None or self.text_encoder_path is None:
            return self.tokenizer_path
        return self.text_encoder_path.parent / "google" / "umt5-xxl"

    def check_files_named(self) -> None:
        """Raise `ConfigError` naming the paths that `weights: files` needs and the config leaves out."""
        if self.weights == "random":
            return
        decoder = () if registry("model.decoder").get(self.decoder).file is None else ("decoder_path",)
        needed = ("dit_path", "vae_path", *decoder, "text_encoder_path", "wav2vec_path")
        missing = [name for name in needed if not getattr(self, name)]
        if missing:
            raise ConfigError(
                f"model: {', '.join(missing)} not set; name the files in the config, "
                "or use weights: random with a scale to try the engine without files"
            )

    @model_validator(mode="after")
    def _combinations(self) -> ModelConfig:
        if self.decoder_path is not None:
            decoders = registry("model.decoder")
            if decoders.get(self.decoder).file is None:
                others = alternatives(each.name for each in decoders if each.file is not None)
                raise FieldError(
                    f"is not used by decoder: {self.decoder}; set decoder to {others}", "decoder_path"
                )
        if self.weights == "random" and self.scale == "auto":
            raise FieldError(
                "random weights need a scale; set scale to nano, 1.3B or 14B", "weights", "scale"
            )
        return self


class SamplingConfig(_Section):
    """How a window is denoised; a request may override most of it (`SamplingParams`)."""

    seed: Whole = Field(42, ge=0, lt=2**63)
    """Noise of window w comes from (seed, w)."""
    num_steps: Whole = Field(50, ge=1, le=1000)
    """Denoising steps; not used when `timesteps` is given."""
    guidance_scale: Real = Field(4.5, ge=0)
    """Text guidance; 1 runs no negative branch."""
    audio_scale: Real | None = Field(None, ge=0)
    """Audio guidance; unset: as guidance_scale. Another value costs a third branch."""
    guidance_interval: Annotated[tuple[Real, Real], AfterValidator(rising_fractions)] = (0.0, 1.0)
    """[low, high], fractions of the steps that are guided; in the others only the conditional pass runs."""
    shift: Real = Field(5.0, gt=0)
    """Shift of the flow-matching schedule."""
    timesteps: Annotated[tuple[Real, ...], AfterValidator(descending_timesteps)] | None = None
    """Explicit timesteps in (0, 1000], descending, as step-distilled LoRAs ask for."""
    sampler: Annotated[str, BeforeValidator(backend_name("sampling.sampler"))] = "euler"
    """euler; renoise: predict x0 and add fresh noise (step-distilled LoRAs)."""
    negative_prompt: str = NEGATIVE_PROMPT
    """What the picture should not be."""
    step_cache: StepCache | None = None
    """Skip similar steps; unset: teacache when tea_cache_l1_thresh > 0, else none."""
    tea_cache_l1_thresh: Real = Field(0.0, ge=0)
    """TeaCache threshold; larger skips more."""
    teacache_coefficients: Annotated[
        Literal["auto", "1.3B", "14B"] | tuple[Real, ...], BeforeValidator(coefficients)
    ] = "auto"
    """TeaCache polynomial, highest power first, or the model whose published one to use."""
    step_cache_file: Annotated[Literal["auto", "none"] | Path, BeforeValidator(choice_or_path)] = "auto"
    """Measured constants (`omniavatar calibrate`): a file, auto (beside the checkpoint, if there) or none."""
    cache_protect_first: Whole = Field(1, ge=1)
    """First steps that are always computed."""
    cache_protect_last: Whole = Field(1, ge=0)
    """Last steps that are always computed."""
    magcache_thresh: Real = Field(0.12, gt=0)
    """MagCache: accumulated error allowed before a step is computed."""
    magcache_max_skip: Whole = Field(2, ge=1)
    """MagCache: most steps skipped in a row."""
    magcache_retention: Real = Field(0.2, ge=0, le=1)
    """MagCache: first part of the steps that is always computed."""

    @property
    def steps(self) -> int:
        """Number of denoising steps: of `timesteps` when given, else `num_steps`."""
        return self.num_steps if self.timesteps is None else len(self.timesteps)

    @property
    def effective_audio_scale(self) -> float:
        return self.guidance_scale if self.audio_scale is None else self.audio_scale

    @property
    def cache_policy(self) -> StepCache:
        if self.step_cache is not None:
            return self.step_cache
        return "teacache" if self.tea_cache_l1_thresh > 0 else "none"

    @model_validator(mode="after")
    def _teacache_needs_threshold(self) -> SamplingConfig:
        if self.step_cache == "teacache" and self.tea_cache_l1_thresh == 0:
            raise FieldError(
                "teacache skips nothing at threshold 0; set tea_cache_l1_thresh, such as 0.14",
                "step_cache",
                "tea_cache_l1_thresh",
            )
        return self


class VideoConfig(_Section):
    """Sizes, windows and timing."""

    max_hw: Literal[720, 1280] = 720
    """720: sizes of image_sizes_720 (480p); 1280: sizes of image_sizes_1280 (720p)."""
    image_sizes_720: tuple[Size, ...] = Field(((400, 720), (720, 720), (720, 400)), min_length=1)
    """[height, width] a portrait may become with max_hw 720; the nearest aspect is taken."""
    image_sizes_1280: tuple[Size, ...] = Field(
        ((720, 720), (528, 960), (960, 528), (720, 1280), (1280, 720)), min_length=1
    )
    """The same with max_hw 1280."""
    max_tokens: Whole = Field(30000, ge=1)
    """Decides a window's length: about this many tokens of 4 frames x 16 x 16 pixels."""
    overlap_frame: Whole = Field(13, ge=1)
    """Frames a window takes over from the one before; 1 + 4n."""
    seq_len: Whole = Field(200, ge=1)
    """Frames of a video without audio; with audio its length decides."""
    fps: Whole = Field(25, ge=1, le=240)
    """Frames a second."""
    sample_rate: Literal[16000] = 16000
    """Rate the audio encoder works at, Hz; no other is possible."""
    silence_duration_s: Real = Field(0.3, ge=0, le=60)
    """Silence put in front of the audio, seconds."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) choices of the effective `max_hw`."""
        return self.image_sizes_720 if self.max_hw == 720 else self.image_sizes_1280

    @model_validator(mode="after")
    def _windows_fit(self) -> VideoConfig:
        if self.overlap_frame % 4 != 1:
            near = max(1, round((self.overlap_frame - 1) / 4) * 4 + 1)
            raise FieldError(f"must be 1 + 4n (1, 5, 9, 13, ...); the nearest is {near}", "overlap_frame")
        height, width = max(self.sizes, key=lambda size: size[0] * size[1])
        try:
            length = window_length(self.max_tokens, height, width)
        except ConfigError as error:
            raise FieldError(str(error), "max_tokens") from error
        if self.overlap_frame >= length:
            raise FieldError(
                f"must be smaller than the window, {length} frames at {height}x{width} with max_tokens "
                f"{self.max_tokens}; lower overlap_frame or raise max_tokens",
                "overlap_frame",
                "max_tokens",
            )
        return self


class OutputConfig(_Section):
    """The finished video."""

    output_dir: FilePath = Path("outputs")
    """Folder of the videos when no output name is given."""
    naming: Literal["slug", "reference"] = "slug"
    """slug: <output_dir>/<index>_<slug>.mp4; reference: the original's folder naming."""
    encoder: Annotated[str, BeforeValidator(backend_name("output.encoder"))] = "auto"
    """What makes the H.264; auto: NVENC (the GPU's encoder) where it works, else x264."""
    crf: Whole = Field(18, ge=0, le=51)
    """Quality of H.264; smaller is better and larger. For NVENC the constant quantiser."""
    preset: Literal[
        "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"
    ] = "medium"
    """Speed of H.264, in x264's names; for NVENC p1 to p7."""
    resume: Flag = True
    """Go on at the last finished window of an interrupted run."""
    keep_job: Flag = False
    """Keep the job folder (windows, audio features) after the video is finished."""


class RuntimeConfig(_Section):
    """Where and how the model runs."""

    device: Annotated[str, AfterValidator(device_setting)] = "auto"
    """auto (cuda when there is one), cpu, cuda or cuda:N."""
    attention: str = "auto"
    """Attention backend by name (`omniavatar doctor` lists them); auto: the fastest exact one by our table;
    fastest: by measurement here."""
    fuse: Flag | None = None
    """Element-wise work of the blocks in single passes; unset: on CUDA. Nothing lost but rounding."""
    quantize: Annotated[str, BeforeValidator(backend_name("runtime.quantize"))] = "none"
    """fp8 (Ada, Hopper and later) or int8 (Ampere) linear layers: faster, half the memory, some error a
    forward; auto: one of them only where exact weights would have to be streamed."""
    memory: Annotated[Literal["auto"] | float, BeforeValidator(memory_limit)] = "auto"
    """Device memory to get by with: a number of GB (10^9 bytes), or auto: what is free. Where the weights
    exceed it, blocks are streamed from host memory; the video stays the same to the bit."""
    num_persistent_param_in_dit: Whole | None = Field(None, ge=0)
    """Parameters of the DiT that stay on the device, the others are streamed; unset: as memory allows."""
    vae: Annotated[str, BeforeValidator(backend_name("runtime.vae"))] = "auto"
    """How the video VAE runs; auto: fast, but plain on CUDA without triton."""
    reference_numerics: Flag = False
    """Reproduce the original's numeric quirks (for comparison with its recordings)."""
    text_cache_dir: FilePath | None = None
    """Folder of cached text embeddings; unset: `omniavatar` in the user's cache folder."""
    sp_size: Whole = Field(1, ge=1)
    """GPUs that share the tokens of each forward (sequence parallelism)."""
    cfg_parallel: Whole = Field(1, ge=1, le=3)
    """Groups of `sp_size` GPUs, over which guidance's branches are spread; processes: the product of both."""
    use_fsdp: Flag = False
    """Share the weights of the blocks out among the `sp_size` GPUs, for models that do not fit on one."""
    vae_parallel: Flag | None = None
    """In the VAE, share a picture's rows out among all GPUs of the video; unset: where the fast VAE runs."""
    exchange: Literal["auto", "direct", "collective"] = "auto"
    """How attention's heads, keys and values and the VAE's border rows travel among the GPUs of a video: by
    direct copies between GPUs of one machine that reach each other, or by NCCL's collectives; auto: direct
    where they can be. The video is the same to the bit."""
    cuda_graphs: Flag | None = None
    """Replay the blocks as one CUDA graph, so that the host launches once and not a thousand times a forward;
    unset: where a block is so short that launches show. The video is the same to the bit."""
    threads: Whole | None = Field(None, ge=1)
    """CPU threads of torch; unset: its own choice."""

    @property
    def processes(self) -> int:
        """Processes that make one video."""
        return self.sp_size * self.cfg_parallel

    @property
    def text_cache(self) -> Path:
        """Folder of cached text embeddings, the platform's user cache when none is configured."""
        places = {"darwin": "Library/Caches", "win32": "AppData/Local"}
        default = Path.home() / places.get(sys.platform, ".cache") / "omniavatar"
        return self.text_cache_dir or default

    @model_validator(mode="after")
    def _one_limit(self) -> RuntimeConfig:
        if self.memory != "auto" and self.num_persistent_param_in_dit is not None:
            raise FieldError(
                "memory and num_persistent_param_in_dit both decide what stays on the device; set one",
                "memory",
                "num_persistent_param_in_dit",
            )
        return self

    @model_validator(mode="after")
    def _sharing(self) -> RuntimeConfig:
        if self.use_fsdp and self.sp_size == 1:
            raise FieldError(
                "the weights are shared out among sp_size GPUs; set sp_size to 2 or more",
                "use_fsdp",
                "sp_size",
            )
        if self.exchange == "direct" and self.processes == 1:
            raise FieldError(
                "nothing travels where one GPU makes a video; set sp_size or cfg_parallel to 2 or more",
                "exchange",
                "sp_size",
            )
        if self.use_fsdp and self.cuda_graphs:
            raise FieldError(
                "weights that are shared out have no fixed place; set one of the two",
                "cuda_graphs",
                "use_fsdp",
            )
        if self.use_fsdp and self.num_persistent_param_in_dit is not None:
            raise FieldError(
                "use_fsdp and num_persistent_param_in_dit both decide where weights lie; set one",
                "use_fsdp",
                "num_persistent_param_in_dit",
            )
        return self


class PipelineConfig(_Section):
    """Everything a run is configured by. Every leaf name occurs once in the tree."""

    model: ModelConfig = ModelConfig()
    """Weights and precision."""
    sampling: SamplingConfig = SamplingConfig()
    """Denoising."""
    video: VideoConfig = VideoConfig()
    """Sizes, windows, timing."""
    output: OutputConfig = OutputConfig()
    """The finished video."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Device and numerics."""
