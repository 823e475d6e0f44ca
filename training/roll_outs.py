"""Long roll-outs of the student: does it hold what it makes from its own blocks for twenty seconds?

Held-out people, half of them still and half lively, speak held-out sentences; the noise carries the drive of
their film, so every frame can be compared with it. Written beside the weights: `roll_outs.json`, a row for
each number of steps, time and manner, and sheets with a frame a second, generated above true.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from training.nets import Nets
from training.phones import FPS
from training.sample import compared, sheet
from training.settings import StudentSettings
from training.speech import SpeechSet
from training.stage_dit import drive_of
from training.stage_student import rolled, show
from training.student_batch import roughness, told
from training.studio import Film, Studio
from training.takes import Take, make_take

SECONDS = 20
FRAMES = {"cuda": SECONDS * FPS + 1, "cpu": 2 * FPS + 3}
"""The portrait and whole blocks."""
AT = {"1 s": (0, 2), "5 s": (4, 6), "20 s": (SECONDS - 2, SECONDS)}
"""Seconds in which each time is measured."""
SEED = 50_000
MANNERS = ("still", "lively")


def long_takes(speech: SpeechSet, names: list[str], count: int) -> list[Take]:
    """`count` takes, still and lively ones in turn; their seeds are held out."""
    takes: list[Take] = []
    seed = SEED
    frames = FRAMES["cuda" if torch.cuda.is_available() else "cpu"]
    while len(takes) < count:
        take = make_take(speech, names, frames, seed, speech_alone=True, live=True)
        seed += 1
        if take.manner.motion == MANNERS[len(takes) % len(MANNERS)]:
            takes.append(take)
    return takes


def fine_structure(clip: Tensor) -> Tensor:
    """Variance of the Laplacian of the brightness of frames (T, 3, H, W)."""
    grey = clip.float().mean(1)
    centre = grey[:, 1:-1, 1:-1]
    return (
        4 * centre - grey[:, :-2, 1:-1] - grey[:, 2:, 1:-1] - grey[:, 1:-1, :-2] - grey[:, 1:-1, 2:]
    ).var()


def part_of(film: Film, frames: slice, clips: list[int]) -> Film:
    """Some frames of some clips, for what is compared by place."""
    return Film(
        film.frames[clips, frames],
        film.mouth[clips, frames],
        film.eyes[clips, frames],
        *(getattr(film, name) for name in ("opening", "sound", "phones", "shape", "prompts")),
    )


@torch.no_grad()
def long_roll_outs(
    nets: Nets, studio: Studio, takes: list[Take], settings: StudentSettings, out: Path
) -> list[dict[str, float | str]]:
    """Roll out takes with people of held-out seeds, print a row for each measurement, and write the files."""
    device = studio.device
    film = studio.film_takes(takes, SEED)
    generator = torch.Generator(device).manual_seed(7)
    stories = told(film, drive_of(takes, device), nets, settings, generator)
    rows: list[dict[str, float | str]] = []
    for steps in range(1, len(settings.timesteps) + 1):
        made = rolled(nets, stories, settings, steps, generator)
        sampled = show(nets, film, made)
        for time, (begin, end) in AT.items():
            frames = slice(1 + begin * FPS, 1 + end * FPS)
            latents = slice(1 + begin * FPS // 4, 1 + end * FPS // 4)
            if end * FPS >= film.frames.shape[1]:
                continue
            for manner in MANNERS:
                clips = [n for n, take in enumerate(takes) if take.manner.motion == manner]
                if not clips:
                    continue
                reached = compared(sampled.made[clips, frames], part_of(film, frames, clips))
                true, own = stories["latents"][clips][:, :, latents].float(), made[clips][:, :, latents]
                fine = [float(fine_structure(one) / fine_structure(other))
                        for one, other in zip(reached.made, reached.true, strict=True)]  # fmt: skip
                row: dict[str, float | str] = {
                    "steps": float(steps), "time": time, "manner": manner, "mouth_r": reached.mouth_r,
                    "eyes_r": reached.eyes_r, "psnr": reached.psnr, "fine": sum(fine) / len(fine),
                    "sharp": float(roughness(own) / roughness(true)),
                    "error": float((own - true).square().mean()),
                }  # fmt: skip
                rows.append(row)
                shown = "  ".join(
                    f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)
                )
                print(f"roll-out {time} {manner}: {shown}", flush=True)
        sheet(sampled, FPS).save(out / f"sheet_{steps}.jpg", quality=80)
    (out / "roll_outs.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows
