"""Writes portraits of people outside the training data, to test a model; one of them is in the package.

`python -m training.portraits OUT_DIR [--count 12] [--first SEED]` writes `portrait_SEED.png`: a face at rest,
as in the first frame of a take. Seeds must be below `HELD_OUT_SEEDS`. The packaged portrait was chosen by eye
from those of `--first 50000` (see the command in the README).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.head import Head
from training.looks import draw_looks
from training.motion import Manner, perform
from training.render import Renderer, gather
from training.scale import SIZE
from training.studio import HELD_OUT_SEEDS

FIRST = 50_000
SHORTEST = 16
POSES = {50_013: (0.0857734754, 0.0221529119, 0.0464926288)}
"""Turns of the head that `perform` does not draw: the packaged portrait is older than its numbers."""


def at_rest(names: list[str], seed: int) -> dict[str, np.ndarray]:
    """Tracks (1, n) of the portrait of the person drawn from `seed`; `names` are the ARKit shapes."""
    rng = np.random.default_rng((seed, 5))
    tracks = perform(names, [], SHORTEST, Manner("neutral", "still", ""), rng, pose=POSES.get(seed))
    return {name: track[:1] for name, track in tracks.items()}


def portrait(renderer: Renderer, seed: int) -> np.ndarray:
    """The portrait of the person drawn from `seed`: uint8 (SIZE, SIZE, 3)."""
    if not 0 <= seed < HELD_OUT_SEEDS:
        raise ValueError(f"seed {seed} is not held out; choose one below {HELD_OUT_SEEDS}")
    looks = draw_looks(renderer.head, 1, seed, SIZE)
    frames = renderer.frames(looks, gather([at_rest(renderer.head.names, seed)], renderer.head.device))[0]
    return frames[0, 0].permute(1, 2, 0).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--first", type=int, default=FIRST)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    renderer = Renderer(Head(torch.device("cpu")), SIZE)
    for seed in range(arguments.first, arguments.first + arguments.count):
        Image.fromarray(portrait(renderer, seed)).save(arguments.out / f"portrait_{seed}.png")


if __name__ == "__main__":
    main()
