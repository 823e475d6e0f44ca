"""The configuration: one frozen, validated tree.

Leaf names are unique in the whole tree, so the flat key of the original code (`num_steps`) and the dotted one
(`sampling.num_steps`) name the same field. `config.load.load_config` fills the tree from a YAML file, the
checkpoint's `config.json` and `--hp` overrides. `config.values` lists the keys of the original that have no
effect here; they are accepted and reported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from omniavatar.config.backends import backend_name, registry
from omniavatar.config.families import Family, HandOver, family_of
from omniavatar.config.schema_model import DitOverrides, LoraSetting, ModelConfig
from omniavatar.config.sparsity import SparsityConfig
from omniavatar.config.values import (
    CAUSAL_FIELDS,
    NEGATIVE_PROMPT,
    FieldError,
    FilePath,
    Flag,
    ProvenanceSettings,
    Real,
    Section,
    Size,
    Whole,
    choice_or_path,
    coefficients,
    descending_timesteps,
    device_setting,
    memory_limit,
    prompt_text,
    rising_fractions,
)
from omniavatar.errors import ConfigError
from omniavatar.sampling.windows import overlap_error, window_length
from omniavatar.types import StepCache

if TYPE_CHECKING:
    from omniavatar.sampling.causal import CausalWindow

__all__ = [
    "DitOverrides",
    "LoraSetting",
    "ModelConfig",
    "OutputConfig",
    "PipelineConfig",
    "RuntimeConfig",
    "SamplingConfig",
    "VideoConfig",
]


class SamplingConfig(Section):
    """Denoising of a window; a request can override most of these (`SamplingParams`)."""

    seed: Whole = Field(42, ge=0, lt=2**63)
    """Seed of the noise; each window draws from (seed, window number)."""
    num_steps: Whole = Field(50, ge=1, le=1000)
    """Denoising steps; no effect if `timesteps` is set."""
    guidance_scale: Real = Field(4.5, ge=0)
    """Text guidance; with 1, no negative branch runs."""
    audio_scale: Real | None = Field(None, ge=0)
    """Audio guidance; unset: the value of guidance_scale. A different value adds a third branch."""
    guidance_interval: Annotated[tuple[Real, Real], AfterValidator(rising_fractions)] = (0.0, 1.0)
    """[low, high], the part of the steps with guidance, as fractions; other steps run one branch only."""
    shift: Real = Field(5.0, gt=0)
    """Shift of the flow-matching schedule."""
    timesteps: Annotated[tuple[Real, ...], AfterValidator(descending_timesteps)] | None = None
    """Explicit timesteps in (0, 1000], descending, for step-distilled LoRAs; unset: num_steps and shift."""
    sampler: Annotated[str, BeforeValidator(backend_name("sampling.sampler"))] = "euler"
    """euler; renoise: predict the clean sample and add fresh noise (for step-distilled LoRAs); causal: the
    same in blocks that see a cache of earlier blocks (for block-causal models such as LiveTalk); bridge:
    from the portrait to the clip in one step (LeapTalk)."""
    hand_over: HandOver = "pixels"
    """What a window leaves for the next one. pixels: its last frames, encoded again. clean: its last latents
    as they are, after the latent of a single frame, encoded again, with which the VAE begins a clip. latents:
    its last latents as they are (leaptalk only)."""
    causal_block: Whole = Field(3, ge=1, le=64)
    """Latents of a block (4 frames each) with sampler: causal; the number the model was trained with."""
    causal_window: Whole = Field(15, ge=1, le=4096)
    """Latents that a block attends to with sampler: causal: the sink, the newest earlier ones, its own."""
    causal_sink: Whole = Field(9, ge=0, le=4096)
    """Latents from the video's start that every block attends to with sampler: causal."""
    noise_span: Whole = Field(1, ge=1, le=64)
    """Latents over which the initial noise changes with sampler: causal, for models that were trained with
    such noise; 1: independent noise for each latent."""
    noise_white: Whole = Field(0, ge=0, le=64)
    """Channels, from the first, whose noise stays independent with noise_span, as in the model's training."""
    negative_prompt: Annotated[str, BeforeValidator(prompt_text)] = NEGATIVE_PROMPT
    """Text that describes what the video must not show."""
    step_cache: StepCache | None = None
    """Method that skips similar steps; unset: teacache if tea_cache_l1_thresh > 0, else none."""
    tea_cache_l1_thresh: Real = Field(0.0, ge=0)
    """TeaCache threshold; a larger value skips more steps."""
    teacache_coefficients: Annotated[
        Literal["auto", "1.3B", "14B"] | tuple[Real, ...], BeforeValidator(coefficients)
    ] = "auto"
    """TeaCache polynomial, highest power first, or the model size whose published polynomial to use."""
    step_cache_file: Annotated[Literal["auto", "none"] | Path, BeforeValidator(choice_or_path)] = "auto"
    """Constants measured by `omniavatar calibrate`: a file, none, or auto for the file beside the
    checkpoint if it exists."""
    cache_protect_first: Whole = Field(1, ge=1)
    """Number of first steps that are always computed."""
    cache_protect_last: Whole = Field(1, ge=0)
    """Number of last steps that are always computed."""
    magcache_thresh: Real = Field(0.12, gt=0)
    """MagCache: accumulated error at which a step is computed again."""
    magcache_max_skip: Whole = Field(2, ge=1)
    """MagCache: maximum number of steps skipped in a row."""
    magcache_retention: Real = Field(0.2, ge=0, le=1)
    """MagCache: fraction of the steps, from the first one, that is always computed."""

    @property
    def steps(self) -> int:
        """Number of denoising steps: the length of `timesteps` if set, else `num_steps`."""
        return self.num_steps if self.timesteps is None else len(self.timesteps)

    @property
    def effective_audio_scale(self) -> float:
        return self.guidance_scale if self.audio_scale is None else self.audio_scale

    @property
    def cache_policy(self) -> StepCache:
        if self.step_cache is not None:
            return self.step_cache
        return "teacache" if self.tea_cache_l1_thresh > 0 else "none"

    @property
    def causal(self) -> CausalWindow | None:
        """The window of a block-causal model; None with another sampler."""
        if not registry("sampling.sampler").get(self.sampler).causal:
            return None
        from omniavatar.sampling.causal import CausalWindow

        return CausalWindow(self.causal_block, self.causal_window, self.causal_sink)

    @model_validator(mode="after")
    def _combined(self) -> SamplingConfig:
        from omniavatar.config.combinations import check_sampling

        fields = type(self).model_fields
        check_sampling(vars(self), {name: fields[name].default for name in CAUSAL_FIELDS}, self.cache_policy)
        return self


