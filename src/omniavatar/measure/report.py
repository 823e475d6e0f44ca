"""What a profiled run says: seconds by stage, window and step; TFLOP/s and the share of the device's floor.

Pure: from spans (`trace`), stage times (`recorder`), the figures of each request and the sizes of the models
to one JSON-able dictionary. Stages of the thread that writes the video run beside the model and are marked
so; they count for the overall time only where the model waits for them.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from omniavatar.engine.recorder import StageTime
from omniavatar.measure.ceilings import Ceilings
from omniavatar.measure.flops import Grid, Work, decode_work, encode_work, forward_work, skipped_forward_work
from omniavatar.measure.trace import DENOISE, STEP, Span

if TYPE_CHECKING:
    from omniavatar.model.sizes import DiTConfig, VAEConfig
    from omniavatar.types import Window

LABELS: Mapping[str, str] = {
    "load_dit": "load diffusion transformer",
    "load_vae": "load VAE",
    "load_audio_encoder": "load audio encoder",
    "load_text_encoder": "load text encoder",
    "audio_decode": "audio: read and resample",
    "audio": "audio: features",
    "audio_encode": "audio: AAC track",
    "text": "text embeddings",
    "image": "image: portrait to latent",
    "denoise": "denoising",
    "vae_decode": "VAE decode",
    "vae_encode": "VAE encode of the hand-over",
    "video_write": "video: encode",
    "video_append": "video: write",
    "video_finish": "video: finish",
}
"""Stage names in the order a report lists them; a stage that is not here follows under its own name."""


@dataclass(frozen=True)
class RequestFigures:
    """What one finished request was. tokens: of one forward. branches: forwards a step."""

    output: str
    frames: int
    fps: float
    seconds: float
    size: tuple[int, int]
    windows: tuple[Window, ...]
    tokens: int
    steps: int
    pattern: str
    branches: int
    forwards: int
    forwards_skipped: int

    @property
    def video_seconds(self) -> float:
        return self.frames / self.fps

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.size[0] // 8, self.size[1] // 8


@dataclass(frozen=True)
class Models:
    """Sizes of the models that ran; vae None where its decoder is not the released one."""

    dit: DiTConfig
    vae: VAEConfig | None


def build_report(
    spans: Sequence[Span],
    timings: Mapping[str, StageTime],
    requests: Sequence[RequestFigures],
    models: Models,
    ceiling: Ceilings,
    fp8: Ceilings | None,
    seconds: float,
) -> dict[str, Any]:
    """The report. seconds: of the whole run, model loading included."""
    video = sum(request.video_seconds for request in requests)
    working = sum(request.seconds for request in requests)
    loading = sum(time.own_seconds for name, time in timings.items() if name.startswith("load_"))
    return {
        "overall": {
            "seconds": seconds,
            "requests_seconds": working,
            "loading_seconds": loading,
            "video_seconds": video,
            "real_time_factor": working / video if video else None,
            "real_time_factor_without_loading": (working - loading) / video if video else None,
            "forwards": sum(request.forwards for request in requests),
            "forwards_skipped": sum(request.forwards_skipped for request in requests),
        },
        "requests": [_request(request) for request in requests],
        "stages": _stages(spans, timings, seconds),
        "windows": _windows(spans),
        "steps": _steps(spans),
        "work": _work(timings, requests, models, ceiling, fp8),
        "ceilings": [asdict(limit) for limit in (ceiling, fp8) if limit is not None],
    }


def _request(request: RequestFigures) -> dict[str, Any]:
    values = {name: value for name, value in vars(request).items() if name != "windows"}
    return {
        **values,
        "windows": len(request.windows),
        "video_seconds": request.video_seconds,
        "real_time_factor": request.seconds / request.video_seconds,
    }


def _stages(spans: Sequence[Span], timings: Mapping[str, StageTime], seconds: float) -> list[dict[str, Any]]:
    """Own time of each stage, and what is left over; the shares of the model's thread add up to 1."""
    main = threading.get_ident() if not spans else spans[0].thread
    beside = {span.name for span in spans if span.thread != main}
    order = {name: place for place, name in enumerate(LABELS)}
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "label": LABELS.get(name, name),
            "seconds": time.own_seconds,
            "count": time.count,
            "share": None if name in beside else time.own_seconds / seconds,
            "beside_the_model": name in beside,
        }
        for name, time in sorted(timings.items(), key=lambda item: order.get(item[0], len(order)))
    ]
    named = sum(time.own_seconds for name, time in timings.items() if name not in beside)
    rest = max(seconds - named, 0.0)
    rows.append(
        {
            "name": "other",
            "label": "everything else",
            "seconds": rest,
            "count": 1,
            "share": rest / seconds,
            "beside_the_model": False,
        }
    )
    return rows


def _windows(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """One row a window: seconds of its stages and of its steps."""
    rows: dict[tuple[int | None, int], dict[str, Any]] = {}
    for span in spans:
        if span.window is None or span.name not in (DENOISE, "vae_decode", "vae_encode", STEP):
            continue
        row = rows.setdefault(
            (span.request, span.window), {"request": span.request, "window": span.window, "steps": []}
        )
        if span.name == STEP:
            row["steps"].append({**span.details, "seconds": span.seconds})
        else:
            row[span.name] = span.seconds
    return list(rows.values())


def _steps(spans: Sequence[Span]) -> dict[str, dict[str, float]]:
    """Spread of the step times, computed and reused apart."""
    found: dict[str, list[float]] = {}
    for span in spans:
        if span.name == STEP:
            found.setdefault(span.details["action"], []).append(span.seconds)
    return {
        action: {
            "count": len(times),
            "median": statistics.median(times),
            "fastest": min(times),
            "slowest": max(times),
        }
        for action, times in found.items()
    }


def _work(
    timings: Mapping[str, StageTime],
    requests: Sequence[RequestFigures],
    models: Models,
    ceiling: Ceilings,
    fp8: Ceilings | None,
) -> list[dict[str, Any]]:
    """Operations, rate and floor of denoising, VAE decode and VAE encode."""
    done = {DENOISE: Work(), "vae_decode": Work(), "vae_encode": Work()}
    for request in requests:
        latent: Grid = (request.windows[0].latent_frames, *request.latent_size)
        done[DENOISE] += forward_work(models.dit, latent) * request.forwards
        done[DENOISE] += skipped_forward_work(models.dit, latent) * request.forwards_skipped
        if models.vae is None:
            continue
        for window, following in zip(request.windows, (*request.windows[1:], None), strict=True):
            clip = (decoded_latents(window, last=following is None), *request.latent_size)
            done["vae_decode"] += decode_work(models.vae, clip)
            if following is not None:
                done["vae_encode"] += encode_work(models.vae, following.given_frames, request.size)
    rows = []
    for name, work in done.items():
        spent = timings.get(name, StageTime()).own_seconds
        if work.total and spent:
            floor = ceiling.floor_seconds(work)
            rows.append(
                {
                    "name": name,
                    "label": LABELS[name],
                    "tflop": work.total / 1e12,
                    "seconds": spent,
                    "tflop_per_s": work.total / spent / 1e12,
                    "floor_seconds": floor,
                    "share_of_floor": floor / spent,
                    "floor_seconds_fp8": fp8.floor_seconds(work) if fp8 else None,
                }
            )
    return rows


def decoded_latents(window: Window, last: bool) -> int:
    """Latents of a window that are decoded: the last window stops at its last wanted frame."""
    if not last:
        return window.latent_frames
    skip = 0 if window.index == 0 else window.given_frames
    return (skip + window.new_frames + 3) // 4
