"""Makes the given frames of later windows from doubles, so that the model does not copy its own errors.

At inference the given frames come from the model itself: the face differs slightly, small marks are paler and
the picture is softer. A model trained on given frames of the film copies such errors and adds new ones. In
training, part of the later windows therefore gets softened frames of a double: the same performance by a
person who resembles the one in the portrait. The model must then take the person from the portrait and only
the motion from the given frames.

Shapes: N clips, W windows per story, H W pixels.
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
"""Maximum number of given latents in a window."""
GIVEN_FRAMES = 4 * GIVEN - 3
LIKENESS = 0.35
"""Maximum share of another person in a double."""
SOFTNESS = 2.0
"""Maximum factor by which its frames are scaled down and up again."""
FACE = ("identity", "skin", "lip", "blush", "brow", "iris", "iris_size", "shadow", "shadow_strength", "hair")
SEED_OF_OTHERS = 7_000_000_000


def doubles(looks: Looks, head: Head, seed: int) -> Looks:
    """People who resemble those in `looks`, in the same room, with the same clothes and hair style.

    Up to `LIKENESS` of another face is mixed in; freckles and beard are paler.
    """
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
    """uint8 frames (N, T, 3, H, W), scaled down by `factors` (N,) and up again, which removes detail."""
    size = frames.shape[-2:]
    made = []
    for clip, factor in zip(frames, factors.tolist(), strict=True):
        small = [max(1, round(side / factor)) for side in size]
        shrunk = torch.nn.functional.interpolate(clip.float(), small, mode="bilinear", antialias=True)
        made.append(torch.nn.functional.interpolate(shrunk, size, mode="bicubic"))
    return torch.stack(made).round_().clamp_(0, 255).to(torch.uint8)


def film_doubles(studio: Studio, takes: list[Take], looks: Looks, seed: int, starts: Tensor) -> Tensor:
    """The first frames of each later window with doubles of `looks`: uint8 (N, W-1, GIVEN_FRAMES, 3, H, W).

    The doubles are drawn from `seed` and the frames are softened.

    starts: (N, W), first frame of each window.
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