class VideoConfig(Section):
    """Sizes, windows and timing."""

    max_hw: Literal[720, 1280] = 720
    """720: sizes of image_sizes_720 (480p); 1280: sizes of image_sizes_1280 (720p)."""
    image_sizes_720: tuple[Size, ...] = Field(((400, 720), (720, 720), (720, 400)), min_length=1)
    """Video sizes [height, width] for max_hw 720; the one nearest to the portrait's aspect is used."""
    image_sizes_1280: tuple[Size, ...] = Field(
        ((720, 720), (528, 960), (960, 528), (720, 1280), (1280, 720)), min_length=1
    )
    """Video sizes [height, width] for max_hw 1280."""
    max_tokens: Whole = Field(30000, ge=1)
    """Sets the length of a window: about this many tokens of 4 frames x 16 x 16 pixels."""
    overlap_frame: Whole = Field(13, ge=1)
    """Frames that a window shares with the previous one; 1 + 4n."""
    seq_len: Whole = Field(200, ge=1)
    """Frames of a video without audio; with audio, the audio sets the length."""
    fps: Whole = Field(25, ge=1, le=240)
    """Frames per second."""
    color_match: Real = Field(0.0, ge=0, le=1)
    """Match the colours of every frame to the portrait before it is handed over: 0 not at all, 1 completely.
    Unset: 0 for omniavatar, 1 for flashhead and leaptalk."""
    face_crop: Flag = False
    """Cut the portrait to a square around its head before it is fitted, as flashhead and leaptalk need it if
    the head is small or at the side. Needs a package: pip install 'omniavatar[face]'."""
    anchor_every: Whole = Field(0, ge=0)
    """Every n-th window starts from the portrait again, so that nothing drifts for longer than n windows. The
    head jumps there. 0: never."""
    blend_frames: Whole = Field(0, ge=0, le=1000)
    """Frames over which a window's pictures go over from the last one shown to its own, so that the change of
    sharpness and light at its start is not a jump. 0: at once, as in the original code."""
    hold_background: Real = Field(0.0, ge=0, le=255)
    """Grey levels of change below which the background is shown as in the video's first frame, so that it
    does not flicker. What moves more, lies beside that or is enclosed by it is left as it is. 0: off."""
    color_profile: Literal["convert", "ignore"] = "convert"
    """convert: turn the colours of the portrait into sRGB by its embedded profile. ignore: use its numbers
    as they are, like the original code."""
    sample_rate: Literal[16000] = 16000
    """Sample rate of the audio encoder, Hz; only 16000 is supported."""
    silence_duration_s: Real = Field(0.3, ge=0, le=60)
    """Silence before the audio, seconds."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Video sizes (height, width) for `max_hw`."""
        return self.image_sizes_720 if self.max_hw == 720 else self.image_sizes_1280

    @model_validator(mode="after")
    def _windows_fit(self) -> VideoConfig:
        height, width = max(self.sizes, key=lambda size: size[0] * size[1])
        try:
            length = window_length(self.max_tokens, height, width)
        except ConfigError as error:
            raise FieldError(str(error), "max_tokens") from error
        if problem := overlap_error(self.overlap_frame, length):
            raise FieldError(
                f"{problem}; windows have {length} frames at {height}x{width}", "overlap_frame", "max_tokens"
            )
        return self


