"""What a small model was made for, to warn of portraits and sounds it was not.

Four simple measures, whose limits a script sets from examples (`training/input_limits.py`):
- reconstruction: PSNR of the portrait after the VAE. Photographs have more detail than the pictures the VAE
  was trained on.
- colours: what the principal components of the training portraits' thumbnails leave over of this one's (root
  mean square). Photographs of faces differ here.
- outlines: a linear classifier on the directions of edges in a coarse grid. Landscapes, things and noise have
  them elsewhere than a head and shoulders in the middle.
- speech: a linear classifier on mean and deviation of the audio encoder's last hidden state over each second.
Limits: a measure says how unlike the training data an input is, not whether the video will be good.

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

from omniavatar.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
SIDE = 12
GRID, DIRECTIONS, EDGES_AT, FAINT = 8, 4, 96, 0.3
CHUNK = 25


def thumbnail(picture: Tensor) -> np.ndarray:
    """(P,) area means of a picture (1, 3, H, W) in [-1, 1]."""
    from torch.nn.functional import adaptive_avg_pool2d

    small: np.ndarray = adaptive_avg_pool2d(picture, SIDE)[0].flatten().numpy()
    return small


def outlines(picture: Tensor) -> np.ndarray:
    """(E,) strength of the edges in each direction and cell of a picture (1, 3, H, W) in [-1, 1], together of
    unit size unless they are faint."""
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
    """Decibels of a picture in [-1, 1] and what the VAE makes of it."""
    error = float((again.clamp(-1, 1) - picture).square().mean())
    return 10 * math.log10(4 / max(error, 1e-9))


def speech_vectors(features: np.ndarray, hidden: int) -> np.ndarray:
    """(seconds, 2C): mean and deviation over each whole second of the first `hidden` of features (N, D)."""
    rows = np.asarray(features[:, :hidden], dtype=np.float32)
    chunks = rows[: len(rows) // CHUNK * CHUNK].reshape(-1, CHUNK, hidden)
    return np.concatenate([chunks.mean(1), chunks.std(1)], axis=1)


@dataclass(frozen=True, eq=False)
class InputLimits:
    """Limits and what they are measured with. mean: (P,). components: (K, P), orthonormal rows.
    head_weights: (E,). speech_weights: (2C,); a second counts as speech where the score exceeds 0."""

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
        """What `save` wrote. Raises CheckpointError for a file that is missing or something else."""
        try:
            table: dict[str, Any] = json.loads(path.read_text())
            if table.pop("format") != FORMAT:
                raise ValueError("another format")
            table.pop("measured")
            arrays = ("mean", "components", "head_weights", "speech_weights")
            values: dict[str, Any] = {**table, **{key: np.array(table[key]) for key in arrays}}
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: not a file of training/input_limits.py ({error}); correct input_limits or leave it "
                "out"
            ) from error

    def save(self, path: Path, measured: dict[str, float]) -> None:
        """A JSON file. measured: what the limits were set by, for people."""
        table = {
            key: _short(value) if isinstance(value, np.ndarray) else value
            for key, value in vars(self).items()
        }
        path.write_text(json.dumps({"format": FORMAT, "measured": measured, **table}) + "\n")

    def left_over(self, small: np.ndarray) -> float:
        """What the components leave over of a thumbnail (P,)."""
        centred = small - self.mean
        rest = centred - (self.components @ centred) @ self.components
        return float(np.sqrt(np.square(rest).mean()))

    def head_score(self, edges: np.ndarray) -> float:
        """How much outlines (E,) are those of a head; about 1 for one, -1 for something else."""
        return float(edges @ self.head_weights + self.head_bias)

    def speech_share(self, features: np.ndarray) -> float:
        """Share of whole seconds that sound like speech, of audio features (N, D); 1 for less than one."""
        vectors = speech_vectors(features, len(self.speech_weights) // 2)
        if not len(vectors):
            return 1.0
        return float(np.mean(vectors @ self.speech_weights + self.speech_bias > 0))

    def portrait_notes(self, picture: Tensor, again: Tensor) -> list[str]:
        """Warnings about a portrait (1, 3, H, W) in [-1, 1]. again: after the VAE."""
        decibels = psnr(picture, again)
        reasons = []
        if decibels < self.least_psnr_db:
            reasons.append(f"its details are lost ({decibels:.1f} dB, {self.least_psnr_db:.1f} wanted)")
        if self.left_over(thumbnail(picture)) > self.most_left_over:
            reasons.append("its colours lie otherwise")
        if self.head_score(outlines(picture)) < self.least_head_score:
            reasons.append("no head is seen in its middle")
        if not reasons:
            return []
        return [
            f"image: unlike the portraits this model was trained on: {', '.join(reasons)}. It knows rendered "
            "heads; photographs of real people are outside it, and the face may change or dissolve"
        ]

    def speech_notes(self, features: np.ndarray) -> list[str]:
        """Warnings about a sound by its audio features (N, D)."""
        share = self.speech_share(features)
        if share >= self.least_speech_share:
            return []
        return [
            f"audio: speech is heard in {share:.0%} of it; the mouth follows speech only, and music or noise "
            "may leave it shut or move it at random"
        ]


def _short(values: np.ndarray) -> object:
    """Nested lists of numbers of four digits."""
    return np.vectorize(lambda value: float(f"{value:.4g}"))(values).tolist()
