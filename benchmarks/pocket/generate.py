"""Makes videos of the test clips with the real engine, one folder for each variant. Measures nothing.

Runs wherever the engine runs, GPU machines included; measuring is another command, for a machine with
MediaPipe. Every variant is the given configuration with a few keys changed. The engine's silence before the
sound is left out, so that frame f of a video is frame f of its film. Finished videos are kept, so an
interrupted run continues.

Files: `made/VARIANT/NAME.mp4` with the engine's sidecar `NAME.json` and its warnings, and `made/vae.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training.looks import draw_looks
from training.motion import Manner, perform
from training.phones import Phone
from training.render import gather
from training.scale import SIZE
from training.studio import Studio

from benchmarks.pocket.material import LOOKS_SEED, TAKE_SEED, Clip, read_clips
from benchmarks.pocket.video_files import CRF, PRESET
from omniavatar import AvatarPipeline, AvatarRequest
from omniavatar.config.load import load_config
from omniavatar.engine.events import Event, Message
from omniavatar.measure.calibrate import calibrate
from omniavatar.measure.quality import psnr
from omniavatar.measure.sparse_calibration import calibrate_sparse
from omniavatar.plan.sparsity import SPARSE_NAME

VAE_PEOPLE, VAE_FRAMES, VAE_SEED = 16, 9, 40_000


@dataclass(frozen=True)
class Variant:
    """A configuration to compare: the keys it changes, and its group in the table."""

    name: str
    group: str = "default"
    changes: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    """Whether it needs step-cache constants of the model (`omniavatar calibrate`)."""
    sparse: bool = False
    """Whether it needs block masses of the model (`omniavatar calibrate --mode sparse`)."""
    against: str = ""
    """The exact variant that it approximates faster; PSNR is measured against its videos."""
    device: str = ""
    """cpu or cuda if it is meant for one of them only."""


DEFAULT = Variant("default")
ORDINARY = ("synthetic", "recorded")
WARNINGS = ".warnings"
"""Ending of the file with the texts of all warnings of a clip, in JSON."""


@dataclass(frozen=True)
class Job:
    """The clips of one variant that one process makes."""

    config: Path
    folder: Path
    variant: Variant
    clips: tuple[Clip, ...]
    threads: int | None


def overrides(job: Job) -> dict[str, Any]:
    """The settings that a job changes in the configuration."""
    changes: dict[str, Any] = {
        "silence_duration_s": 0,
        "crf": CRF,
        "preset": PRESET,
        "encoder": "x264",
        "text_cache_dir": str(job.folder / "text_cache"),
        **job.variant.changes,
    }
    if job.threads:
        changes["threads"] = job.threads
    if job.variant.calibrated:
        changes["step_cache_file"] = str(job.folder / "step_cache.json")
    if job.variant.sparse:
        changes["sparse_file"] = str(job.folder / SPARSE_NAME)
    return changes


def _work(job: Job) -> None:
    warnings: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Message) and event.level == "warning":
            warnings.append(event.text)

    pipeline = AvatarPipeline.from_config(job.config, overrides(job), on_event=listen)
    for clip in job.clips:
        inputs = job.folder / "inputs"
        request = AvatarRequest(clip.prompt, inputs / f"{clip.name}.png", inputs / f"{clip.name}.wav")
        video = job.folder / "made" / job.variant.name / f"{clip.name}.mp4"
        begun = not video.exists()
        warnings.clear()
        result = pipeline.generate(request, video)
        if begun:
            video.with_suffix(WARNINGS).write_text(json.dumps(warnings) + "\n")
        print(f"{job.variant.name} {clip.name}: {result.frames} frames in {result.seconds:.1f} s", flush=True)


def generate(
    config: Path, folder: Path, variants: Iterable[Variant], clips: list[Clip], workers: int
) -> None:
    """Make all clips of all variants. workers: processes; several have one thread each."""
    variants = list(variants)
    if any(variant.calibrated for variant in variants) and not (folder / "step_cache.json").exists():
        _calibrate(config, folder, clips[0])
    if any(variant.sparse for variant in variants) and not (folder / SPARSE_NAME).exists():
        others = [clip for clip in read_clips(folder) if clip not in clips and clip.kind in ORDINARY]
        block = next(each.changes["sparse_block_size"] for each in variants if each.sparse)
        _calibrate_sparse(config, folder, (others or clips)[0], block)
    longest_first = sorted(clips, key=lambda clip: -len(clip.opening))
    jobs = [
        Job(config, folder, variant, tuple(longest_first[part::workers]), 1 if workers > 1 else None)
        for variant in variants
        for part in range(min(workers, len(clips)))
    ]
    if workers == 1:
        for job in jobs:
            _work(job)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for _ in pool.map(_work, jobs):
            pass


def _calibrate(config: Path, folder: Path, clip: Clip) -> None:
    job = Job(config, folder, Variant("calibration", changes={"num_steps": 25}), (clip,), None)
    request = AvatarRequest(
        clip.prompt, folder / "inputs" / f"{clip.name}.png", folder / "inputs" / f"{clip.name}.wav"
    )
    calibrate(load_config(config, overrides(job)).config, request, folder / "step_cache.json", 2, False, [])


def _calibrate_sparse(config: Path, folder: Path, clip: Clip, block: int) -> None:
    """Measure the block masses on another clip than those that are made, if there is one."""
    changes = {"sparse_attention": "window", "sparse_block_size": block}
    job = Job(config, folder, Variant("calibration", changes=changes), (clip,), None)
    request = AvatarRequest(
        clip.prompt, folder / "inputs" / f"{clip.name}.png", folder / "inputs" / f"{clip.name}.wav"
    )
    calibrate_sparse(load_config(config, overrides(job)).config, request, folder / SPARSE_NAME)


@torch.inference_mode()
def measure_vae(config: Path, folder: Path) -> dict[str, float]:
    """PSNR of the VAE alone on short films of held-out people; also written to `made/vae.json`."""
    models = AvatarPipeline.from_config(config).models
    studio = Studio(iter(()), 0, torch.device("cpu"))
    rng = np.random.default_rng(VAE_SEED)
    phones = [Phone("AH", 0.1, 0.3), Phone("M", 0.3, 0.38), Phone("UW", 0.38, 0.5), Phone("IY", 0.5, 0.7)]
    tracks = [
        perform(studio.head.names, phones, 20, Manner("smiling", "lively", ""), rng)
        for _ in range(VAE_PEOPLE)
    ]
    tracks = [{name: track[-VAE_FRAMES:] for name, track in each.items()} for each in tracks]
    looks = draw_looks(studio.head, VAE_PEOPLE, VAE_SEED, SIZE)
    films = studio.renderer.frames(looks, gather(tracks, studio.head.device))[0]
    values = []
    for film in films:
        pixels = (film.float() / 127.5 - 1).transpose(0, 1)[None].to(models.device)
        again = torch.cat(list(models.vae.decode_stream(models.vae.encode(pixels))), 2)[0].transpose(0, 1)
        bytes_again = ((again.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        values.append(psnr(bytes_again.cpu().numpy(), film.numpy()))
    result = {"psnr_mean_db": float(np.mean(values)), "psnr_least_db": float(np.min(values))}
    (folder / "made").mkdir(parents=True, exist_ok=True)
    (folder / "made" / "vae.json").write_text(json.dumps(result) + "\n")
    return result


def seeds_used() -> dict[str, int]:
    """The first seeds of the held-out takes, looks and VAE films, for the report."""
    return {"takes": TAKE_SEED, "looks": LOOKS_SEED, "vae": VAE_SEED}
