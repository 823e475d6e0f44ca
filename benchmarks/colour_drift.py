"""How far colours and sharpness of a long video drift from its beginning, for each kind of hand-over.

    python -m benchmarks colour_drift [--config pocket] [--seconds 600] [--hp key=value ...]
        [--variants "plain; color_match=1; hand_over=clean; anchor_every=4"]

The packaged speech, repeated, drives the configured model. A variant is settings, or `plain` for none. For
each one the table compares the last twentieth of the video with its second twentieth (the first one still
shows the portrait's own pixels): distance of the mean colours and of the spreads in CIE Lab, and the part of
the sharpness (mean size of the difference between neighbouring pixels) that is left. `portrait`: distance of
the last frames' mean colour from the portrait's. `seam`: mean difference between the last frame of a window
and the first new one of the next, over that between other neighbouring frames; `worst`: the same of the
largest one. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.shared.inputs import speech
from benchmarks.shared.options import add_config, add_hp, make_parser
from benchmarks.shared.report import print_result, print_table
from omniavatar import AvatarPipeline, AvatarRequest
from omniavatar.assets import pocket
from omniavatar.config.load import load_config
from omniavatar.device import choose_device
from omniavatar.media.image import load_image
from omniavatar.model.colour import to_lab

PART = 20
PLAIN = "plain"
VARIANTS = "plain; color_match=1; hand_over=clean; anchor_every=4"


def facts(frames: np.ndarray) -> np.ndarray:
    """Mean and spread of L, a, b, and the sharpness, of each frame: (N, 7)."""
    pixels = torch.tensor(frames, device=choose_device("auto"))
    unit = pixels.permute(3, 0, 1, 2)[None].float() / 255.0
    spread, mean = torch.std_mean(to_lab(unit)[0], dim=(2, 3))
    across = (unit[..., 1:] - unit[..., :-1]).abs().mean((0, 1, 3, 4))
    return torch.cat([mean, spread, across[None]]).T.double().cpu().numpy()


def changes(frames: np.ndarray) -> np.ndarray:
    """Mean absolute difference of each frame from the one before it, in levels of 255: (N - 1,)."""
    return np.abs(np.diff(frames.astype(np.int16), axis=0)).mean((1, 2, 3))


def drift(config: Any, seconds: float, prompt: str) -> dict[str, float]:
    """The figures of one video."""
    begun = time.perf_counter()
    rows: list[np.ndarray] = []
    inside: list[np.ndarray] = []
    seams: list[float] = []
    before: np.ndarray | None = None
    text = prompt if config.family.text else ""
    with AvatarPipeline.from_config(config) as pipeline:
        for chunk in pipeline.stream(AvatarRequest(text, pocket.PORTRAIT, speech(seconds))):
            frames = chunk.frames
            rows.append(facts(frames))
            inside.append(changes(frames))
            if before is not None:
                seams.append(float(changes(np.stack([before, frames[0]]))[0]))
            before = frames[-1]
    figures = np.concatenate(rows)
    count = max(1, len(figures) // PART)
    early, late = figures[count : 2 * count].mean(0), figures[-count:].mean(0)
    portrait = facts(load_image(pocket.PORTRAIT)[None])[0]
    usual = float(np.concatenate(inside).mean())
    return {
        "mean": float(np.linalg.norm(late[:3] - early[:3])),
        "spread": float(np.linalg.norm(late[3:6] - early[3:6])),
        "portrait": float(np.linalg.norm(late[:3] - portrait[:3])),
        "sharpness": float(late[6] / early[6]),
        "seam": float(np.mean(seams)) / usual,
        "worst": max(seams) / usual,
        "change": usual,
        "frames": len(figures),
        "seconds": time.perf_counter() - begun,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    add_config(parser, "pocket")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--variants", default=VARIANTS, help="separated by semicolons")
    add_hp(parser)
    options = parser.parse_args(arguments)
    found = {}
    for variant in filter(None, map(str.strip, options.variants.split(";"))):
        values = [] if variant == PLAIN else [variant]
        config = load_config(options.config, [*options.hp, *values]).config
        found[variant] = drift(config, options.seconds, pocket.PROMPT)
    if not found or min(row["frames"] for row in found.values()) < 2 * PART:
        raise SystemExit("error: the videos are too short to compare their parts; give more --seconds")
    names = ("mean", "spread", "portrait", "sharpness", "seam", "worst")
    heads = ("hand-over", "mean colour", "spread", "from the portrait", "sharpness left", "seam", "worst")
    print_table(heads, [(key, *(f"{row[name]:.3f}" for name in names)) for key, row in found.items()])
    print_result(
        "colour_drift", config=options.config, hp=options.hp, video_seconds=options.seconds, rows=found
    )


if __name__ == "__main__":
    main()