class OutputConfig(ProvenanceSettings):
    """The finished video."""

    output_dir: FilePath = Path("outputs")
    """Folder of the videos if no output name is given."""
    naming: Literal["slug", "reference"] = "slug"
    """slug: <output_dir>/<index>_<slug>.mp4. reference: the folder names of the original code."""
    encoder: Annotated[str, BeforeValidator(backend_name("output.encoder"))] = "auto"
    """H.264 encoder; auto: NVENC (the encoder of the GPU) if it works, else x264."""
    crf: Whole = Field(18, ge=0, le=51)
    """Quality of H.264; a lower value is better and makes larger files. For NVENC, the constant quantiser."""
    preset: Literal[
        "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"
    ] = "medium"
    """Speed of the H.264 encoder, in x264's names; mapped to p1 to p7 for NVENC."""
    key_frame_s: Real = Field(10.0, ge=0, le=600)
    """Seconds between two key frames, in whole windows; a key frame is a small visible step. 0: every window
    begins with one, and lively videos are smaller. NVENC always does so. x264 encodes what lies between two
    key frames on few cores, but several such parts side by side. Unset: 10, but 0 for leaptalk, whose short
    videos are made faster than that."""
    resume: Flag = True
    """Continue an interrupted run after its last finished window."""
    keep_job: Flag = False
    """Keep the job folder (windows, audio features) after the video is finished."""


