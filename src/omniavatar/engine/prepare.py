"""Prepares a request for its windows, in three steps that all users of the engine share.

1. `read_inputs` reads the portrait and the settings, which is enough to plan memory.
2. `plan_request` decodes the sound and plans the windows.
3. `condition` runs the encoders and decides the steps.

If the configuration names `input_limits`, the portrait and the sound are compared with the training data. A
difference is a warning, not an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from omniavatar.config.change import effective_sampling
from omniavatar.config.values import prompt_text
from omniavatar.encoders.image import choose_bucket, prepare_image, prepare_image_bytes
from omniavatar.engine.events import Message
from omniavatar.engine.window_loop import ShouldStop, WindowSampling, end_if, never
from omniavatar.errors import InputError
from omniavatar.media.image import load_image
from omniavatar.plan.calibration import find_constants
from omniavatar.plan.run import RunPlan, WindowShape, make_plan, window_shape
from omniavatar.plan.steps import make_step_plan, sampling_schedule
from omniavatar.types import Conditioning, StepPlan

if TYPE_CHECKING:
    from torch import Tensor

    from omniavatar.config.schema import SamplingConfig
    from omniavatar.engine.continuation import Begun
    from omniavatar.engine.memory_inputs import LocalRequest
    from omniavatar.engine.models import Models
    from omniavatar.sampling.cache_constants import CacheConstants
    from omniavatar.types import LocalAudio

WAVEFORM, FEATURES = "audio_16k.f32", "audio_features.npy"
"""Files in a request's folder: 16 kHz samples (float32); audio features, one row a video frame."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """A request with its portrait and settings read. No model is loaded for it.

    - sampling: the configuration's, with the request's changes.
    - image: (H, W, 3) uint8.
    - constants: of the step cache; None without one.
    - begun: the finished video that the request goes on from; None for a new one.
    """

    request: LocalRequest
    sampling: SamplingConfig
    image: np.ndarray
    shape: WindowShape
    constants: CacheConstants | None
    begun: Begun | None = None


@dataclass(frozen=True, eq=False)
class Planned:
    """A request with its windows planned.

    - waveform: 16 kHz mono with the leading silence, memory-mapped; None for a silent video.
    - sound: what is heard in the video; None for a silent one.
    - folder: holds the files WAVEFORM and FEATURES.
    """

    inputs: Inputs
    plan: RunPlan
    waveform: np.ndarray | None
    sound: LocalAudio | None
    folder: Path


@dataclass(frozen=True, eq=False)
class Prepared(Planned):
    """A request that is ready for its windows: encoded, with its steps decided."""

    conditioning: Conditioning
    color_match: float = 0.0
    blend_frames: int = 0
    hold_background: float = 0.0

    @property
    def window_sampling(self) -> WindowSampling:
        """How the windows are sampled, with the plan's passes."""
        sampling, plan = self.inputs.sampling, self.plan
        return WindowSampling(
            sampling.seed,
            plan.schedule,
            plan.passes,
            sampling.sampler,
            plan.causal,
            plan.chunk,
            sampling.hand_over,
            self.color_match,
            plan.sparsity,
            sampling.noise_span,
            sampling.noise_white,
            self.blend_frames,
            self.hold_background,
        )

    @property
    def needs_shown(self) -> tuple[bool, bool]:
        """Which pictures a window needs, as `Shown.problem` takes them."""
        return bool(self.blend_frames), bool(self.hold_background)

    def given_shape(self, window: int) -> tuple[int, ...]:
        """Shape of what a window leaves for `window`, which is not the first, (1, 16, G, h, w)."""
        batch, channels, _, height, width = self.conditioning.reference_latent.shape
        causal = self.plan.causal
        latents = self.plan.windows[window].given_latents if causal is None else causal.block
        return (batch, channels, latents, height, width)

    def decided(self, step_plan: StepPlan) -> Prepared:
        """This request with another plan of the step cache."""
        return replace(self, plan=self.plan.decided(step_plan))


