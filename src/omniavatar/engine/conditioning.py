"""What a request is conditioned on: prompt, portrait and sound through their encoders, before the windows.

Where the configuration names `input_limits`, the portrait and the sound are held against what the model was
made for, and what does not fit is a warning: the run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omniavatar.encoders.input_limits import InputLimits
from omniavatar.types import Conditioning

if TYPE_CHECKING:
    import numpy as np

    from omniavatar.engine.models import Components
    from omniavatar.types import Recorder


@dataclass(frozen=True, eq=False)
class Sound:
    """waveform: 16 kHz with its leading silence, None for a silent video. frames: that it lasts.
    padded_frames: that the windows take. features_path: file of the audio features."""

    waveform: np.ndarray | None
    frames: int
    padded_frames: int
    features_path: Path


@torch.inference_mode()
def make_conditioning(
    components: Components, recorder: Recorder, prompts: tuple[str, str], picture: Tensor, sound: Sound
) -> Conditioning:
    """prompts: positive and negative. picture: the portrait, (1, 3, H, W) in [-1, 1]."""
    with recorder.stage("text"):
        positive, negative = components.embed_prompts(prompts)
    features: np.ndarray | None = None
    if sound.waveform is not None:
        with recorder.stage("audio"):
            features = components.audio_features(sound.waveform, sound.padded_frames, sound.features_path)
    with recorder.stage("image"):
        reference = components.vae.encode(picture.to(components.device)[:, :, None])
    if components.config.model.input_limits is not None:
        with recorder.stage("input_limits"):
            limits = InputLimits.load(components.config.model.input_limits)
            again = next(iter(components.vae.decode_stream(reference)))[:, :, 0].cpu()
            notes = limits.portrait_notes(picture, again)
            if features is not None:
                notes += limits.speech_notes(features[: sound.frames])
        for text in notes:
            recorder.event("message", text=text, level="warning")
    return Conditioning(positive, negative, reference, features)
