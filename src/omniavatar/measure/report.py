"""What a profiled run reports: seconds by stage, window and step; TFLOP/s and share of the device's floor.

Pure: makes one `Report` from spans (`trace`), stage times (`recorder`), the figures of each request and the
sizes of the models. Stages of the thread that writes the video run beside the model and are marked so; they
count for the overall time only where the model waits for them.
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
from omniavatar.sampling.windows import frames_encoded

if TYPE_CHECKING:
    from omniavatar.model.sizes import DiTConfig, VAEConfig
    from omniavatar.sampling.causal import CausalWindow
    from omniavatar.types import Window

DECODE, ENCODE = "vae_decode", "vae_encode"
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
    "replay": "earlier blocks again, after an interruption",
    "denoise": "denoising",
    "vae_decode": "VAE decode",
    "vae_encode": "VAE encode of the hand-over",
    "video_write": "video: encode",
    "video_append": "video: write",
    "video_finish": "video: finish",
}
"""Stage names in the order of the report; a stage without a label follows under its own name."""


@dataclass(frozen=True)
class RequestFigures:
    """One finished request.

    tokens: of one forward. branches: forwards a step. causal: of a block-causal model, None for others.
    kept_share: mean share of the attention matrix that a forward computed. hand_over: the setting.
    """

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
    causal: CausalWindow | None = None
    kept_share: float = 1.0
    hand_over: str = "pixels"

    @property
    def video_seconds(self) -> float:
        return self.frames / self.fps

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.size[0] // 8, self.size[1] // 8

    def as_dict(self) -> dict[str, Any]:
        """The request for JSON; `kept_share` and `hand_over` only where they differ from the ordinary."""
        left_out = {"causal"}
        left_out |= set() if self.kept_share < 1 else {"kept_share"}
        left_out |= {"hand_over"} if self.hand_over == "pixels" else set()
        return {
            **{name: value for name, value in vars(self).items() if name not in left_out},
            "windows": len(self.windows),
            "video_seconds": self.video_seconds,
            "real_time_factor": self.seconds / self.video_seconds,
        }


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the models that ran. vae: None where another decoder than the released VAE's ran."""

    dit: DiTConfig
    vae: VAEConfig | None


@dataclass(frozen=True)
class OverallFigures:
    """The whole run. requests_seconds: the sum of all requests. Factors: None without a video."""

    seconds: float
    requests_seconds: float
    loading_seconds: float
    video_seconds: float
    real_time_factor: float | None
    real_time_factor_without_loading: float | None
    forwards: int
    forwards_skipped: int


@dataclass(frozen=True)
class StageRow:
    """Own seconds of one stage. share: of the whole run; None for a stage beside the model."""

    name: str
    label: str
    seconds: float
    count: int
    share: float | None
    beside_the_model: bool


@dataclass(frozen=True)
class StepTime:
    """Seconds of one denoising step. action: compute or reuse."""

    step: int
    action: str
    seconds: float


@dataclass(frozen=True)
class WindowRow:
    """Seconds of one window's stages, None for a stage it did not have, and of its steps."""

    request: int | None
    window: int
    steps: tuple[StepTime, ...]
    denoise: float | None
    vae_decode: float | None
    vae_encode: float | None

    def as_dict(self) -> dict[str, Any]:
        """The window for JSON, without the stages it did not have."""
        values = asdict(self)
        absent = [name for name in (DENOISE, DECODE, ENCODE) if values[name] is None]
        return {name: value for name, value in values.items() if name not in absent}


@dataclass(frozen=True)
class StepSpread:
    """Seconds of all steps of one action."""

    count: int
    median: float
    fastest: float
    slowest: float


@dataclass(frozen=True)
class WorkRow:
    """Operations of one kind of work, their rate, and the least time they take on this device."""

    name: str
    label: str
    tflop: float
    seconds: float
    tflop_per_s: float
    floor_seconds: float
    share_of_floor: float
    floor_seconds_fp8: float | None


@dataclass(frozen=True)
class Report:
    """The tables of a profiled run. steps: by action. ceilings: for the weights' dtype; for fp8 if known."""

    overall: OverallFigures
    requests: tuple[RequestFigures, ...]
    stages: tuple[StageRow, ...]
    windows: tuple[WindowRow, ...]
    steps: Mapping[str, StepSpread]
    work: tuple[WorkRow, ...]
    ceilings: tuple[Ceilings, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "overall": asdict(self.overall),
            "requests": [request.as_dict() for request in self.requests],
            "stages": [asdict(row) for row in self.stages],
            "windows": [row.as_dict() for row in self.windows],
            "steps": {action: asdict(spread) for action, spread in self.steps.items()},
            "work": [asdict(row) for row in self.work],
            "ceilings": [asdict(limit) for limit in self.ceilings],
        }


def build_report(
    spans: Sequence[Span],
    timings: Mapping[str, StageTime],
    requests: Sequence[RequestFigures],
    models: ModelSizes,
    ceiling: Ceilings,
    fp8: Ceilings | None,
    seconds: float,
) -> Report:
    """The report. seconds: of the whole run, model loading included."""
    video = sum(request.video_seconds for request in requests)
    working = sum(request.seconds for request in requests)
    loading = sum(time.own_seconds for name, time in timings.items() if name.startswith("load_"))
    return Report(
        overall=OverallFigures(
            seconds=seconds,
            requests_seconds=working,
            loading_seconds=loading,
            video_seconds=video,
            real_time_factor=working / video if video else None,
            real_time_factor_without_loading=(working - loading) / video if video else None,
            forwards=sum(request.forwards for request in requests),
            forwards_skipped=sum(request.forwards_skipped for request in requests),
        ),
        requests=tuple(requests),
        stages=_stages(spans, timings, seconds),
        windows=_windows(spans),
        steps=_steps(spans),
        work=_work(timings, requests, models, ceiling, fp8),
        ceilings=tuple(limit for limit in (ceiling, fp8) if limit is not None),
    )