def read_inputs(models: Models, request: LocalRequest, has_audio: bool | None = None) -> Inputs:
    """Read the request's portrait and settings.

    - has_audio: whether the video has speech; None: if the request has audio.

    Raises InputError, ConfigError, CheckpointError.
    """
    config, dit, family = models.config, models.dit_config, models.config.family
    _check_prompt(request.prompt, family.text)
    if not family.text and request.prompt.strip():
        text = f"the prompt has no effect: {family.name} takes no text"
        models.recorder.event(Message(text, "warning", "prompt"))
    sampling = effective_sampling(config.sampling, request.sampling, family)
    if request.audio is not None and not dit.audio_dim:
        raise InputError("audio: this checkpoint has no audio layers; leave the audio out or set exp_path")
    if family.chunk is not None and not (request.audio is not None if has_audio is None else has_audio):
        raise InputError(f"audio: is missing; {family.name} makes its frames from a voice")
    image = _head(models, load_image(request.image, colour_profile=config.video.color_profile))
    height, width = image.shape[:2]
    begun = None
    if request.continues is not None:
        if request.audio is None:
            raise InputError("audio: is missing; a video goes on with more sound")
        if sampling.sampler == "causal":
            raise InputError(
                "continues: a block-causal video does not go on from a finished one; give the whole sound"
            )
        if family.chunk is not None:
            raise InputError(
                f"continues: a {family.name} video does not go on from a finished one, because every chunk "
                "hears the 8 s before it; give the whole sound"
            )
        from omniavatar.engine.continuation import read_begun

        begun = read_begun(request.continues, config.video)
    size = begun.size if begun is not None else request.size
    if size is None:
        size = choose_bucket(height, width, config.video.sizes)
    elif size not in config.video.sizes:
        known = ", ".join(f"{width}x{height}" for height, width in config.video.sizes)
        raise InputError(f"size: {size[1]}x{size[0]} is not configured; choose from {known}")
    _note_portrait(models, image, size)
    constants = find_constants(config.model, sampling, dit)
    speaks = request.audio is not None if has_audio is None else has_audio
    shape = shape_of(models, size, speaks, sampling)
    return Inputs(request, sampling, image, shape, constants, begun)


def _head(models: Models, image: np.ndarray) -> np.ndarray:
    """The portrait, cut to its head if the configuration says so. Raises InputError, ResourceError."""
    if not models.config.video.face_crop:
        return image
    from omniavatar.encoders.face_crop import crop_to_head

    cropped, notes = crop_to_head(image)
    for note in notes:
        models.recorder.event(Message(note, "warning"))
    return cropped


def _note_portrait(models: Models, image: np.ndarray, size: tuple[int, int]) -> None:
    """Say why a model of heads needs another crop of the portrait, where the detector is installed."""
    if models.config.family.chunk is None or models.config.video.face_crop:
        return
    from omniavatar.encoders.face_crop import detector_available, portrait_notes

    for note in portrait_notes(image, size) if detector_available() else ():
        models.recorder.event(Message(note, "warning"))


def shape_of(
    models: Models, size: tuple[int, int], has_audio: bool, sampling: SamplingConfig | None = None
) -> WindowShape:
    """The window of these models, with its sparsity plan. Raises as `plan.sparsity.find_sparsity`."""
    if models.config.sparsity.sparse_attention == "dense":
        return window_shape(models.config, size, has_audio, sampling)
    from omniavatar.plan.sparsity import sparse_shape

    return sparse_shape(models.config, size, has_audio, models.dit_config, sampling, models.sparse_limit)


def _check_prompt(prompt: str, needed: bool) -> None:
    """Raise InputError for a prompt that is no text, or empty though the model needs one."""
    try:
        prompt_text(prompt)
    except ValueError as error:
        raise InputError(f"prompt: {error}") from None
    if needed and not prompt.strip():
        raise InputError("prompt: is empty; describe the person and the scene in a sentence")


def plan_request(models: Models, inputs: Inputs, folder: Path) -> Planned:
    """Decode the sound into `folder` and plan the windows. Raises InputError, ConfigError."""
    video, audio, begun = models.config.video, inputs.request.audio, inputs.begun
    waveform: np.ndarray | None = None
    lead = video.silence_duration_s
    if audio is not None and begun is not None:
        from omniavatar.engine.continuation import JOINED, join_sounds

        with models.recorder.stage("audio_decode"):
            audio, lead = join_sounds(begun, video.fps, audio, folder / JOINED), 0.0
    if audio is not None:
        from omniavatar.media.audio import decode_mono

        path = folder / WAVEFORM
        with models.recorder.stage("audio_decode"):
            track = decode_mono(audio, path, video.sample_rate, lead)
        for note in track.notes:
            models.recorder.event(Message(note, "warning", "audio"))
        waveform = np.memmap(path, dtype=np.float32, mode="r")
    samples = None if waveform is None else len(waveform)
    plan = make_plan(models.config, inputs.shape, samples, 0 if begun is None else begun.frames)
    return Planned(inputs, plan, waveform, audio, folder)


def condition(models: Models, planned: Planned, should_stop: ShouldStop = never) -> Prepared:
    """Run the encoders, then decide the steps. Retries with less GPU memory if an allocation fails.

    Raises StoppedError between two encoders.
    """
    retry = models.residency.retry
    conditioning = retry(lambda: _encode(models, planned, should_stop))
    step_plan = retry(lambda: decide_steps(models, planned.inputs.sampling, planned.inputs.constants))
    for message in (*_notes(step_plan), *_sparse_notes(models, planned.plan)):
        models.recorder.event(message)
    plan = planned.plan.decided(step_plan)
    return Prepared(
        planned.inputs,
        plan,
        planned.waveform,
        planned.sound,
        planned.folder,
        conditioning,
        models.config.video.color_match,
        models.config.video.blend_frames,
        models.config.video.hold_background,
    )


