"""Films takes: each gets a person of its own, and comes out as frames with all that is known about them.

Shapes: N clips, T frames, S = 640 (T-1) samples, H W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from training.head import Head
from training.looks import Looks, draw_looks
from training.render import Renderer, gather
from training.scale import SIZE
from training.takes import Take

HELD_OUT_SEEDS = 100_000


@dataclass(frozen=True, eq=False)
class Film:
    """N clips. frames: uint8 (N, T, 3, H, W). mouth: (N, T, 2) pixels, x and y. opening: (N, T), see
    `Head.mouth_opening`. sound: (N, S) float32 around +-1. phones: (N, T). shape: (N, T, A). prompts: N."""

    frames: Tensor
    mouth: Tensor
    opening: Tensor
    sound: Tensor
    phones: Tensor
    shape: Tensor
    prompts: tuple[str, ...]

    @classmethod
    def join(cls, films: list[Film]) -> Film:
        """Clips of several films of one length."""
        joined = {
            field.name: torch.cat([getattr(film, field.name) for film in films])
            for field in fields(cls)
            if field.name != "prompts"
        }
        return cls(**joined, prompts=tuple(itertools.chain(*(film.prompts for film in films))))


class Studio:
    """A renderer and a supply of takes. Looks and takes below HELD_OUT_SEEDS are for measuring, never for
    training."""

    def __init__(self, takes: Iterator[Take], first_seed: int, device: torch.device) -> None:
        self.head = Head(device)
        self.renderer = Renderer(self.head, SIZE)
        self.takes, self.seed, self.device = takes, first_seed, device

    def film(self, count: int, frames: slice | None = None) -> Film:
        """The next `count` takes, each by another person; `frames` keeps a part of each take's frames."""
        return self.film_takes(*self.cast(count), frames)

    def cast(self, count: int) -> tuple[list[Take], int]:
        """The next `count` takes, and the seed of the people who play them."""
        seed = self.seed
        self.seed += count
        return [next(self.takes) for _ in range(count)], seed

    def film_takes(self, takes: list[Take], seed: int, frames: slice | None = None) -> Film:
        """Given takes with people drawn from `seed`."""
        return self.film_people(takes, self.people(len(takes), seed), frames)

    def people(self, count: int, seed: int) -> Looks:
        """`count` people drawn from `seed`."""
        return draw_looks(self.head, count, seed, SIZE)

    def film_people(self, takes: list[Take], looks: Looks, frames: slice | None = None) -> Film:
        """Given takes, each with its person of `looks`."""
        kept = frames or slice(None)
        tracks = [{name: track[kept] for name, track in take.tracks.items()} for take in takes]
        performance = gather(tracks, self.device)
        shape = self.head.shape(looks.identity)
        length = performance.coefficients.shape[1]
        opening = torch.stack(
            [
                self.head.mouth_opening(face.expand(length, -1, -1), coefficients)
                for face, coefficients in zip(shape, performance.coefficients, strict=True)
            ]
        )
        pictures, mouth = self.renderer.frames(looks, performance)
        sound = torch.from_numpy(np.stack([take.sound for take in takes])).to(self.device)
        return Film(
            frames=pictures,
            mouth=mouth,
            opening=opening,
            sound=sound.float() / 32768,
            phones=torch.from_numpy(np.stack([take.phones[kept] for take in takes])).to(self.device),
            shape=torch.from_numpy(np.stack([take.shape[kept] for take in takes])).to(self.device),
            prompts=tuple(take.manner.prompt for take in takes),
        )


def still(take: Take) -> Take:
    """The same take without head motion, sway and gaze: for measuring the mouth where it is known to be."""
    calm = {
        name: track * 0 if name in ("head", "sway", "gaze") else track for name, track in take.tracks.items()
    }
    return replace(take, tracks=calm)


def mouth_weight(
    mouth: Tensor, size: tuple[int, int], scale: float, strength: float, spread: float
) -> Tensor:
    """(..., H, W): 1 plus a bump of `strength` around mouths (..., 2) given in pixels; `scale` is grid
    cells a pixel, `spread` the bump's radius in pixels."""
    rows = (torch.arange(size[0], device=mouth.device) + 0.5) / scale
    columns = (torch.arange(size[1], device=mouth.device) + 0.5) / scale
    away_x = (columns - mouth[..., :1]) / (1.3 * spread)
    away_y = (rows - mouth[..., 1:]) / spread
    return 1 + strength * torch.exp(-0.5 * (away_x.square()[..., None, :] + away_y.square()[..., None]))