class RuntimeConfig(Section):
    """Device, memory and speed of the model."""

    device: Annotated[str, AfterValidator(device_setting)] = "auto"
    """cpu, cuda, cuda:N, or auto: cuda if available, else cpu."""
    attention: str = "auto"
    """Attention backend by name (`omniavatar doctor` lists them). auto: the fastest exact one for the GPU
    model, from a table. fastest: the fastest exact one, measured at the start."""
    fuse: Flag | None = None
    """Run the element-wise operations of the blocks in fused passes; unset: only on CUDA. Only rounding
    changes."""
    quantize: Annotated[str, BeforeValidator(backend_name("runtime.quantize"))] = "none"
    """fp8 (Ada, Hopper and later) or int8 (Ampere) linear layers: faster, half the memory, a small error per
    forward. auto: quantise only if exact weights would have to be streamed."""
    memory: Annotated[Literal["auto"] | float, BeforeValidator(memory_limit)] = "auto"
    """Limit of device memory in GB (10^9 bytes), or auto: the free memory. If the weights exceed it, blocks
    are streamed from host memory; the video is bit-identical."""
    num_persistent_param_in_dit: Whole | None = Field(None, ge=0)
    """Parameters of the DiT that stay on the device; the others are streamed. Unset: from `memory`."""
    vae: Annotated[str, BeforeValidator(backend_name("runtime.vae"))] = "auto"
    """Implementation of the video VAE; auto: fast, but plain on CUDA without triton. fp8 (Hopper) is faster
    and lossy, in both directions."""
    vae_device: Annotated[str, AfterValidator(device_setting)] | None = None
    """Device of the VAE and its decoder, such as cuda:1; unset: that of the model. Only with
    `sampler: causal`: frames are decoded while the next block is computed. The video is bit-identical."""
    reference_numerics: Flag = False
    """Reproduce the numeric quirks of the original code, to compare with its recordings."""
    text_cache_dir: FilePath | None = None
    """Folder of cached text embeddings; unset: `omniavatar` in the user's cache folder."""
    sp_size: Whole = Field(1, ge=1)
    """GPUs that share the tokens of each forward (sequence parallelism)."""
    cfg_parallel: Whole = Field(1, ge=1, le=3)
    """Groups of `sp_size` GPUs that share the guidance branches; sp_size x cfg_parallel GPUs in total."""
    use_fsdp: Flag = False
    """Distribute the weights of the blocks over the `sp_size` GPUs, for models that do not fit on one GPU."""
    vae_parallel: Flag | None = None
    """Distribute the picture rows in the VAE over all GPUs of the video; unset: only with the fast VAE."""
    exchange: Literal["auto", "direct", "collective"] = "auto"
    """Transport between the GPUs of a video. direct: copies between GPUs of one machine. collective: NCCL.
    auto: direct if the GPUs can access each other. The video is bit-identical."""
    cuda_graphs: Flag | None = None
    """Replay the blocks as one CUDA graph, which saves about a thousand kernel launches per forward. Unset:
    only if a block is so short that launches cost time. The video is bit-identical."""
    threads: Whole | None = Field(None, ge=1)
    """CPU threads of torch; unset: the default of torch. On a CPU another number makes a slightly different
    video, so a run continues only with the number it began with."""

    def fuses(self, device_type: str) -> bool:
        """Whether blocks run in fused passes on a device of this type (cuda, cpu)."""
        return device_type == "cuda" if self.fuse is None else self.fuse

    @property
    def processes(self) -> int:
        """Number of processes that make one video."""
        return self.sp_size * self.cfg_parallel

    @property
    def text_cache(self) -> Path | None:
        """Folder of cached text embeddings; by default in the user's cache folder of the platform.

        None if no folder is configured and the user has no home folder, as in some containers.
        """
        if self.text_cache_dir is not None:
            return self.text_cache_dir
        caches = {"darwin": "Library/Caches", "win32": "AppData/Local"}
        try:
            return Path.home() / caches.get(sys.platform, ".cache") / "omniavatar"
        except RuntimeError:
            return None

    @model_validator(mode="after")
    def _combined(self) -> RuntimeConfig:
        from omniavatar.config.combinations import check_runtime

        check_runtime(vars(self))
        return self


class PipelineConfig(Section):
    """All settings of a run. Every leaf name occurs once in the tree."""

    model: ModelConfig = ModelConfig()
    """Weights and their precision."""
    sampling: SamplingConfig = SamplingConfig()
    """Denoising."""
    video: VideoConfig = VideoConfig()
    """Sizes, windows and timing."""
    output: OutputConfig = OutputConfig()
    """The finished video."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Device, memory and speed."""
    sparsity: SparsityConfig = SparsityConfig()
    """Which blocks of the self-attention matrix are computed."""

    @property
    def family(self) -> Family:
        """The model family; that of `auto` is known once the weights' keys were read (`plan.preview`)."""
        return family_of(self.model.family)

    @model_validator(mode="before")
    @classmethod
    def _family_settings(cls, values: Any) -> Any:
        """`values` with the family's own settings where none are given."""
        from omniavatar.config.family_checks import with_family_settings

        return with_family_settings(values)

    @model_validator(mode="wrap")
    @classmethod
    def _refusals_first(cls, values: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        """`values`, checked; what the kind of model refuses comes before all other faults."""
        try:
            return check(values)
        except ValidationError:
            from omniavatar.config.family_checks import check_refused_first

            kinds = {name: type(field.default) for name, field in cls.model_fields.items()}
            check_refused_first(values, kinds)
            raise

    @model_validator(mode="after")
    def _combined(self) -> PipelineConfig:
        from omniavatar.config.combinations import check_causal, check_vae, check_windows
        from omniavatar.config.family_checks import check_family

        if self.model.family != "auto":
            check_family(self.family, vars(self))
        check_vae(self.runtime.vae, self.model.decoder)
        if self.sampling.causal is not None:
            check_causal(
                self.video.model_fields_set,
                vars(self.video),
                self.sampling.hand_over,
                vars(self.runtime),
                self.sparsity.sparse_attention,
            )
        else:
            overlap = self.video.overlap_frame if self.family.chunk is None else None
            hand_over, others = self.sampling.hand_over, self.family.hand_overs
            check_windows(vars(self.runtime), hand_over, others, overlap, self.model.latent_encoder)
        return self
