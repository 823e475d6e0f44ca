"""Samples two consecutive windows of held-out stories with the trained networks, as the engine does.

It measures between sessions without the files of the engine: a sheet of frames (generated above true), and
correlations of what moves at the known places of the mouth and the eyes. The noise carries the film's drive
(`training.drive`), so a trained model blinks and turns when the film does. The final measurements use
landmarks instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from omniavatar.sampling.denoise import denoise
from omniavatar.sampling.schedule import make_schedule
from training.drive import windows_of, write
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
    eyes_r: of the change of the eyes since the portrait.
    psnr: of generated against true frames, in dB.
    """

    made: Tensor
    true: Tensor
    mouth_r: float
    eyes_r: float
    psnr: float


@torch.no_grad()
def sample(nets: Nets, film: Film, drive: Tensor, steps: int, audio_scale: float = 1.0) -> Sampled:
    """Films of at least 2 * WINDOW - OVERLAP frames, generated again from portrait, sound, prompt and drive
    (B, L, K)."""
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

        white = torch.randn(wide.shape, device=device, generator=generator)
        eyes = film.eyes[:, 0] / (true.shape[-1] / wide.shape[-1])
        noise = write(white, windows_of(drive, starts[:, None], LATENTS)[:, 0], eyes)
        latent = denoise(velocity, schedule, given, noise.clone)
        pixels = torch.cat([pixels_of(nets.vae, row[None]) for row in latent]).clamp(-1, 1)
        pieces.append(pixels if start == 0 else pixels[:, :, OVERLAP:])
        given = normalised_latents(nets.vae, pixels[:, :, -OVERLAP:])
    made = torch.cat(pieces, 2).transpose(1, 2)
    made = ((made + 1) * 127.5).round().to(torch.uint8)
    return compared(made, film)


def compared(made: Tensor, film: Film) -> Sampled:
    """What was made, uint8 (N, F, 3, H, W), beside the film's first F frames."""
    frames = made.shape[1]
    true = film.frames[:, :frames]
    error = (made.float() - true.float()).square().mean()
    return Sampled(
        made,
        true,
        _correlation(made, true, [film.mouth[:, :frames]], _darkness, (9, 12)),
        _correlation(made, true, list(film.eyes[:, :frames].unbind(2)), _change, (5, 8)),
        float(10 * torch.log10(255**2 / error.clamp_min(1e-6))),
    )


def _darkness(clip: Tensor) -> Tensor:
    return -clip.mean((1, 2, 3))


def _change(clip: Tensor) -> Tensor:
    return (clip - clip[:1]).abs().mean((1, 2, 3))


def _correlation(
    made: Tensor,
    true: Tensor,
    places: list[Tensor],
    track: Callable[[Tensor], Tensor],
    half: tuple[int, int],
) -> float:
    """Median over clips and places (N, T, 2) of the correlation of a track of the pixels around them."""
    values = []
    for place in places:
        for one, other, moving in zip(made, true, place, strict=True):
            x, y = (int(value) for value in moving.mean(0))
            rows = slice(max(0, y - half[0]), y + half[0] + 3)
            columns = slice(max(0, x - half[1]), x + half[1])
            tracks = [track(clip[:, :, rows, columns].float()) for clip in (one, other)]
            values.append(float(torch.corrcoef(torch.stack(tracks))[0, 1]))
    return float(np.nanmedian(values))


def sheet(sampled: Sampled, every: int = 4) -> Image.Image:
    """The frames of each clip in a row, generated above true."""
    rows = []
    for made, true in zip(sampled.made, sampled.true, strict=True):
        rows += [torch.cat(list(clip[::every]), 2) for clip in (made, true)]
    return Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).cpu().numpy())
