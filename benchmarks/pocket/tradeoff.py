"""Measures what steps, caches, guidance and windows cost and gain: the guide's tips.

Each variant changes one setting. Time is the sidecar's, from the first denoising step to the last frame, over
the length of the video; compare rows of one machine only. Quality is lip sync (median correlation) and
sharpness over the true film's; for caches and low precision also the PSNR to the exact variant's videos.
The front holds the variants that no other variant beats in both time and lip sync, among those with nine
tenths of the best sharpness. Recommended is the fastest of the front within `NEAR` of the best correlation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pocket.generate import DEFAULT, Variant
from benchmarks.pocket.material import Clip
from benchmarks.pocket.quality import (
    Portraits,
    identity_curve,
    lip_sync,
    medians,
    sharpness_ratio,
    watch,
)
from benchmarks.pocket.video_files import read_video
from omniavatar.measure.quality import psnr

NEAR = 0.01
SHARP_SHARE = 0.9
CACHE_STEPS = 25
SPARSE_BLOCK, DENSITIES = 16, (0.75, 0.5, 0.35, 0.25)
SMALL_BLOCKS = {"sparse_block_size": SPARSE_BLOCK, "sparse_backend": "eager"}
"""Blocks that fit the pocket model; only PyTorch's attention under a mask takes them, on a GPU too."""
STAGES = ("denoise", "vae_decode", "vae_encode")


def variants() -> list[Variant]:
    """The default and all its variants."""
    found = [DEFAULT]
    found += [Variant(f"steps_{steps}", "steps", {"num_steps": steps}) for steps in (50, 25, 20, 15, 8, 4)]
    found += [
        Variant(
            f"teacache_{threshold:g}",
            "teacache",
            {"num_steps": CACHE_STEPS, "tea_cache_l1_thresh": threshold},
            calibrated=threshold > 0,
            against="teacache_0" if threshold else "",
        )
        for threshold in (0.0, 0.1, 0.14, 0.2)
    ]
    cached = {"num_steps": CACHE_STEPS, "step_cache": "magcache"}
    found.append(Variant("magcache", "magcache", cached, calibrated=True, against="teacache_0"))
    found += [Variant(f"guidance_{scale}", "guidance", {"guidance_scale": scale}) for scale in range(1, 7)]
    found += [
        Variant(f"text_{text}_audio_{audio}", "scales", {"guidance_scale": text, "audio_scale": audio})
        for text, audio in ((1, 1.5), (1, 2), (1, 3), (2, 1), (3, 1), (2, 3))
    ]
    found += [Variant(f"overlap_{frames}", "overlap", {"overlap_frame": frames}) for frames in (1, 5, 9, 13)]
    found += [
        Variant(f"window_{frames}", "window", {"max_tokens": _tokens(frames)}) for frames in (25, 33, 41, 57)
    ]
    return found + precisions() + sparse_attention()


def sparse_attention() -> list[Variant]:
    """Calibrated plans and windows of several densities, in blocks that fit the pocket model's tokens."""
    found = [
        Variant(
            f"sparse_{name}_{round(100 * density)}",
            "sparse",
            {"sparse_attention": name, "sparse_density": density, **SMALL_BLOCKS},
            sparse=name == "calibrated",
            against="default",
            device="cpu",
        )
        for density in DENSITIES
        for name in ("calibrated", "window")
    ]
    everything = {"sparse_attention": "window", "sparse_density": 1.0, **SMALL_BLOCKS}
    return [Variant("sparse_100", "sparse", everything, against="default", device="cpu"), *found]


def precisions() -> list[Variant]:
    """Float8 and int8: on a CPU by slow twins on top of float32, on CUDA by kernels on top of bf16."""
    twins = [
        Variant(form, "precision", {"quantize": form}, against="default", device="cpu")
        for form in ("fp8", "int8")
    ]
    found = [Variant("bf16", "precision", {"dtype": "bf16"}, against="default", device="cuda")]
    for name, changes in (
        ("bf16_fp8", {"quantize": "fp8"}),
        ("bf16_int8", {"quantize": "int8"}),
        ("bf16_fp8_attention", {"quantize": "fp8", "attention": "fa3_fp8"}),
    ):
        found.append(Variant(name, "precision", {"dtype": "bf16", **changes}, against="bf16", device="cuda"))
    return twins + found


