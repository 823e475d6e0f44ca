"""What a viewer sees first: blinks, eyes, irises, seams, flicker, tears, lively heads, warnings.

Every figure is read off the made videos and off the renderer's films, in the same way. Blinks, eyes and tears
are read in all clips, irises and seams in the clips of a minute, flicker against the film's own still pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from training.motion import MOTIONS

from benchmarks.pocket import eyes, measures, steadiness
from benchmarks.pocket.generate import WARNINGS
from benchmarks.pocket.material import Clip
from benchmarks.pocket.quality import Portraits, Watched

FIGURES = {
    "blinks_a_minute": ("blinks a minute", "12 to 25"),
    "blinks_complete": ("blinks that shut the eyes, share", ">= 0.8"),
    "one_eye_shut": ("frames with one eye open and one shut, share", "<= 0.01"),
    "gaze_apart": ("eyes look apart, share of an eye's width", "<= 0.1"),
    "iris_blue_minus_red": ("blue minus red of the irises, last second", "as the films"),
    "iris_colour_lost": ("colour of the irises lost at the end, share", "<= 0.25"),
    "seam_ratio": ("frame difference at the first new frame of a window or block, over the median", "<= 1.5"),
    "flicker": ("flicker of the background, grey levels", "<= 0.3"),
    "torn_edges": ("frames with torn colours at the lips, share", "<= 0.02"),
    "torn_lips": ("frames with torn lips, share", "<= 0.02"),
    "lively_shape": ("lively: face shape, distance to the portrait over that of two people", "film + 0.15"),
    "lively_sharpness": ("lively: sharpness over the film's", ">= 0.6"),
    "still_sharpness": ("still: sharpness over the film's", ">= 0.75"),
    "warned": ("clips without speech with a warning, share", "1"),
}
"""Name and target of each figure, in the order of the table."""


def motion_of(prompt: str) -> str:
    """The key of MOTIONS that a prompt asks for."""
    for motion, words in MOTIONS.items():
        if any(word and word in prompt for word in words):
            return motion
    return "moderate"


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are numbers; nan without any."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def median(values: Iterable[float]) -> float:
    """Median of the values that are numbers; nan without any."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.median(known)) if known else float("nan")


def warned(folder: Path, where: str, clips: list[Clip]) -> float:
    """Share of the clips that were made with a warning that little of the sound is speech; nan without clips.

    Raises FileNotFoundError for a clip that `generate` did not make.
    """
    files = [folder / where / f"{clip.name}{WARNINGS}" for clip in clips]
    texts = [json.loads(file.read_text()) for file in files]
    return mean(float(any(note.startswith("audio: only") for note in notes)) for notes in texts)


def look(
    made: list[Watched],
    true: list[Watched],
    portraits: Portraits | None,
    seams: Callable[[int], list[int]] | None,
) -> dict[str, float]:
    """The figures of `made` videos beside their films `true`, in the same order.

    seams: the frames at which a video of so many frames may jump. None for films, of which only the two ends
        of a minute are kept.
    """
    gaps = [eyes.lid_gaps(each.landmarks) for each in made]
    found = [eyes.blinks(each) for each in gaps]
    count, minutes = sum(each.count for each in found), sum(each.frames for each in found) / 60 / measures.FPS
    long = [(each, gap) for each, gap in zip(made, gaps, strict=True) if each.clip.kind == "long"]
    irises = [eyes.iris_colours(each.frames, each.landmarks, gap) for each, gap in long]
    result = {
        "blinks_a_minute": count / minutes if minutes else float("nan"),
        "blinks_complete": sum(each.complete for each in found) / count if count else float("nan"),
        "one_eye_shut": mean(map(eyes.apart_share, gaps)),
        "gaze_apart": median(
            eyes.gaze_apart(each.landmarks, gap) for each, gap in zip(made, gaps, strict=True)
        ),
        "iris_blue_minus_red": mean(eyes.blue_minus_red(each[-measures.FPS :]) for each in irises),
        "iris_colour_lost": median(map(eyes.colour_loss, irises)),
        "seam_ratio": median(
            steadiness.seam_ratio(each.frames, seams(len(each.frames))) for each, _ in long if seams
        ),
        "flicker": mean(
            steadiness.flicker(one.frames, steadiness.background(other.frames))
            for one, other in zip(made, true, strict=True)
        ),
    }
    for name, read in (
        ("torn_edges", lambda each: steadiness.mouth_edges(each.frames, each.landmarks)),
        ("torn_lips", lambda each: steadiness.lip_jerks(each.landmarks)),
    ):
        result[name] = mean(
            steadiness.torn_share(read(one), read(other))
            for one, other in zip(made, true, strict=True)
            if one.clip.kind != "long"
        )
    short = [pair for pair in zip(made, true, strict=True) if pair[0].clip.kind != "long"]
    for motion in ("lively", "still"):
        result[f"{motion}_sharpness"] = median(
            measures.sharpness(one.frames) / measures.sharpness(other.frames)
            for one, other in short
            if motion_of(one.clip.prompt) == motion
        )
    if portraits is not None:
        result["lively_shape"] = median(
            shape_from(one, portraits) for one, _ in short if motion_of(one.clip.prompt) == "lively"
        )
    return result


def shape_from(watched: Watched, portraits: Portraits) -> float:
    """Mean distance of the face's shape to the portrait's from the second second on, over that of two
    people."""
    own = portraits.shapes.get(watched.clip.name)
    if own is None:
        return float("nan")
    return mean(
        measures.shape_distance(measures.face_shape(points), own) / portraits.shape_apart
        for points in watched.landmarks[measures.FPS :]
        if not np.isnan(points).any()
    )


def markdown(made: dict[str, float] | None, films: dict[str, float]) -> str:
    """Rows of the table: target, made, films."""

    def shown(values: dict[str, float] | None, key: str) -> str:
        value = float("nan") if values is None else values.get(key, float("nan"))
        return "-" if math.isnan(value) else f"{value:.3f}"

    return "\n".join(
        f"| {name} | {target} | {shown(made, key)} | {shown(films, key)} |"
        for key, (name, target) in FIGURES.items()
    )
