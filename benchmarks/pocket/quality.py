"""The table of the pocket model: lip sync, rest, identity over a minute, VAE, sharpness.

Everything is measured on the finished H.264 files. The renderer's films, coded in the same way, go through
the same measures and give the ceiling. The floor pairs videos with the openings of other clips, rotated by
half their length, because the silence at the start of every clip would correlate.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.pocket import measures
from benchmarks.pocket.faces import read_faces
from benchmarks.pocket.material import HARD, Clip
from benchmarks.pocket.video_files import read_video


@dataclass(frozen=True, eq=False)
class Watched:
    """A clip's video and the landmarks in it."""

    clip: Clip
    frames: np.ndarray
    landmarks: np.ndarray

    @property
    def opening(self) -> np.ndarray:
        return measures.opening(self.landmarks)

    @property
    def expected(self) -> np.ndarray:
        return np.array(self.clip.opening)


def watch(folder: Path, where: str, clips: list[Clip]) -> list[Watched]:
    """The videos of `clips` in `folder/where`. Raises FileNotFoundError for one that was not made."""
    videos = [folder / where / f"{clip.name}.mp4" for clip in clips]
    missing = [str(video) for video in videos if not video.exists()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]}: no such video ({len(missing)} missing); run "
            "`python -m benchmarks pocket_quality generate` first"
        )
    faces = read_faces(videos, folder / "faces" / where)
    return [
        Watched(clip, read_video(video), faces[clip.name]) for clip, video in zip(clips, videos, strict=True)
    ]


