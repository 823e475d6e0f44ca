"""The benchmark's results in words: ranking, projections, tips, as Markdown. Pure, from the measured rows.

The baseline of a row is the same model, steps and guidance with every step computed; the all-in figure is
the configuration as it stands. Rows whose weights are random say so: their times hold, their pictures don't.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omniavatar.measure.report_table import seconds_text

Row = Mapping[str, Any]
RANKED_MINUTES = 5.0


def measured(rows: Iterable[Row]) -> list[Row]:
    """The measured rows, fastest first for the longest common length at hand (5 minutes where projected)."""
    return sorted((row for row in rows if row["status"] == "measured"), key=_rank_seconds)


def projection(row: Row, minutes: float) -> Mapping[str, Any] | None:
    return next((each for each in row["projections"] if each["minutes"] == minutes), None)


def ranked_minutes(row: Row) -> float:
    """The length that rows are ranked by: 5 minutes, or the longest that was projected."""
    lengths = [float(each["minutes"]) for each in row["projections"]]
    return RANKED_MINUTES if RANKED_MINUTES in lengths else max(lengths)


def _rank_seconds(row: Row) -> float:
    found = projection(row, ranked_minutes(row))
    assert found is not None
    return float(found["seconds"])


def markdown(result: Mapping[str, Any]) -> str:
    """The whole report."""
    ranked = measured(result["rows"])
    others = [row for row in result["rows"] if row["status"] != "measured"]
    parts = ["# OmniAvatar speed benchmark", ""]
    if ranked:
        first = ranked[0]
        parts += [
            f"{first['device']}, torch {first['versions']['torch']}, omniavatar "
            f"{first['versions']['omniavatar']}; {result['warm_up']} warm-ups, {result['repeats']} repeats, "
            "median (fastest..slowest).",
            "",
            "## Ranking",
            *_ranking(ranked),
            "",
            "All in: the configuration as it stands. Baseline: the same model, steps and guidance, every "
            "step computed. Counted from the parts below, models loaded, audio to finished video.",
            "",
            "## Parts of a window",
            *_parts(ranked),
            "",
        ]
        if any("full" in row for row in ranked):
            parts += ["## Whole videos", *_full(ranked), ""]
        parts += ["## What the guide's tips save", *_tips(ranked)]
    if others:
        parts += [
            "## Not measured",
            *(f"- {row['config']}: {row['status']}, {row['reason']}" for row in others),
        ]
    return "\n".join(parts).rstrip() + "\n"


def _ranking(rows: Sequence[Row]) -> list[str]:
    lengths = [each["minutes"] for each in rows[0]["projections"]]
    heads = ["", "config", "model", "weights", "attention, quantize, VAE", "steps computed", "passes"]
    heads += [f"{minutes:g} min of video" for minutes in lengths]
    heads += ["baseline", "all in against baseline", "real-time factor"]
    lines = []
    for place, row in enumerate(rows, 1):
        minutes = ranked_minutes(row)
        ranked = projection(row, minutes)
        assert ranked is not None
        times = [seconds_text(each["seconds"]) for each in row["projections"]]
        lines.append(
            [
                str(place),
                row["name"],
                row["model"],
                row["weights"],
                f"{row['attention']}, {row['quantize']}, {row['vae']}",
                f"{row['computed_steps']} of {row['steps']}",
                str(row["branches"]),
                *times,
                f"{seconds_text(ranked['baseline_seconds'])} ({minutes:g} min)",
                f"{ranked['baseline_seconds'] / ranked['seconds']:.2f}x",
                f"{ranked['seconds'] / (minutes * 60):.3g}",
            ]
        )
    return table(heads, lines)


def _parts(rows: Sequence[Row]) -> list[str]:
    heads = ["config", "tokens", "frames", "forward", "skipped forward", "VAE decode", "VAE encode"]
    heads += ["video write", "peak GPU memory"]
    lines = []
    for row in rows:
        times = row["timings"]
        names = ("forward", "skipped_forward", "decode", "encode", "write")
        peak = row["peak_memory"]["peak_gpu_bytes"]
        lines.append(
            [
                row["name"],
                f"{row['tokens']:,}",
                str(row["window_length"]),
                *(_spread(times[name]) for name in names),
                "-" if peak is None else f"{peak / 2**30:.1f} GiB",
            ]
        )
    notes = [f"- {row['name']}: {note}" for row in rows for note in row["notes"]]
    return [*table(heads, lines), *([""] if notes else []), *notes]


def _full(rows: Sequence[Row]) -> list[str]:
    heads = ["config", "video", "seconds", "foretold", "baseline", "PSNR to baseline", "SSIM"]
    lines = []
    for row in rows:
        if "full" not in row:
            continue
        full, quality = row["full"], row["full"]["quality"]
        baseline = full["baseline_seconds"]
        psnr = (
            "-"
            if quality is None
            else "equal"
            if quality["psnr_db"] is None
            else f"{quality['psnr_db']:.1f} dB"
        )
        lines.append(
            [
                row["name"],
                f"{full['video_seconds']:.2f} s",
                seconds_text(full["seconds"]),
                f"{seconds_text(full['predicted_seconds'])} ({full['prediction_error']:+.0%})",
                "no step cache" if baseline is None else seconds_text(baseline),
                psnr,
                "-" if quality is None else f"{quality['ssim']:.4f}",
            ]
        )
    return table(heads, lines)


def _tips(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    heads = ["tip", "change", "before", "after", "verdict"]
    for row in rows:
        cells = [
            [
                tip["tip"],
                tip["change"],
                "-" if tip["before"] is None else seconds_text(tip["before"]),
                "-" if tip["after"] is None else seconds_text(tip["after"]),
                tip["verdict"] + (f": {tip['note']}" if tip["note"] else ""),
            ]
            for tip in row["tips"]
        ]
        lines += [f"### {row['name']}, 5 minutes of video", *table(heads, cells), ""]
    return lines


def _spread(timing: Mapping[str, float]) -> str:
    values = (seconds_text(timing[name]) for name in ("median", "fastest", "slowest"))
    return "{} ({}..{})".format(*values)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
