"""Stage 1, the video VAE: L1 on values and spatial differences, more around the mouth, and a small KL term.

With L1 alone, hair and freckles become their mean. `detail` weights a term that compares the local amount of
fine structure with the film, independent of the exact position of its lines. `steady` weights the change of
the error from frame to frame, so that what is still stays still.

The KL term uses the normalisation of the released VAE, so a stage that continues after
`set_latent_statistics` sees the same latents. Clips are random crops, half of them mirrored; measurements use
whole held-out frames.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from omniavatar.encoders.input_limits import psnr
from omniavatar.model.vae import LATENT_STD, WanVAE, normalise
from training.loop import Budget, Log, Optimiser, Pool, mixed
from training.nets import (
    channels_last,
    normalised_latents,
    pixels_of,
    set_latent_statistics,
    vae_decode,
    vae_encode,
)
from training.settings import DecoderSettings, PictureSettings, VaeSettings
from training.studio import Film, Studio, mouth_weight

BISECTIONS = 6
IRIS = 5.0
"""Radius in pixels of the extra weight around an eye: it is the colour of the iris that gets lost."""


def to_pixels(frames: Tensor) -> Tensor:
    """Frames (N, 3, T, H, W) in [-1, 1] from uint8 (N, T, 3, H, W)."""
    return frames.transpose(1, 2).float() / 127.5 - 1


def clips_of(studio: Studio, count: int, settings: VaeSettings) -> dict[str, Tensor]:
    """New clips from random positions in their takes."""
    start = int(torch.randint(settings.frames - settings.clip + 1, ()))
    film = studio.film(count, slice(start, start + settings.clip))
    return {"frames": film.frames, "mouth": film.mouth, "eyes": film.eyes}


def feature_weight(places: dict[str, Tensor], size: tuple[int, int], settings: PictureSettings) -> Tensor:
    """Loss weights (B, T, H, W) of pictures of a `size`, from the places of mouth (B, T, 2) and eyes
    (B, T, 2, 2) in pixels."""
    weight = mouth_weight(places["mouth"], size, 1.0, settings.mouth, 18.0)
    for eye in places["eyes"].unbind(2):
        weight = weight + mouth_weight(eye, size, 1.0, settings.eyes, IRIS) - 1
    return weight


def texture(pixels: Tensor) -> Tensor:
    """Fine structure (B, T, H/8, W/8) of clips (B, 3, T, H, W): RMS of the grey Laplacian per 8x8 cell."""
    grey = pixels.mean(1)
    inner = 4 * grey[..., 1:-1, 1:-1]
    across = grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:] + grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1]
    energy = torch.nn.functional.pad((inner - across).square(), (1, 1, 1, 1))
    return (torch.nn.functional.avg_pool2d(energy, 8) + 1e-5).sqrt()


def picture_loss(
    made: Tensor, pixels: Tensor, weight: Tensor, settings: PictureSettings
) -> tuple[Tensor, Tensor]:
    """Loss and mean absolute error of pictures (B, 3, T, H, W) with weights (B, T, H, W)."""
    error = (made - pixels).abs()
    weight = weight[:, None]
    loss = (error * weight).mean()
    for axis in (-1, -2):
        slope = (made.diff(dim=axis) - pixels.diff(dim=axis)).abs()
        loss = loss + settings.gradient * (slope * weight.narrow(axis, 0, slope.shape[axis])).mean()
    if settings.steady and made.shape[2] > 1:
        change = (made.diff(dim=2) - pixels.diff(dim=2)).abs()
        loss = loss + settings.steady * (change * weight[:, :, 1:]).mean()
    if settings.detail:
        loss = loss + settings.detail * (texture(made) - texture(pixels)).abs().mean()
    return loss, error.mean()


def vae_loss(
    vae: WanVAE, pixels: Tensor, weight: Tensor, settings: VaeSettings, decoder_only: bool = False
) -> tuple[Tensor, Tensor]:
    """Loss and mean absolute error of clips (B, 3, T, H, W) with weights (B, T, H, W)."""
    with torch.set_grad_enabled(not decoder_only):
        mean, log_variance = vae_encode(vae, pixels)
    latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    made = vae_decode(vae, latent)
    loss, error = picture_loss(made, pixels, weight, settings)
    std = torch.tensor(LATENT_STD, device=mean.device).view(1, -1, 1, 1, 1)
    variance = log_variance - 2 * std.log()
    kl = 0.5 * (normalise(mean).square() + variance.exp() - variance - 1).mean()
    return loss + settings.kl * kl, error


@torch.no_grad()
def fidelity(vae: WanVAE, frames: Tensor) -> dict[str, float]:
    """`measured_fidelity` of the VAE's reconstructions."""
    return measured_fidelity(lambda pixels: pixels_of(vae, normalised_latents(vae, pixels)), frames)


def measured_fidelity(rebuilt: Callable[[Tensor], Tensor], frames: Tensor) -> dict[str, float]:
    """Means over the reconstructions of clips, uint8 (N, T, 3, H, W).

    psnr: peak signal-to-noise ratio in dB.
    texture: fine structure relative to the film.
    flicker: mean change from frame to frame where the film has none, in grey levels.

    rebuilt: pixels (1, 3, T, H, W) for pixels.
    """
    ratios, shares, changes = [], [], []
    for clip in frames:
        pixels = to_pixels(clip[None])
        made = rebuilt(pixels).clamp(-1, 1)
        ratios.append(psnr(pixels, made))
        shares.append(float(texture(made).square().mean() / texture(pixels).square().mean()))
        still = pixels.diff(dim=2) == 0
        changes.append(127.5 * float(made.diff(dim=2).abs()[still].mean()))
    means = [sum(values) / len(values) for values in (ratios, shares, changes)]
    return dict(zip(("psnr", "texture", "flicker"), means, strict=True))


def learners(vae: WanVAE, from_layer: int) -> dict[str, nn.Module]:
    """The trained parts of the decoder, from a layer of its `upsamples` on; 0 means the whole decoder.

    Gradients of the other parts are disabled.
    """
    if not from_layer:
        return {"conv2": vae.conv2, "decoder": vae.decoder}
    vae.requires_grad_(False)
    parts = {"upsamples": vae.decoder.upsamples[from_layer:], "head": vae.decoder.head}
    for part in parts.values():
        part.requires_grad_(True)
    return parts


@torch.no_grad()
def blend(vae: WanVAE, start: dict[str, Tensor], frames: Tensor, cost: float) -> float:
    """Interpolate the weights back towards `start` until PSNR is at most `cost` dB below that of `start`.

    Returns the share of the trained weights that is kept, 0 to 1. Texture that latents do not determine costs
    PSNR, and each further unit costs more than the previous one. Interpolated weights therefore keep most of
    the gain for little loss. Source: Wortsman et al. 2022 (WiSE-FT).
    """
    end = {key: value.clone() for key, value in vae.state_dict().items()}

    def mix(share: float) -> None:
        vae.load_state_dict({key: start[key].lerp(value, share) for key, value in end.items()})

    def quality(share: float) -> float:
        mix(share)
        return fidelity(vae, frames)["psnr"]

    floor = quality(0.0) - cost
    low, high = 0.0, 1.0
    if quality(high) >= floor:
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if quality(middle) >= floor else (low, middle)
    mix(low)
    return low


def examples(
    pool: Pool, settings: VaeSettings, single: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """Clips from the pool, or four times as many single frames."""
    clips = pool.draw(settings.batch * (4 if single else 1), generator)
    if not single:
        return clips
    number = int(torch.randint(settings.clip, ()))
    return {name: value[:, number : number + 1] for name, value in clips.items()}


def train_vae(
    vae: WanVAE,
    studio: Studio,
    held_out: Film,
    settings: VaeSettings,
    budget: Budget,
    log: Log,
    seed: int,
) -> None:
    """Train until the budget is over and leave the averaged weights in `vae`.

    Unless only the decoder is trained, latents are normalised at the end.
    """
    alone = isinstance(settings, DecoderSettings)
    name = "decoder" if alone else "vae"
    device = studio.device
    start = {key: value.clone() for key, value in vae.state_dict().items()}
    generator = torch.Generator(device).manual_seed(seed)
    if device.type == "cuda":
        channels_last(vae)
    learning = learners(vae, settings.from_layer) if alone else {"vae": vae}
    optimiser = Optimiser(learning, settings, budget)
    pool = Pool(settings.pool)
    pool.fill(lambda count: clips_of(studio, count, settings), 16, budget, settings.fill_share)
    log.add(name, budget, 0, clips=pool.filled)
    measured = budget.spent
    while True:
        clips = examples(pool, settings, budget.progress < settings.still_share, generator)
        size = clips["frames"].shape[-1]
        left, top = (int(n) for n in torch.randint(size - settings.crop + 1, (2,)))
        crop = clips["frames"][..., top : top + settings.crop, left : left + settings.crop]
        corner = torch.tensor([left, top], device=device)
        places = {"mouth": clips["mouth"] - corner, "eyes": clips["eyes"] - corner}
        weight = feature_weight(places, (settings.crop, settings.crop), settings)
        pixels = to_pixels(crop)
        if optimiser.steps % 2:
            pixels, weight = pixels.flip(-1), weight.flip(-1)
        if device.type == "cuda":
            pixels = pixels.contiguous(memory_format=torch.channels_last_3d)
        with mixed(device):
            loss, error = vae_loss(vae, pixels, weight, settings, alone)
        optimiser.step(loss)
        if settings.fresh and optimiser.steps % settings.fresh_every == 0:
            pool.add(clips_of(studio, settings.fresh, settings))
        if budget.measuring(measured, settings.measure_seconds, optimiser.steps):
            measured = budget.spent
            optimiser.average.swap()
            reached = fidelity(vae, held_out.frames)
            optimiser.average.swap()
            log.add(name, budget, optimiser.steps, loss=loss.item(), error=error.item(), **reached)
        if budget.over:
            break
    optimiser.average.swap()
    ended: dict[str, float] = {"done": 1}
    if alone:
        ended["kept"] = blend(vae, start, held_out.frames, settings.cost)
    else:
        unit_latents(vae, pool, settings.batch, generator)
    log.add(name, budget, optimiser.steps, **fidelity(vae, held_out.frames), **ended)


@torch.no_grad()
def unit_latents(vae: WanVAE, pool: Pool, batch: int, generator: torch.Generator, batches: int = 16) -> None:
    """Give the latents of the clips in the pool the mean and deviation of the released VAE."""
    total = torch.zeros(2, 16, dtype=torch.float64)
    count = 0
    for _ in range(batches):
        latents = vae_encode(vae, to_pixels(pool.draw(min(batch, 4), generator)["frames"]))[0].double().cpu()
        total += torch.stack([latents.sum((0, 2, 3, 4)), latents.square().sum((0, 2, 3, 4))])
        count += latents[:, 0].numel()
    mean, square = total / count
    std = (square - mean.square()).clamp_min(1e-8).sqrt()
    device = next(vae.parameters()).device
    set_latent_statistics(vae, mean.float().to(device), std.float().to(device))
