"""The rows of the benchmark: what was measured of one configuration, or why it was not.

A row is made in a process per configuration (`row.py`), travels to the parent as JSON, and is read by the
reports. `as_dict` and `row_from_json` are the only places that know the JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter

from omniavatar.measure.benchmark.tips import Tip
from omniavatar.measure.peaks import PeakMemory
from omniavatar.measure.projection import Timing
from omniavatar.measure.quality import Quality

RANKED_MINUTES = 5.0


@dataclass(frozen=True)
class Versions:
    """Versions that the times depend on."""

    omniavatar: str
    torch: str
    python: str


@dataclass(frozen=True)
class WindowParts:
    """Seconds of the parts of one window: all forwards, whole decode, encode of the hand-over, writing."""

    denoise: float
    decode: float
    encode: float
    write: float


@dataclass(frozen=True)
class Projection:
    """Projected seconds of a video of `minutes`; `baseline_seconds`: with every step computed."""

    minutes: float
    windows: int
    seconds: float
    baseline_seconds: float


@dataclass(frozen=True)
class WholeVideo:
    """One whole video: its seconds, the prediction for it, and the same with every step computed.

    prediction_error: predicted over measured seconds, less 1.
    baseline_seconds: None without a step cache.
    quality: of the video against the baseline's; None without a step cache or with random weights.
    """

    seconds: float
    video_seconds: float
    windows: int
    predicted_seconds: float
    prediction_error: float
    baseline_seconds: float | None
    quality: Quality | None


@dataclass(frozen=True)
class SparseAttention:
    """What a sparsity plan computes, and what the first window loses against dense attention.

    plan: `SparsityPlan.as_dict`. quality: None with random weights.
    """

    plan: Mapping[str, Any]
    backend: str
    quality: Quality | None

    @property
    def text(self) -> str:
        """One line."""
        steps = sum(share < 1 for share in self.plan["step_shares"])
        line = (
            f"sparse attention {self.plan['attention']} by {self.backend}: {steps} steps compute "
            f"{self.plan['kept_share']:.1%} of the matrix"
        )
        if self.quality is None:
            return f"{line}; what it loses shows with the model's own weights only"
        psnr = "equal" if self.quality.psnr_db is None else f"{self.quality.psnr_db:.1f} dB"
        return f"{line}; first window against dense attention: PSNR {psnr}, SSIM {self.quality.ssim:.4f}"


@dataclass(frozen=True, kw_only=True)
class FailedRow:
    """A configuration that cannot be used, or whose process ended without a row."""

    config: str
    name: str
    status: Literal["failed"] = "failed"
    reason: str


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a row is about. config: path of the file. weights: files, or random ones of the same sizes."""

    config: str
    name: str
    model: str
    weights: Literal["files", "random"]
    dtype: str
    device: str
    versions: Versions
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SkippedRow(Setup):
    """A configuration that cannot run here or would take too long."""

    status: Literal["skipped"] = "skipped"
    reason: str


@dataclass(frozen=True, kw_only=True)
class MeasuredRow(Setup):
    """A measured configuration.

    memory: the plan of `plan.memory`. steps, computed_steps: of a window. branches: forwards a step.
    timings: by part, as `PartTimer` names them. full: only where whole videos were made.
    sparse: only with sparse attention.
    """

    status: Literal["measured"] = "measured"
    attention: str
    quantize: str
    memory: Mapping[str, Any]
    vae: str
    decoder: str
    size: tuple[int, int]
    window_length: int
    tokens: int
    steps: int
    computed_steps: int
    pattern: str
    step_cache: str
    branches: int
    loading_seconds: float
    timings: dict[str, Timing]
    window: WindowParts
    projections: tuple[Projection, ...]
    peak_memory: PeakMemory
    full: WholeVideo | None = None
    sparse: SparseAttention | None = None
    tips: tuple[Tip, ...]

    @property
    def ranked(self) -> Projection:
        """The projection that rows are ranked by: for 5 minutes of video, or the longest one."""
        exact = [each for each in self.projections if each.minutes == RANKED_MINUTES]
        return exact[0] if exact else max(self.projections, key=lambda each: each.minutes)

    def as_dict(self) -> dict[str, Any]:
        """The row for JSON."""
        values = {**asdict(self), "tips": [tip.as_dict() for tip in self.tips]}
        for name in ("full", "sparse"):
            if values[name] is None:
                del values[name]
        return values


Row: TypeAlias = MeasuredRow | SkippedRow | FailedRow
_ROW: TypeAdapter[Row] = TypeAdapter(Annotated[Row, Field(discriminator="status")])


@dataclass(frozen=True)
class BenchmarkResult:
    """All rows of one benchmark, in the order of the configurations."""

    warm_up: int
    repeats: int
    rows: tuple[Row, ...]

    @property
    def measured(self) -> list[MeasuredRow]:
        """The measured rows, fastest first."""
        rows = [row for row in self.rows if isinstance(row, MeasuredRow)]
        return sorted(rows, key=lambda row: row.ranked.seconds)

    def as_dict(self) -> dict[str, Any]:
        """The result for JSON."""
        rows = [as_dict(row) for row in self.rows]
        return {"benchmark": "speed", "warm_up": self.warm_up, "repeats": self.repeats, "rows": rows}


def as_dict(row: Row) -> dict[str, Any]:
    """A row for JSON."""
    return row.as_dict() if isinstance(row, MeasuredRow) else asdict(row)


def row_from_json(text: str) -> Row:
    """The row whose `as_dict` is this JSON. Raises ValidationError."""
    return _ROW.validate_json(text)