def decide_steps(models: Models, sampling: SamplingConfig, constants: CacheConstants | None) -> StepPlan:
    """The step cache's plan. Loads the DiT if TeaCache needs its time projections."""
    timesteps = sampling_schedule(sampling).timesteps
    guard = not models.config.runtime.reference_numerics
    return make_step_plan(sampling, constants, lambda: models.time_projections(timesteps), guard)


def _notes(plan: StepPlan) -> list[Message]:
    """Messages about the step cache's plan."""
    notes = [Message(note, "warning") for note in plan.notes]
    if not plan.source:
        return notes
    text = (
        f"step cache {plan.policy}: {plan.computed} of {len(plan.compute)} steps computed; "
        f"constants {plan.source}"
    )
    return [Message(text), *notes]


def _sparse_notes(models: Models, plan: RunPlan) -> list[Message]:
    """A message about sparse attention."""
    sparse = plan.sparsity
    if sparse is None or models.sparse is None:
        return []
    kept = "" if sparse.mass is None else f", at least {sparse.mass:.1%} of each row's softmax"
    return [
        Message(
            f"sparse attention {sparse.name}: {len(sparse.sparse_steps)} of {plan.steps} steps compute "
            f"{sparse.kept_share:.0%} of the attention matrix{kept}; backend {models.sparse.name}"
        )
    ]


@torch.inference_mode()
def encode_person(models: Models, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Text embedding and portrait latent of a request, as in `types.Conditioning`, without its sound."""
    picture = prepare_image(inputs.image, inputs.shape.size)
    with models.recorder.stage("text"):
        (text,) = models.prompts.embed((inputs.request.prompt,))
    with models.recorder.stage("image"):
        reference = models.vae.encode(picture.to(models.device)[:, :, None])
    path = models.config.model.input_limits
    if path is not None:
        for message in _beyond_limits(models, path, picture, reference, None, None):
            models.recorder.event(message)
    return text, reference


@torch.inference_mode()
def _encode(models: Models, planned: Planned, should_stop: ShouldStop) -> Conditioning:
    """Encode prompt, portrait and sound."""
    end_if(should_stop(), "before the prompt was encoded")
    inputs = planned.inputs
    picture = fitted_portrait(inputs.image, planned.plan)
    if models.config.family.text:
        with models.recorder.stage("text"):
            prompts = (inputs.request.prompt, inputs.sampling.negative_prompt)
            positive, negative = models.prompts.embed(prompts)
    else:
        positive = negative = NO_TEXT
    features, reference = encode_inputs(models, planned, picture, should_stop)
    portrait = picture[:, :, None] if models.config.video.color_match else None
    return Conditioning(positive, negative, reference, features, portrait)


@torch.inference_mode()
def encode_inputs(
    models: Models, planned: Planned, picture: Tensor, should_stop: ShouldStop = never
) -> tuple[np.ndarray | None, Tensor]:
    """Audio features and portrait latent, with a warning for each input that the model was not trained for.

    - picture: of `fitted_portrait`.
    """
    plan, recorder = planned.plan, models.recorder
    features: np.ndarray | None = None
    end_if(should_stop(), "before the sound was encoded")
    if planned.waveform is not None:
        with recorder.stage("audio"):
            features = models.audio_features(planned.waveform, plan, planned.folder / FEATURES)
    end_if(should_stop(), "before the portrait was encoded")
    with recorder.stage("image"):
        reference = models.vae.encode(portrait_clip(picture.to(models.device), plan))
    if models.config.model.input_limits is not None:
        with recorder.stage("input_limits"):
            speech = None if features is None else features[: plan.frames - 1]
            path = models.config.model.input_limits
            messages = _beyond_limits(models, path, picture, reference, speech, planned.waveform)
        for message in messages:
            recorder.event(message)
    return features, reference


NO_TEXT = torch.empty(1, 0, 0)
"""Stands for the embeddings of a model without text."""


def fitted_portrait(image: np.ndarray, shape: WindowShape) -> Tensor:
    """The portrait (1, 3, H, W) float32 in [-1, 1], scaled and cropped as the model was trained."""
    return (prepare_image if shape.chunk is None else prepare_image_bytes)(image, shape.size)


def portrait_clip(picture: Tensor, shape: WindowShape) -> Tensor:
    """What the VAE encodes of the portrait (1, 3, H, W): one frame, or a chunk of equal frames."""
    frames = 1 if shape.chunk is None else shape.chunk.frames
    return picture[:, :, None].expand(-1, -1, frames, -1, -1)


def _beyond_limits(
    models: Models,
    path: Path,
    picture: Tensor,
    reference: Tensor,
    speech: np.ndarray | None,
    waveform: np.ndarray | None,
) -> list[Message]:
    """How portrait and sound differ from the training data."""
    from omniavatar.encoders.input_limits import InputLimits

    limits = InputLimits.load(path)
    decoded = next(iter(models.vae.decode_stream(reference)))[:, :, 0].cpu()
    found = [Message(text, "warning", "image") for text in limits.portrait_notes(picture, decoded)]
    if speech is not None:
        found += [Message(text, "warning", "audio") for text in limits.speech_notes(speech, waveform)]
    return found
