"""What a window is handed at its beginning: frames that were made, not filmed.

At inference the given frames are the model's own: the face a little another's, its small marks paler, the
picture a little softer. Trained on the film itself, the model copies such errors and adds its own. So part of
the later windows is handed frames of a double, softened: the same performance by somebody who resembles the
person in the portrait. The person is to be had from the portrait alone, the motion from the given frames.

Shapes: N clips, W windows a story, H W pixels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from training.head import Head
from training.looks import Looks, draw_looks
from training.render import gather
from training.studio import Studio
from training.takes import Take

GIVEN = 4
"""Latents of a window that may be given."""
GIVEN_FRAMES = 4 * GIVEN - 3
LIKENESS = 0.35
"""The double's greatest share of another person."""
SOFTNESS = 2.0
"""The greatest factor by which its frames are made smaller, and larger again."""
FACE = ("identity", "skin", "lip", "blush", "brow", "iris", "iris_size", "shadow", "shadow_strength", "hair")
SEED_OF_OTHERS = 7_000_000_000


def doubles(looks: Looks, head: Head, seed: int) -> Looks:
    """People who resemble those of `looks` in the same room, clothes and hair style: up to `LIKENESS` of
    another face in them, freckles and beard paler."""
    others = draw_looks(head, len(looks), SEED_OF_OTHERS + seed, 8)
    generator = torch.Generator().manual_seed(seed)
    share, freckles, beard, moustache = torch.rand(4, len(looks), generator=generator).to(head.device)
    mixed = {}
    for name in FACE:
        own = getattr(looks, name)
        weight = (LIKENESS * share).view(-1, *[1] * (own.dim() - 1))
        mixed[name] = torch.lerp(own, getattr(others, name), weight)
    paler = torch.stack([0.4 + 0.6 * beard, 0.4 + 0.6 * moustache, torch.ones_like(beard)], 1)
    return replace(looks, **mixed, freckles=looks.freckles * freckles, beard=looks.beard * paler)


def soften(frames: Tensor, factors: Tensor) -> Tensor:
    """uint8 frames (N, T, 3, H, W) without the detail that a picture `factors` (N,) times smaller has no
    room for."""
    size = frames.shape[-2:]
    made = []
    for clip, factor in zip(frames, factors.tolist(), strict=True):
        small = [max(1, round(side / factor)) for side in size]
        shrunk = torch.nn.functional.interpolate(clip.float(), small, mode="bilinear", antialias=True)
        made.append(torch.nn.functional.interpolate(shrunk, size, mode="bicubic"))
    return torch.stack(made).round_().clamp_(0, 255).to(torch.uint8)


def film_doubles(studio: Studio, takes: list[Take], looks: Looks, seed: int, starts: Tensor) -> Tensor:
    """uint8 (N, W-1, GIVEN_FRAMES, 3, H, W): the first frames of each window but the first of each story,
    with doubles of the people of `looks` drawn from `seed`, softened.

    starts: (N, W) frames at which the windows begin.
    """
    later = starts[:, 1:]
    own = torch.arange(len(takes), device=studio.device).repeat_interleave(later.shape[1])
    tracks = [
        {name: track[start : start + GIVEN_FRAMES] for name, track in take.tracks.items()}
        for take, begins in zip(takes, later.tolist(), strict=True)
        for start in begins
    ]
    played = doubles(looks, studio.head, seed).select(own)
    frames, _ = studio.renderer.frames(played, gather(tracks, studio.device))
    factors = 1 + (SOFTNESS - 1) * torch.rand(len(own), generator=torch.Generator().manual_seed(seed))
    return soften(frames, factors).unflatten(0, later.shape)