def _tokens(frames: int) -> int:
    """`max_tokens` for windows of `frames` frames at 192x192."""
    return -(-frames * 192 * 192 // 1024)


def measure(
    folder: Path, clips: list[Clip], chosen: list[Variant], portraits: Portraits | None = None
) -> list[dict[str, Any]]:
    """One row for each variant, all on the same clips.

    portraits: given for clips of a minute; rows then say how far the person drifts from its first second to
    its last.
    """
    true = watch(folder, "truth", clips)
    rows = []
    for variant in chosen:
        where = f"made/{variant.name}"
        watched = watch(folder, where, clips)
        sync = lip_sync(watched)
        drifts = [] if portraits is None else [identity_curve(each, portraits)["drift"] for each in watched]
        cars = [json.loads((folder / where / f"{clip.name}.json").read_text()) for clip in clips]
        seconds = [sum(car["stages"][stage] for stage in STAGES if stage in car["stages"]) for car in cars]
        rows.append(
            {
                "variant": variant.name,
                "group": variant.group,
                "seconds_a_second": float(
                    np.median(
                        [value / (car["frames"] / 25) for value, car in zip(seconds, cars, strict=True)]
                    )
                ),
                "forwards_a_window": float(
                    np.mean([car["plan"]["forwards"] / car["windows"] for car in cars])
                ),
                "correlation": sync["correlation"],
                "rest_ratio": sync["rest_ratio"],
                "lag_frames": sync["lag_frames"],
                "sharpness": sharpness_ratio(watched, true),
                "psnr_db": likeness(folder, variant, clips),
                "kept_share": float(np.mean([_kept(car["plan"]) for car in cars])),
                "device": cars[0]["device"],
                **({"drift": medians(drifts)} if drifts else {}),
            }
        )
    return rows


def _kept(plan: dict[str, Any]) -> float:
    """The share of attention that the sparse steps of a run computed; 1 without such steps."""
    return float(plan["sparsity"]["kept_share"]) if "sparsity" in plan else 1.0


def likeness(folder: Path, variant: Variant, clips: list[Clip]) -> float | None:
    """Median PSNR in dB of the videos to the exact variant's; None for a variant without one."""
    if not variant.against:
        return None
    pairs = [
        [read_video(folder / "made" / name / f"{clip.name}.mp4") for name in (variant.name, variant.against)]
        for clip in clips
    ]
    return float(np.median([psnr(made, aim) for made, aim in pairs]))


def pareto(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the variants on the front, fastest first."""
    sharp = [row for row in rows if row["sharpness"] >= SHARP_SHARE * max(each["sharpness"] for each in rows)]
    front: list[dict[str, Any]] = []
    for row in sorted(sharp, key=lambda row: (row["seconds_a_second"], -row["correlation"])):
        if not front or row["correlation"] > front[-1]["correlation"]:
            front.append(row)
    return [row["variant"] for row in front]


def recommended(rows: list[dict[str, Any]]) -> str:
    """The fastest variant of the front whose correlation is within `NEAR` of the best."""
    front = [row for name in pareto(rows) for row in rows if row["variant"] == name]
    best = max(row["correlation"] for row in front)
    return str(next(row["variant"] for row in front if row["correlation"] >= best - NEAR))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of all rows, with the front marked, and the recommendation."""
    front, choice = pareto(rows), recommended(rows)
    drifts = list(rows[0].get("drift", ()))
    more = "".join(f" drift of the {name.replace('_', ' ')} |" for name in drifts)
    head = (
        "| variant | forwards a window | s a second of video | correlation | lag | at rest | sharpness "
        f"| PSNR to the exact one, dB | front |{more}\n"
        f"|---|---|---|---|---|---|---|---|---|{'---|' * len(drifts)}"
    )
    lines = [
        f"| {row['variant']} | {row['forwards_a_window']:.1f} | {row['seconds_a_second']:.3f} "
        f"| {row['correlation']:.3f} | {row['lag_frames']:g} | {row['rest_ratio']:.3f} "
        f"| {row['sharpness']:.3f} | {'' if row['psnr_db'] is None else format(row['psnr_db'], '.1f')} "
        f"| {'yes' if row['variant'] in front else ''} |"
        + "".join(f" {row['drift'][name]:.3f} |" for name in drifts)
        for row in rows
    ]
    device = rows[0]["device"]
    return "\n".join([head, *lines, "", f"Measured on {device}. Recommended: `{choice}`."])
