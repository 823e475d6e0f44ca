"""Samples two consecutive windows of held-out stories with the trained networks, as the engine does.

It measures between sessions without the files of the engine: a sheet of frames (generated above true) and the
correlation of the mouth, from the darkness of the pixels around its known position. The final measurements
use landmarks instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from omniavatar.sampling.denoise import denoise
from omniavatar.sampling.schedule import make_schedule
from training.nets import Nets, normalise_sound, normalised_latents, pixels_of
from training.scale import LATENTS, OVERLAP, WINDOW
from training.stage_dit import SHIFT, window_audio
from training.stage_vae import to_pixels
from training.studio import Film


@dataclass(frozen=True, eq=False)
class Sampled:
    """Generated and true frames of two windows.

    made, true: uint8 (N, F, 3, H, W).
    mouth_r: median correlation of the darkness of the mouth.
    """

    made: Tensor
    true: Tensor
    mouth_r: float


@torch.no_grad()
def sample(nets: Nets, film: Film, steps: int, audio_scale: float = 1.0) -> Sampled:
    """Films of at least 2 * WINDOW - OVERLAP frames, generated again from portrait, sound and prompt."""
    device = film.frames.device
    generator = torch.Generator(device).manual_seed(3)
    count, frames = film.frames.shape[:2]
    step = WINDOW - OVERLAP
    true = film.frames[:, : WINDOW + step]
    audio = nets.audio.features(normalise_sound(film.sound), frames - 1)
    ids, mask = (part.to(device) for part in nets.text.tokens(list(film.prompts)))
    text = nets.dit.prepare_text(nets.text(ids, mask))
    reference = normalised_latents(nets.vae, to_pixels(true[:, :1]))
    schedule = make_schedule(steps, SHIFT)
    given, pieces = reference, []
    for start in (0, step):
        starts = torch.full((count,), start, device=device)
        vectors = window_audio(audio, starts)
        speech, silence = nets.dit.prepare_audio(vectors), nets.dit.prepare_audio(torch.zeros_like(vectors))
        wide = reference.expand(-1, -1, LATENTS, -1, -1)
        unknown = torch.ones_like(wide[:, :1])
        unknown[:, :, : given.shape[2]] = 0
        y = torch.cat([wide, unknown], 1)

        def velocity(x: Tensor, number: int, y: Tensor = y, speech=speech, silence=silence) -> Tensor:  # type: ignore[no-untyped-def]
            timestep = torch.full((count,), schedule.timesteps[number], device=device)
            with_speech = nets.dit(x, y, timestep, text, speech)
            if audio_scale == 1:
                return with_speech
            without_speech = nets.dit(x, y, timestep, text, silence)
            return without_speech + audio_scale * (with_speech - without_speech)

        noise = torch.randn(wide.shape, device=device, generator=generator)
        latent = denoise(velocity, schedule, given, noise.clone)
        pixels = torch.cat([pixels_of(nets.vae, row[None]) for row in latent]).clamp(-1, 1)
        pieces.append(pixels if start == 0 else pixels[:, :, OVERLAP:])
        given = normalised_latents(nets.vae, pixels[:, :, -OVERLAP:])
    made = torch.cat(pieces, 2).transpose(1, 2)
    made = ((made + 1) * 127.5).round().to(torch.uint8)
    mouth_r = _mouth_correlation(made, true, film.mouth[:, : true.shape[1]])
    return Sampled(made, true, mouth_r)


def _mouth_correlation(made: Tensor, true: Tensor, mouth: Tensor) -> float:
    values = []
    for one, other, places in zip(made, true, mouth, strict=True):
        x, y = (int(value) for value in places.mean(0))
        rows, columns = slice(max(0, y - 9), y + 12), slice(max(0, x - 12), x + 12)
        tracks = [-clip[:, :, rows, columns].float().mean((1, 2, 3)) for clip in (one, other)]
        values.append(float(torch.corrcoef(torch.stack(tracks))[0, 1]))
    return float(np.nanmedian(values))


def sheet(sampled: Sampled, every: int = 4) -> Image.Image:
    """The frames of each clip in a row, generated above true."""
    rows = []
    for made, true in zip(sampled.made, sampled.true, strict=True):
        rows += [torch.cat(list(clip[::every]), 2) for clip in (made, true)]
    return Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).cpu().numpy())
