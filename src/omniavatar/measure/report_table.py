"""The report of a profiled run as rich tables; every figure comes from `report.build_report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from omniavatar.accel.vae_runners import VAES

if TYPE_CHECKING:
    from omniavatar.measure.peaks import PeakMemory
    from omniavatar.measure.report import Report, StageRow, StepSpread, WindowRow, WorkRow

SHOWN_WINDOWS = 12


def print_report(report: Report, peak: PeakMemory, console: Console, vae: str = "fast") -> None:
    """Print stages, windows, steps, work, ceilings and overall figures. vae: the implementation that ran."""
    console.print(_stages(report.stages, report.overall.seconds))
    console.print(_windows(report.windows))
    if report.steps:
        console.print(_steps(report.steps))
    if report.work:
        console.print(_work(report.work))
    for ceiling in report.ceilings:
        console.print(
            f"ceilings of {ceiling.device} in {ceiling.arithmetic}: {ceiling.matrix:,.4g} TFLOP/s "
            f"products, {ceiling.attention:,.4g} attention ({ceiling.source})",
            soft_wrap=True,
        )
    coders = [] if VAES.get(vae).exact else [f"VAE: {vae}, which is not exact, in both directions"]
    for line in [*_overall(report), *coders, f"peak memory: {peak.text}"]:
        console.print(line, soft_wrap=True)


def _overall(report: Report) -> list[str]:
    overall = report.overall
    parts = [f"overall {seconds_text(overall.seconds)}"]
    if overall.real_time_factor is not None:
        parts.append(
            f"{overall.video_seconds:.2f} s of video: real-time factor "
            f"{overall.real_time_factor:.3g}, {overall.real_time_factor_without_loading:.3g} "
            "without model loading (below 1 is faster than the video plays)"
        )
    return [
        "; ".join(parts),
        f"forwards: {overall.forwards} computed, {overall.forwards_skipped} skipped by the step cache",
        *(f"  {each.output}: steps {each.pattern}, {each.branches} passes" for each in report.requests),
        *(
            f"  sparse attention: {each.kept_share:.0%} of the matrix computed, a mean of all forwards; "
            "TFLOP count what was computed"
            for each in report.requests
            if each.kept_share < 1
        ),
    ]


def _stages(rows: Sequence[StageRow], seconds: float) -> Table:
    table = _table("stage", "seconds", "times", "share")
    for row in rows:
        share = "beside the model" if row.share is None else f"{row.share:.1%}"
        table.add_row(row.label, seconds_text(row.seconds), str(row.count), share)
    table.add_row("overall", seconds_text(seconds), "", "", style="bold")
    return table


def _windows(rows: Sequence[WindowRow]) -> Table:
    table = _table("window", "denoising", "a step", "VAE decode", "VAE encode")
    several = any(row.request for row in rows)
    for row in rows[:SHOWN_WINDOWS]:
        name = f"{(row.request or 0) + 1}.{row.window + 1}" if several else str(row.window + 1)
        steps = [step.seconds for step in row.steps]
        mean = sum(steps) / len(steps) if steps else None
        times = (row.denoise, mean, row.vae_decode, row.vae_encode)
        table.add_row(name, *("-" if time is None else seconds_text(time) for time in times))
    if len(rows) > SHOWN_WINDOWS:
        table.add_row("...", f"and {len(rows) - SHOWN_WINDOWS} more in the JSON", "", "", "")
    return table


def _steps(steps: Mapping[str, StepSpread]) -> Table:
    table = _table("step", "times", "median", "fastest", "slowest")
    for action, row in steps.items():
        times = [seconds_text(each) for each in (row.median, row.fastest, row.slowest)]
        table.add_row({"compute": "computed", "reuse": "skipped"}.get(action, action), str(row.count), *times)
    return table


def _work(rows: Sequence[WorkRow]) -> Table:
    table = _table("work", "TFLOP", "seconds", "TFLOP/s", "floor", "floor / seconds", "fp8 floor")
    for row in rows:
        fp8 = row.floor_seconds_fp8
        table.add_row(
            row.label,
            f"{row.tflop:,.4g}",
            seconds_text(row.seconds),
            f"{row.tflop_per_s:,.3g}",
            seconds_text(row.floor_seconds),
            f"{row.share_of_floor:.0%}",
            "-" if fp8 is None else seconds_text(fp8),
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, style="bold", no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def seconds_text(seconds: float) -> str:
    """Seconds to three digits, or minutes or hours where those read better."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