def _stages(spans: Sequence[Span], timings: Mapping[str, StageTime], seconds: float) -> tuple[StageRow, ...]:
    """Own time of each stage, and the rest; the shares of the model's thread add up to 1."""
    main = threading.get_ident() if not spans else spans[0].thread
    beside = {span.name for span in spans if span.thread != main}
    order = {name: place for place, name in enumerate(LABELS)}
    rows = [
        StageRow(
            name=name,
            label=LABELS.get(name, name),
            seconds=time.own_seconds,
            count=time.count,
            share=None if name in beside else time.own_seconds / seconds,
            beside_the_model=name in beside,
        )
        for name, time in sorted(timings.items(), key=lambda item: order.get(item[0], len(order)))
    ]
    named = sum(time.own_seconds for name, time in timings.items() if name not in beside)
    rest = max(seconds - named, 0.0)
    return (*rows, StageRow("other", "everything else", rest, 1, rest / seconds, False))


def _windows(spans: Sequence[Span]) -> tuple[WindowRow, ...]:
    """One row for each window, in the order of their first spans."""
    steps: dict[tuple[int | None, int], list[StepTime]] = {}
    stages: dict[tuple[int | None, int], dict[str, float]] = {}
    for span in spans:
        if span.window is None or span.name not in (DENOISE, DECODE, ENCODE, STEP):
            continue
        key = span.request, span.window
        own_steps, own_stages = steps.setdefault(key, []), stages.setdefault(key, {})
        if span.name == STEP:
            own_steps.append(StepTime(span.details["step"], span.details["action"], span.seconds))
        else:
            own_stages[span.name] = span.seconds
    return tuple(
        WindowRow(*key, tuple(steps[key]), own.get(DENOISE), own.get(DECODE), own.get(ENCODE))
        for key, own in stages.items()
    )


def _steps(spans: Sequence[Span]) -> dict[str, StepSpread]:
    """Spread of the step times by action."""
    found: dict[str, list[float]] = {}
    for span in spans:
        if span.name == STEP:
            found.setdefault(span.details["action"], []).append(span.seconds)
    return {
        action: StepSpread(len(times), statistics.median(times), min(times), max(times))
        for action, times in found.items()
    }


def _work(
    timings: Mapping[str, StageTime],
    requests: Sequence[RequestFigures],
    models: ModelSizes,
    ceiling: Ceilings,
    fp8: Ceilings | None,
) -> tuple[WorkRow, ...]:
    """Operations, rate and floor of denoising, VAE decode and VAE encode."""
    done = {DENOISE: Work(), DECODE: Work(), ENCODE: Work()}
    for request in requests:
        latent: Grid = (request.windows[0].latent_frames, *request.latent_size)
        if request.causal is not None:
            done[DENOISE] += _blocks_work(models.dit, request, request.causal)
            if models.vae is not None:  # one clip, decoded piece by piece
                latents = sum(window.latent_frames for window in request.windows[:-1])
                latents += decoded_latents(request.windows[-1], last=True)
                done[DECODE] += decode_work(models.vae, (latents, *request.latent_size))
            continue
        done[DENOISE] += forward_work(models.dit, latent, kept=request.kept_share) * request.forwards
        done[DENOISE] += skipped_forward_work(models.dit, latent) * request.forwards_skipped
        if models.vae is None:
            continue
        for window, following in zip(request.windows, (*request.windows[1:], None), strict=True):
            clip = (decoded_latents(window, last=following is None), *request.latent_size)
            done[DECODE] += decode_work(models.vae, clip)
            if encoded := frames_encoded(following, request.hand_over):
                done[ENCODE] += encode_work(models.vae, encoded, request.size)
    rows = []
    for name, work in done.items():
        spent = timings.get(name, StageTime()).own_seconds
        if work.total and spent:
            floor = ceiling.floor_seconds(work)
            rows.append(
                WorkRow(
                    name=name,
                    label=LABELS[name],
                    tflop=work.total / 1e12,
                    seconds=spent,
                    tflop_per_s=work.total / spent / 1e12,
                    floor_seconds=floor,
                    share_of_floor=floor / spent,
                    floor_seconds_fp8=fp8.floor_seconds(work) if fp8 else None,
                )
            )
    return tuple(rows)


def _blocks_work(dit: DiTConfig, request: RequestFigures, causal: CausalWindow) -> Work:
    """Operations of all forwards of a block-causal video."""
    total, latent = Work(), (causal.block, *request.latent_size)
    for window in request.windows:
        seen = causal.filled(window.index) * causal.block
        total += forward_work(dit, latent, seen_frames=seen) * (request.forwards // len(request.windows))
    return total


def decoded_latents(window: Window, last: bool) -> int:
    """Latents of a window that are decoded: the last window stops at its last frame of the video."""
    if not last:
        return window.latent_frames
    return (window.skipped_frames + window.new_frames + 3) // 4
