"""Films windows that begin with a double, so that the model takes the person from the portrait.

At inference the given frames come from the model itself: the face differs slightly, small marks are paler and
the picture is softer. A model trained on given frames of the film copies such errors and adds new ones. In
training, some windows therefore begin with softened frames of a double: somebody who resembles the person in
the portrait and gives the same performance. In the window's course the double becomes the person. So the
model goes on from what it is given, without a step, and returns to the portrait within the window.

Shapes: N clips, T frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from training.head import Head, smoothstep
from training.looks import Looks, draw_looks
from training.render import Performance, gather
from training.scale import WINDOW
from training.studio import Studio
from training.takes import Take

RETURN = (2.0, 38.0)
"""Frames of a window between which the double becomes the person."""
LIGHT = 0.01
"""Standard deviation of the gain and offset of its light, per channel."""
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


def returning(double: Looks, person: Looks, shares: Tensor) -> Looks:
    """Looks (N*T) of a double who becomes the person: N doubles, N people, shares (N, T) of the double."""
    rows = torch.arange(len(person), device=shares.device).repeat_interleave(shares.shape[1])
    start, end = double.select(rows), person.select(rows)
    mixed = {}
    for name in (*FACE, "freckles", "beard"):
        own = getattr(end, name)
        mixed[name] = torch.lerp(own, getattr(start, name), shares.reshape(-1, *[1] * (own.dim() - 1)))
    return replace(end, **mixed)


def film_doubles(
    studio: Studio, takes: list[Take], looks: Looks, seed: int, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """A window of each take in which a double becomes the person: frames uint8 (N, WINDOW, 3, H, W), and the
    places (N, WINDOW, 3, 2) of mouth and eyes.

    The doubles are drawn from `seed`. Their frames are softened and in slightly other light, which goes in
    the same measure.

    starts: (N,), first frame of each window.
    """
    count = len(takes)
    generator = torch.Generator().manual_seed(seed)
    tracks = [
        {name: track[start : start + WINDOW] for name, track in take.tracks.items()}
        for take, start in zip(takes, starts.tolist(), strict=True)
    ]
    length = torch.arange(WINDOW, device=studio.device, dtype=torch.float32)
    shares = (1 - smoothstep(length, *RETURN)).expand(count, -1)
    performance = gather(tracks, studio.device)
    frame_by_frame = {
        field.name: getattr(performance, field.name).flatten(0, 1)[:, None] for field in fields(performance)
    }
    played = returning(doubles(looks, studio.head, seed), looks, shares)
    made = studio.renderer.frames(played, Performance(**frame_by_frame))
    frames, places = (part[:, 0].unflatten(0, (count, WINDOW)) for part in made)
    factors = 1 + (SOFTNESS - 1) * torch.rand(count, generator=generator)
    gain = 1 + LIGHT * torch.randn(count, 1, 3, 1, 1, generator=generator).to(studio.device)
    offset = 255 * LIGHT * torch.randn(count, 1, 3, 1, 1, generator=generator).to(studio.device)
    worse = soften(frames, factors).float() * gain + offset
    mixed = torch.lerp(frames.float(), worse, shares[:, :, None, None, None])
    return mixed.round_().clamp_(0, 255).to(torch.uint8), places
