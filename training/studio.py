"""Films takes: each take is played by a different person and becomes frames with their ground truth.

Shapes: N clips, T frames, S = 640 (T-1) samples, H W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from training.drive import OF_THE_HEAD, SIGNALS
from training.head import Head
from training.looks import Looks, draw_looks
from training.render import Renderer, gather
from training.scale import SIZE
from training.takes import Take

HELD_OUT_SEEDS = 100_000
MOST_TRAINED_SEED = 1_000_000_000
"""Each session trains on ten times HELD_OUT_SEEDS seeds; those from here on are for measurements too."""


@dataclass(frozen=True, eq=False)
class Film:
    """N filmed clips.

    frames: uint8 (N, T, 3, H, W).
    mouth: (N, T, 2), x and y in pixels.
    eyes: (N, T, 2, 2), left and right eye, x and y in pixels.
    opening: (N, T), see `Head.mouth_opening`.
    sound: (N, S) float32 of about +-1.
    phones: (N, T).
    shape: (N, T, A).
    prompts: N texts.
    """

    frames: Tensor
    mouth: Tensor
    eyes: Tensor
    opening: Tensor
    sound: Tensor
    phones: Tensor
    shape: Tensor
    prompts: tuple[str, ...]

    @classmethod
    def join(cls, films: list[Film]) -> Film:
        """The clips of several films of equal length in one film."""
        joined = {
            field.name: torch.cat([getattr(film, field.name) for film in films])
            for field in fields(cls)
            if field.name != "prompts"
        }
        return cls(**joined, prompts=tuple(itertools.chain(*(film.prompts for film in films))))


class Studio:
    """A renderer and a supply of takes.

    Looks and takes with seeds below HELD_OUT_SEEDS are for measurements, never for training.
    """

    def __init__(self, takes: Iterator[Take], first_seed: int, device: torch.device) -> None:
        self.head = Head(device)
        self.renderer = Renderer(self.head, SIZE)
        self.takes, self.seed, self.device = takes, first_seed, device

    def film(self, count: int, frames: slice | None = None) -> Film:
        """Film the next `count` takes, each with another person; `frames` keeps only a part of each take."""
        return self.film_takes(*self.cast(count), frames)

    def cast(self, count: int) -> tuple[list[Take], int]:
        """The next `count` takes, and the seed of the people in them."""
        seed = self.seed
        self.seed += count
        return [next(self.takes) for _ in range(count)], seed

    def film_takes(self, takes: list[Take], seed: int, frames: slice | None = None) -> Film:
        """Film these takes with people drawn from `seed`."""
        return self.film_people(takes, self.people(len(takes), seed), frames)

    def people(self, count: int, seed: int) -> Looks:
        """The looks of `count` people drawn from `seed`."""
        return draw_looks(self.head, count, seed, SIZE)

    def film_people(self, takes: list[Take], looks: Looks, frames: slice | None = None) -> Film:
        """Film these takes, each with its person in `looks`."""
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
        pictures, places = self.renderer.frames(looks, performance)
        sound = torch.from_numpy(np.stack([take.sound for take in takes])).to(self.device)
        return Film(
            frames=pictures,
            mouth=places[:, :, 0],
            eyes=places[:, :, 1:],
            opening=opening,
            sound=sound.float() / 32768,
            phones=torch.from_numpy(np.stack([take.phones[kept] for take in takes])).to(self.device),
            shape=torch.from_numpy(np.stack([take.shape[kept] for take in takes])).to(self.device),
            prompts=tuple(take.manner.prompt for take in takes),
        )


def still(take: Take) -> Take:
    """The take without head motion, sway and gaze, in its drive too, to measure the mouth at a known
    position."""
    calm = {
        name: track * 0 if name in ("head", "sway", "gaze") else track for name, track in take.tracks.items()
    }
    drive = take.drive.copy()
    drive[:, [SIGNALS.index(name) for name in OF_THE_HEAD]] = 0
    return replace(take, tracks=calm, drive=drive)


def mouth_weight(
    mouth: Tensor, size: tuple[int, int], scale: float, strength: float, spread: float
) -> Tensor:
    """Weights (..., H, W): 1 plus a bump around each mouth.

    mouths: (..., 2) in pixels.
    scale: grid cells per pixel.
    strength: height of the bump.
    spread: radius of the bump in pixels.
    """
    rows = (torch.arange(size[0], device=mouth.device) + 0.5) / scale
    columns = (torch.arange(size[1], device=mouth.device) + 0.5) / scale
    away_x = (columns - mouth[..., :1]) / (1.3 * spread)
    away_y = (rows - mouth[..., 1:]) / spread
    return 1 + strength * torch.exp(-0.5 * (away_x.square()[..., None, :] + away_y.square()[..., None]))
