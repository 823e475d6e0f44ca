"""The small decoder for live use: TAEHV's form in small, trained on the film and its latents.

The latents are those of the packaged VAE and do not change. It learns the film's frames and not those of the
large decoder, which are softer and flicker; the losses are those of the large one. Examples begin anywhere in
a story: those in its middle have no memory of what was before, so their first latents do not count.

Shapes: B clips, T latents, h w latent pixels, H = 8h, W = 8w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniavatar.model.tiny_decoder import FRAMES_A_LATENT, LATENT_LIMIT, Grow, MemoryBlock, TinyDecoder
from training.loop import Budget, Log, Optimiser, Pool, mixed
from training.nets import Nets, normalised_latents
from training.settings import TinySettings
from training.stage_dit import disturb
from training.stage_vae import feature_weight, measured_fidelity, picture_loss, to_pixels
from training.studio import Studio

BRANCH = 0.1
"""Scale of the last convolution of residual branches, and of the pictures, before training."""
UNCOUNTED = 2
"""Latents at the start of an example from the middle of a story."""


def decode(tiny: TinyDecoder, latents: Tensor) -> Tensor:
    """Pixels (B, 3, 4T, H, W) of the latents (B, 16, T, h, w) of clips from their start, not clipped.

    `TinyDecoder` decodes one clip after the other; the first three frames are those that it drops.
    """
    clips = len(latents)
    x = torch.tanh(latents / LATENT_LIMIT) * LATENT_LIMIT
    x = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    for layer in tiny.decoder:
        if isinstance(layer, MemoryBlock):
            frames = x.unflatten(0, (clips, -1))
            past = torch.cat([torch.zeros_like(frames[:, :1]), frames[:, :-1]], 1).flatten(0, 1)
            x = F.relu(convolved(layer.conv, torch.cat([x, past], 1)) + x)
        else:
            x = F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
    return x.float().unflatten(0, (clips, -1)).transpose(1, 2) * 2 - 1


def convolved(layers: nn.Sequential, x: Tensor) -> Tensor:
    """The layers without in-place operations, which would overwrite what gradients need."""
    for layer in layers:
        x = F.relu(x) if isinstance(layer, nn.ReLU) else cast(Tensor, layer(x))
    return x


def fill_in(tiny: TinyDecoder) -> None:
    """Start weights: signals keep their scale, residual branches are small, pictures begin grey, and the
    frames of a latent begin equal.

    Without the first three the first pictures are far beyond black and white, and their gradients kill all
    channels. Without the last, any contrast flickers, and the loss against flicker keeps all pictures grey.
    """
    memory = {part for block in tiny.decoder if isinstance(block, MemoryBlock) for part in block.conv}
    for module in tiny.modules():
        if isinstance(module, nn.Conv2d):
            followed = 2.0 if module in memory or module.bias is not None else 1.0
            nn.init.normal_(module.weight, std=(followed / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in tiny.decoder:
        if isinstance(block, MemoryBlock):
            cast(nn.Conv2d, block.conv[-1]).weight.data.mul_(BRANCH)
        elif isinstance(block, Grow):
            each = block.conv.weight.data.unflatten(0, (block.stride, -1))
            each.copy_(each[:1].clone().expand_as(each))
    head = cast(nn.Conv2d, tiny.decoder[-1])
    head.weight.data.mul_(BRANCH)
    nn.init.constant_(cast(Tensor, head.bias), 0.5)


def clips_with_latents(nets: Nets, studio: Studio, count: int) -> dict[str, Tensor]:
    """New stories: frames uint8 (B, N, 3, H, W), mouth (B, N, 2), eyes (B, N, 2, 2), and latents
    (B, 16, T, h, w)."""
    film = studio.film(count)
    device = film.frames.device
    with torch.no_grad(), mixed(device):
        parts = film.frames.split(2 if device.type == "cuda" else 1)
        latents = torch.cat([normalised_latents(nets.vae, to_pixels(part)) for part in parts])
    return {"frames": film.frames, "mouth": film.mouth, "eyes": film.eyes, "latents": latents.half()}


def tiny_loss(
    tiny: TinyDecoder, clips: dict[str, Tensor], settings: TinySettings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Loss and mean absolute error of `settings.clip` latents of each clip, from one random place."""
    latents = clips["latents"].float()
    device, total = latents.device, latents.shape[2]
    start = int(torch.randint(-2, total - settings.clip + 1, (1,), device=device, generator=generator))
    start = max(0, start)
    last = start + settings.clip
    given = disturb(latents[:, :, start:last], settings.corrupt, generator)
    made = decode(tiny, given)[:, :, FRAMES_A_LATENT - 1 :]
    frames = slice(FRAMES_A_LATENT * start, FRAMES_A_LATENT * (last - 1) + 1)
    pixels = to_pixels(clips["frames"][:, frames])
    size = (pixels.shape[-2], pixels.shape[-1])
    places = {name: clips[name][:, frames] for name in ("mouth", "eyes")}
    weight = feature_weight(places, size, settings)
    counted = 0 if start == 0 else FRAMES_A_LATENT * UNCOUNTED - (FRAMES_A_LATENT - 1)
    return picture_loss(made[:, :, counted:], pixels[:, :, counted:], weight[:, counted:], settings)


def train_tiny(
    tiny: TinyDecoder,
    nets: Nets,
    studio: Studio,
    held_out: Tensor,
    settings: TinySettings,
    budget: Budget,
    log: Log,
    seed: int,
    keep: Callable[[], None],
) -> None:
    """Train until the budget is over and leave the averaged weights in `tiny`.

    held_out: frames uint8 (N, T, 3, H, W), T = 4n + 1.
    keep: called at each measurement, while `tiny` holds the averaged weights.
    """
    device = studio.device
    generator = torch.Generator(device).manual_seed(seed)
    nets.vae.eval().requires_grad_(False)
    tiny.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = Optimiser({"tiny": tiny}, settings, budget)
    pool = Pool(settings.pool)

    def rebuilt(pixels: Tensor) -> Tensor:
        return torch.cat(list(tiny.eval().decode_stream(normalised_latents(nets.vae, pixels))), 2)

    def measured_now(**values: float) -> None:
        optimiser.average.swap()
        with torch.no_grad():
            reached = measured_fidelity(rebuilt, held_out)
        log.add("tiny", budget, optimiser.steps, clips=pool.filled, **reached, **values)
        keep()
        optimiser.average.swap()

    pool.fill(lambda count: clips_with_latents(nets, studio, count), 4, budget, settings.fill_share)
    measured = budget.spent
    while not budget.over:
        clips = pool.draw(settings.batch, generator)
        with mixed(device):
            loss, error = tiny_loss(tiny, clips, settings, generator)
        optimiser.step(loss)
        if settings.fresh and optimiser.steps % settings.fresh_every == 0:
            pool.add(clips_with_latents(nets, studio, settings.fresh))
        if budget.measuring(measured, settings.measure_seconds, optimiser.steps):
            measured = budget.spent
            measured_now(loss=loss.item(), error=error.item())
    optimiser.average.swap()