def lip_sync(watched: list[Watched]) -> dict[str, Any]:
    """Figures of lip sync: correlation with the openings that the phones call for (median, least), its lag,
    the floor by the openings of other clips, the opening at rest, and the share of frames with a face."""
    read = [each.opening for each in watched]
    expected = [each.expected for each in watched]
    own = [measures.correlation(one, other) for one, other in zip(read, expected, strict=True)]
    crossed = [
        measures.correlation(one, np.roll(expected[other], len(expected[other]) // 2))
        for number, one in enumerate(read)
        for other in range(len(expected))
        if other != number
    ]
    lags = [measures.best_lag(one, other) for one, other in zip(read, expected, strict=True)]
    speaking = [np.array(each.clip.speaking) for each in watched]
    return {
        "correlation": float(np.median(own)),
        "least_correlation": float(np.min(own)),
        "clips": len(watched),
        "lag_frames": float(np.median(lags)),
        "lags_within_one": float(np.mean([abs(lag) <= 1 for lag in lags])),
        "floor": float(np.median(crossed)) if crossed else 0.0,
        "rest_ratio": measures.rest_ratio(read, speaking),
        "faces_found": float(np.mean([np.mean(~np.isnan(each)) for each in read])),
        "each": {each.clip.name: round(value, 4) for each, value in zip(watched, own, strict=True)},
    }


def sharpness_ratio(made: list[Watched], true: list[Watched]) -> float:
    """Median over clips of the made video's sharpness over its film's."""
    return float(
        np.median(
            [
                measures.sharpness(one.frames) / measures.sharpness(other.frames)
                for one, other in zip(made, true, strict=True)
            ]
        )
    )


@dataclass(frozen=True, eq=False)
class Portraits:
    """Faces of all portraits, and the mean distances between two of different people."""

    pictures: dict[str, np.ndarray]
    faces: dict[str, np.ndarray]
    shapes: dict[str, np.ndarray]
    colour_apart: float
    shape_apart: float
    picture_apart: float


def read_portraits(folder: Path, clips: list[Clip]) -> Portraits:
    """Faces of the portraits of `clips`. Raises ValueError if fewer than two show a face."""
    files = [folder / "inputs" / f"{clip.name}.png" for clip in clips]
    found = read_faces(files, folder / "faces" / "inputs")
    pictures = {file.stem: np.asarray(Image.open(file)) for file in files}
    shown = {name: points[0] for name, points in found.items() if not np.isnan(points[0]).any()}
    if len(shown) < 2:
        raise ValueError(f"{folder / 'inputs'}: a face was found in {len(shown)} portraits only")
    faces = {name: measures.aligned_face(pictures[name], points) for name, points in shown.items()}
    shapes = {name: measures.face_shape(points) for name, points in shown.items()}
    names = sorted(shown)
    pairs = [(one, other) for number, one in enumerate(names) for other in names[number + 1 :]]
    return Portraits(
        pictures,
        faces,
        shapes,
        float(np.mean([measures.colour_distance(faces[a], faces[b]) for a, b in pairs])),
        float(np.mean([measures.shape_distance(shapes[a], shapes[b]) for a, b in pairs])),
        float(
            np.mean(
                [
                    measures.colour_distance(pictures[a].astype(np.float32), pictures[b].astype(np.float32))
                    for a, b in pairs
                ]
            )
        ),
    )


def identity_curve(each: Watched, portraits: Portraits) -> dict[str, Any]:
    """Distances to the portrait at every second, as shares of the mean distance between two people.

    They are the colour of the aligned face, the shape of its firm points, and the whole picture's colour.
    Drift is the increase from the first second to the last.
    """
    moments = measures.moments(each.frames)
    rows = [distances(each, measures.seconds_of(each.frames, moment), portraits) for moment in moments]
    curves = {key: [row[key] for row in rows] for key in rows[0]}
    return {"seconds": moments, "curves": curves, "drift": added(rows)}


def distances(each: Watched, part: slice, portraits: Portraits) -> dict[str, float]:
    """Distances of some frames to the portrait, as shares of the mean distance between two people."""
    name = each.clip.name
    frames, landmarks = each.frames[part], each.landmarks[part]
    face, shape = measures.mean_face(frames, landmarks), measures.mean_shape(landmarks)
    colour = measures.colour_distance(face, portraits.faces[name])
    firm = math.nan if np.isnan(shape).any() else measures.shape_distance(shape, portraits.shapes[name])
    picture = measures.colour_distance(
        frames.mean(0, dtype=np.float32), portraits.pictures[name].astype(np.float32)
    )
    return {
        "face_colour": colour / portraits.colour_apart,
        "face_shape": firm / portraits.shape_apart,
        "picture": picture / portraits.picture_apart,
    }


def added(rows: list[dict[str, float]]) -> dict[str, float]:
    """The increase from the first of several `distances` to the last."""
    return {key: rows[-1][key] - rows[0][key] for key in rows[0]}


def medians(drifts: list[dict[str, float]]) -> dict[str, float]:
    """The median of each key."""
    return {key: float(np.median([drift[key] for drift in drifts])) for key in drifts[0]}


def main_table(folder: Path, clips: list[Clip], where: str) -> dict[str, Any]:
    """All figures of the videos in `folder/where`.

    `truth` gives the ceiling: no VAE figures, and the drift between the films of the minute's two ends, where
    the person does not change.
    """
    short = [clip for clip in clips if clip.kind != "long"]
    long = [clip for clip in clips if clip.kind == "long"]
    watched = watch(folder, where, short)
    clean = [each for each in watched if each.clip.kind not in HARD]
    groups = {"all": clean} | {
        kind: [each for each in watched if each.clip.kind == kind]
        for kind in dict.fromkeys(clip.kind for clip in short if clip.kind != "wordless")
    }
    result: dict[str, Any] = {"lip_sync": {name: lip_sync(part) for name, part in groups.items()}}
    portraits = read_portraits(folder, clips) if long else None
    if where == "truth":
        if portraits is not None:
            ends = (slice(0, measures.FPS), slice(measures.FPS, None))
            ends_filmed = watch(folder, where, long)
            result["drift"] = medians(
                [added([distances(each, part, portraits) for part in ends]) for each in ends_filmed]
            )
        return result
    films = watch(folder, "truth", [each.clip for each in clean])
    result["sharpness"] = sharpness_ratio(clean, films)
    result["vae"] = json.loads((folder / "made" / "vae.json").read_text())
    if portraits is not None:
        curves = [identity_curve(each, portraits) for each in watch(folder, where, long)]
        result["identity"] = {
            "seconds": curves[0]["seconds"],
            "curves": {
                key: np.mean([each["curves"][key] for each in curves], 0).tolist()
                for key in curves[0]["curves"]
            },
            "drift": medians([each["drift"] for each in curves]),
            "drifts": {each.name: curve["drift"] for each, curve in zip(long, curves, strict=True)},
        }
    return result


def markdown(made: dict[str, Any] | None, ceiling: dict[str, Any]) -> str:
    """The table: target, result, and the result of true films for each measure."""
    true = ceiling["lip_sync"]["all"]
    rows = []

    def row(measure: str, target: str, reached: str, best: str) -> None:
        rows.append(f"| {measure} | {target} | {reached} | {best} |")

    def sync(kind: str, key: str) -> str:
        known = made is not None and kind in made["lip_sync"]
        return f"{made['lip_sync'][kind][key]:.3f}" if made is not None and known else "-"

    for kind in ceiling["lip_sync"]:
        best = ceiling["lip_sync"][kind]
        name = f"correlation of mouth opening, median of {best['clips']} clips ({kind})"
        target = ">= 0.65" if kind in ("music", "noise") else ">= 0.7" if kind in HARD else ">= 0.75"
        row(name, target, sync(kind, "correlation"), f"{best['correlation']:.3f}")
        if kind in ("music", "noise"):
            rest = f"opening in pauses over opening in speech ({kind})"
            row(rest, "<= 0.2", sync(kind, "rest_ratio"), f"{best['rest_ratio']:.3f}")
    row("the same with shuffled audio", "\\|r\\| < 0.2", sync("all", "floor"), f"{true['floor']:.3f}")
    row(
        "lag of best correlation, frames, median",
        "<= 1",
        sync("all", "lag_frames"),
        f"{true['lag_frames']:.0f}",
    )
    row(
        "opening in pauses over opening in speech",
        "<= 0.25",
        sync("all", "rest_ratio"),
        f"{true['rest_ratio']:.3f}",
    )
    row("frames in which a face is found", "", sync("all", "faces_found"), f"{true['faces_found']:.3f}")
    if made is not None:
        if "identity" in made:
            seconds = made["identity"]["seconds"]
            name = f"drift from {seconds[0]:.0f} s to {seconds[-1]:.0f} s over distance of two people, median"
            for key, value in made["identity"]["drift"].items():
                row(
                    f"{name} ({key.replace('_', ' ')})",
                    "< 0.10",
                    f"{value:.3f}",
                    f"{ceiling['drift'][key]:.3f}",
                )
        vae = made["vae"]
        least = f"{vae['psnr_mean_db']:.1f} (least {vae['psnr_least_db']:.1f})"
        row("VAE reconstruction PSNR, dB", ">= 32", least, "-")
        row("sharpness over the true film's", ">= 0.6", f"{made['sharpness']:.3f}", "1")
    head = "| measure | target | made | true films |\n|---|---|---|---|\n"
    return head + "\n".join(rows)
