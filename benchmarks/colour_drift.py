"""How far colours and sharpness of a long video drift from its beginning, with and without `color_match`.

    python -m benchmarks colour_drift [--config pocket] [--seconds 600] [--strengths 0,0.5,1]
        [--hp key=value ...]

The packaged speech, repeated, drives the configured model. For each strength the table compares the last
twentieth of the video with its second twentieth (the first one still shows the portrait's own pixels):
distance of the mean colours and of the spreads in CIE Lab, and the part of the sharpness (mean size of the
difference between neighbouring pixels) that is left. `portrait`: distance of the last frames' mean colour
from the portrait's. Prints a table, then one line of JSON.
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


def facts(frames: np.ndarray) -> np.ndarray:
    """Mean and spread of L, a, b, and the sharpness, of each frame: (N, 7)."""
    pixels = torch.tensor(frames, device=choose_device("auto"))
    unit = pixels.permute(3, 0, 1, 2)[None].float() / 255.0
    spread, mean = torch.std_mean(to_lab(unit)[0], dim=(2, 3))
    across = (unit[..., 1:] - unit[..., :-1]).abs().mean((0, 1, 3, 4))
    return torch.cat([mean, spread, across[None]]).T.double().cpu().numpy()


def drift(config: Any, seconds: float, prompt: str) -> dict[str, float]:
    """The figures of one video."""
    begun = time.perf_counter()
    with AvatarPipeline.from_config(config) as pipeline:
        request = AvatarRequest(prompt, pocket.PORTRAIT, speech(seconds))
        rows = np.concatenate([facts(chunk.frames) for chunk in pipeline.stream(request)])
    count = max(1, len(rows) // PART)
    early, late = rows[count : 2 * count].mean(0), rows[-count:].mean(0)
    portrait = facts(load_image(pocket.PORTRAIT)[None])[0]
    return {
        "mean": float(np.linalg.norm(late[:3] - early[:3])),
        "spread": float(np.linalg.norm(late[3:6] - early[3:6])),
        "sharpness": float(late[6] / early[6]),
        "portrait": float(np.linalg.norm(late[:3] - portrait[:3])),
        "frames": len(rows),
        "seconds": time.perf_counter() - begun,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    add_config(parser, "pocket")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--strengths", default="0,0.5,1")
    add_hp(parser)
    options = parser.parse_args(arguments)
    found = {}
    for strength in options.strengths.split(","):
        config = load_config(options.config, [*options.hp, f"color_match={strength}"]).config
        found[strength] = drift(config, options.seconds, pocket.PROMPT)
    names = ("mean", "spread", "portrait", "sharpness")
    heads = ("color_match", "mean colour", "spread", "from the portrait", "sharpness left")
    print_table(heads, [(key, *(f"{row[name]:.3f}" for name in names)) for key, row in found.items()])
    print_result(
        "colour_drift", config=options.config, hp=options.hp, video_seconds=options.seconds, rows=found
    )


if __name__ == "__main__":
    main()
