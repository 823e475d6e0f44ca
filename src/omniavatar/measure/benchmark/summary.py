"""The benchmark's result in words: ranking, parts, projections, tips, as Markdown. Pure.

The baseline of a row is the same model, steps and guidance with every step computed; the all-in time is the
configuration as it stands. Rows with random weights say so: their times hold, their pictures mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from omniavatar.measure.benchmark.rows import BenchmarkResult, MeasuredRow, WholeVideo
from omniavatar.measure.projection import Timing
from omniavatar.measure.report_table import seconds_text
from omniavatar.types import bytes_text

PARTS = ("forward", "skipped_forward", "decode", "encode", "write")


def markdown(result: BenchmarkResult) -> str:
    """The whole report."""
    ranked = result.measured
    others = [row for row in result.rows if not isinstance(row, MeasuredRow)]
    parts = ["# OmniAvatar speed benchmark", ""]
    if ranked:
        first = ranked[0]
        parts += [
            f"{first.device}, torch {first.versions.torch}, omniavatar {first.versions.omniavatar}; "
            f"{result.warm_up} warm-ups, {result.repeats} repeats, median (fastest..slowest).",
            "",
            "## Ranking",
            *_ranking(ranked),
            "",
            "All in: the configuration as it stands. Baseline: the same model, steps and guidance with every "
            "step computed. Both are projected from the parts below, from audio to finished video, models "
            "loaded.",
            "",
            "## Parts of a window",
            *_parts(ranked),
            "",
        ]
        if any(row.full for row in ranked):
            parts += ["## Whole videos", *_whole_videos(ranked), ""]
        parts += ["## What the guide's tips save", *_tips(ranked)]
    if others:
        parts += [
            "## Not measured",
            *(f"- {row.config}: {row.status}, {row.reason}" for row in others),
        ]
    return "\n".join(parts).rstrip() + "\n"


def _ranking(rows: Sequence[MeasuredRow]) -> list[str]:
    lengths = [each.minutes for each in rows[0].projections]
    heads = ["", "config", "model", "weights", "attention, quantize, VAE", "steps computed", "passes"]
    heads += [f"{minutes:g} min of video" for minutes in lengths]
    heads += ["baseline", "all in against baseline", "real-time factor"]
    lines = []
    for place, row in enumerate(rows, 1):
        ranked = row.ranked
        lines.append(
            [
                str(place),
                row.name,
                row.model,
                row.weights,
                f"{row.attention}, {row.quantize}, {row.vae}",
                f"{row.computed_steps} of {row.steps}",
                str(row.branches),
                *(seconds_text(each.seconds) for each in row.projections),
                f"{seconds_text(ranked.baseline_seconds)} ({ranked.minutes:g} min)",
                f"{ranked.baseline_seconds / ranked.seconds:.2f}x",
                f"{ranked.seconds / (ranked.minutes * 60):.3g}",
            ]
        )
    return table(heads, lines)


def _parts(rows: Sequence[MeasuredRow]) -> list[str]:
    heads = ["config", "tokens", "frames", "forward", "skipped forward", "VAE decode", "VAE encode"]
    sparse = any("sparse_forward" in row.timings for row in rows)
    heads += ["video write", *(["sparse forward"] if sparse else []), "peak GPU memory"]
    lines = []
    for row in rows:
        peak = row.peak_memory.peak_gpu_bytes
        lines.append(
            [
                row.name,
                f"{row.tokens:,}",
                str(row.window_length),
                *(_spread(row.timings[name]) for name in PARTS),
                *([_sparse_forward(row)] if sparse else []),
                "-" if peak is None else bytes_text(peak),
            ]
        )
    notes = [f"- {row.name}: {note}" for row in rows for note in row.notes]
    return [*table(heads, lines), *([""] if notes else []), *notes]


def _sparse_forward(row: MeasuredRow) -> str:
    timing = row.timings.get("sparse_forward")
    return "-" if timing is None else _spread(timing)


def _whole_videos(rows: Sequence[MeasuredRow]) -> list[str]:
    heads = ["config", "video", "seconds", "predicted", "baseline", "PSNR to baseline", "SSIM"]
    return table(heads, [_whole_video(row.name, row.full) for row in rows if row.full])


def _whole_video(name: str, whole: WholeVideo) -> list[str]:
    quality, baseline = whole.quality, whole.baseline_seconds
    psnr = "-"
    if quality is not None:
        psnr = "equal" if quality.psnr_db is None else f"{quality.psnr_db:.1f} dB"
    return [
        name,
        f"{whole.video_seconds:.2f} s",
        seconds_text(whole.seconds),
        f"{seconds_text(whole.predicted_seconds)} ({whole.prediction_error:+.0%})",
        "no step cache" if baseline is None else seconds_text(baseline),
        psnr,
        "-" if quality is None else f"{quality.ssim:.4f}",
    ]


def _tips(rows: Sequence[MeasuredRow]) -> list[str]:
    lines: list[str] = []
    heads = ["tip", "change", "before", "after", "verdict"]
    for row in rows:
        cells = [
            [
                tip.tip,
                tip.change,
                "-" if tip.before is None else seconds_text(tip.before),
                "-" if tip.after is None else seconds_text(tip.after),
                tip.verdict + (f": {tip.note}" if tip.note else ""),
            ]
            for tip in row.tips
        ]
        lines += [f"### {row.name}, 5 minutes of video", *table(heads, cells), ""]
    return lines


def _spread(timing: Timing) -> str:
    fastest, slowest = seconds_text(timing.fastest), seconds_text(timing.slowest)
    return f"{seconds_text(timing.median)} ({fastest}..{slowest})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; a bar inside a cell is escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
