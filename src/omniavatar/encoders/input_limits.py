"""Warns of portraits and sounds that a small model was not trained for.

Simple measures; `training/input_limits.py` sets the limits of the first four from examples:
- reconstruction: PSNR of the portrait after the VAE. Photographs have more detail than the training pictures
  of the VAE.
- colours: the residual (root mean square) of the portrait's thumbnail after projection on the principal
  components of the training thumbnails. Photographs of faces differ here.
- outlines: a linear classifier on the directions of edges in a coarse grid. Landscapes, objects and noise
  have other edges than a head and shoulders in the centre.
- speech: a linear classifier on mean and deviation of the audio encoder's last hidden state over each second,
  and two measures of the waveform (`voice_measures`), because the classifier takes drums for speech.
Limits: a measure shows how much an input differs from the training data, not how good the video will be.

Shapes: K components, P = 3 * SIDE * SIDE thumbnail values, E = GRID * GRID * DIRECTIONS outline values, N
frames, D audio width, C hidden width.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omniavatar.encoders.voice_measures import LOUDEST_PAUSES_DB, pauses_db, voice_share
from omniavatar.errors import CheckpointError
from omniavatar.text import read_json

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MOST_BYTES = 16_000_000
"""Of the file."""
SIDE = 12
GRID, DIRECTIONS, EDGES_AT, FAINT = 8, 4, 96, 0.3
CHUNK = 25


def thumbnail(picture: Tensor) -> np.ndarray:
    """Area means (P,) of a picture (1, 3, H, W) in [-1, 1]."""
    from torch.nn.functional import adaptive_avg_pool2d

    small: np.ndarray = adaptive_avg_pool2d(picture, SIDE)[0].flatten().numpy()
    return small


def outlines(picture: Tensor) -> np.ndarray:
    """Strength (E,) of the edges of a picture (1, 3, H, W) in [-1, 1], by direction and cell.

    The vector has unit length unless all edges are weak.
    """
    import torch
    from torch.nn.functional import adaptive_avg_pool2d

    grey = adaptive_avg_pool2d(picture.mean(1, keepdim=True), EDGES_AT)
    across = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
    down = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    size, angle = torch.hypot(across, down), 2 * torch.atan2(down, across)
    turns = [angle - 2 * math.pi * number / DIRECTIONS for number in range(DIRECTIONS)]
    parts = torch.cat([size * turn.cos().clamp_min(0) for turn in turns], 1)
    values: np.ndarray = adaptive_avg_pool2d(parts, GRID).flatten().numpy()
    return values / (np.linalg.norm(values) + FAINT)


def psnr(picture: Tensor, again: Tensor) -> float:
    """PSNR in dB between a picture in [-1, 1] and its reconstruction `again` by the VAE."""
    error = float((again.clamp(-1, 1) - picture).square().mean())
    return 10 * math.log10(4 / max(error, 1e-9))


def speech_vectors(features: np.ndarray, hidden: int) -> np.ndarray:
    """Mean and deviation (seconds, 2C) over each whole second, of the first `hidden` features of (N, D)."""
    rows = np.asarray(features[:, :hidden], dtype=np.float32)
    chunks = rows[: len(rows) // CHUNK * CHUNK].reshape(-1, CHUNK, hidden)
    return np.concatenate([chunks.mean(1), chunks.std(1)], axis=1)


@dataclass(frozen=True, eq=False)
class InputLimits:
    """The limits and the parameters of the measures.

    most_left_over: limit of `left_over`.
    mean, components: (P,) and (K, P) with orthonormal rows, of the thumbnails.
    head_weights: (E,).
    speech_weights: (2C,); a second counts as speech if its score is above 0.
    """

    least_psnr_db: float
    most_left_over: float
    least_head_score: float
    least_speech_share: float
    mean: np.ndarray
    components: np.ndarray
    head_weights: np.ndarray
    head_bias: float
    speech_weights: np.ndarray
    speech_bias: float

    @classmethod
    def load(cls, path: Path) -> InputLimits:
        """The limits in a file written by `save`. Raises CheckpointError."""
        try:
            table = read_json(path, MOST_BYTES, CheckpointError, "correct input_limits or remove it")
            if table.pop("format") != FORMAT:
                raise ValueError("another format")
            table.pop("measured")
            arrays = ("mean", "components", "head_weights", "speech_weights")
            values: dict[str, Any] = {**table, **{key: np.array(table[key]) for key in arrays}}
            limits = cls(**values)
            limits._check()
            return limits
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: not a file of training/input_limits.py ({error}); correct input_limits or remove it"
            ) from error

    def _check(self) -> None:
        """Raise ValueError for values that are not finite numbers, or of shapes that do not fit."""
        for name, value in vars(self).items():
            numbers = np.asarray(value)
            if numbers.dtype.kind not in "fiu" or not np.isfinite(numbers).all():
                raise ValueError(f"{name}: must be finite numbers")
            rank = {"mean": 1, "components": 2, "head_weights": 1, "speech_weights": 1}.get(name, 0)
            if numbers.ndim != rank:
                raise ValueError(f"{name}: has {numbers.ndim} dimensions, must have {rank}")
        if self.components.shape[1] != len(self.mean):
            raise ValueError("components: does not fit mean")

    def save(self, path: Path, measured: dict[str, float]) -> None:
        """Write the limits to a JSON file.

        measured: the values from which the limits were derived, for the reader of the file.
        """
        table = {
            key: _short(value) if isinstance(value, np.ndarray) else value
            for key, value in vars(self).items()
        }
        path.write_text(json.dumps({"format": FORMAT, "measured": measured, **table}) + "\n")

    def left_over(self, small: np.ndarray) -> float:
        """Residual (root mean square) of a thumbnail (P,) after projection on the components."""
        centred = small - self.mean
        rest = centred - (self.components @ centred) @ self.components
        return float(np.sqrt(np.square(rest).mean()))

    def head_score(self, edges: np.ndarray) -> float:
        """Score of outlines (E,): about 1 for a head, about -1 for anything else."""
        return float(edges @ self.head_weights + self.head_bias)

    def speech_share(self, features: np.ndarray) -> float:
        """Share of the whole seconds with speech, from audio features (N, D); 1 for less than one second."""
        vectors = speech_vectors(features, len(self.speech_weights) // 2)
        if not len(vectors):
            return 1.0
        return float(np.mean(vectors @ self.speech_weights + self.speech_bias > 0))

    def portrait_notes(self, picture: Tensor, again: Tensor) -> list[str]:
        """Warnings about a portrait (1, 3, H, W) in [-1, 1]; `again` is its reconstruction by the VAE."""
        decibels = psnr(picture, again)
        reasons = []
        if decibels < self.least_psnr_db:
            reasons.append(f"the VAE loses detail ({decibels:.1f} dB, limit {self.least_psnr_db:.1f} dB)")
        if self.left_over(thumbnail(picture)) > self.most_left_over:
            reasons.append("its colours differ")
        if self.head_score(outlines(picture)) < self.least_head_score:
            reasons.append("its centre shows no head")
        if not reasons:
            return []
        return [
            f"image: differs from the portraits this model was trained on: {', '.join(reasons)}. The model "
            "was trained on rendered heads; with a photograph the face may change or dissolve. For "
            "photographs take a large model: omniavatar download 1.3B"
        ]

    def speech_notes(self, features: np.ndarray, samples: np.ndarray | None = None) -> list[str]:
        """Warnings about a sound, from its audio features (N, D) and its waveform at 16 kHz."""
        share = self.speech_share(features)
        if samples is not None:
            share = min(share, voice_share(samples))
        if share < self.least_speech_share:
            return [
                f"audio: only {share:.0%} of it is speech; the mouth follows speech, and with music or noise "
                "it may stay shut or move at random; give a voice alone"
            ]
        pauses = None if samples is None else pauses_db(samples)
        if pauses is None or pauses < LOUDEST_PAUSES_DB:
            return []
        return [
            f"audio: music or noise lies under the voice (its pauses are only {-pauses:.0f} dB below the "
            "speech), and the mouth may move to it; give the voice alone"
        ]


def _short(values: np.ndarray) -> object:
    """`values` as nested lists, rounded to four digits."""
    return np.vectorize(lambda value: float(f"{value:.4g}"))(values).tolist()
