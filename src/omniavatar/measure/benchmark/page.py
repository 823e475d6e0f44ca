"""The benchmark as one self-contained HTML page: tables and bar charts as inline SVG.

The page is also well-formed XML, which the tests use. Colours follow the reader's light or dark scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from omniavatar.measure.benchmark.rows import BenchmarkResult, MeasuredRow
from omniavatar.measure.benchmark.summary import markdown
from omniavatar.measure.report_table import seconds_text

WIDTH, LABEL, BAR, GAP, MARGIN = 900, 240, 22, 8, 110
COLOURS = ("#3b7dd8", "#9aa5b1", "#d9822b", "#2f9e6e")
STYLE = (
    ":root { color-scheme: light dark }"
    "body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }"
    "table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }"
    "td, th { border: 1px solid #8886; padding: 3px 9px; text-align: left }"
    "svg { max-width: 100%; height: auto } svg text { font: 13px system-ui, sans-serif; fill: currentColor }"
)


def html_page(result: BenchmarkResult) -> str:
    """The whole page."""
    rows = result.measured
    charts = []
    if rows:
        minutes = rows[0].ranked.minutes
        charts = [
            _titled(f"Time for {minutes:g} minutes of video", _against_baseline(rows)),
            _titled("One window, by part", _window_parts(rows)),
        ]
    title, _, text = markdown(result).partition("\n")
    body = "".join(["<h1>", escape(title.lstrip("# ")), "</h1>", *charts, *_blocks(text)])
    head = f'<meta charset="utf-8"/><title>OmniAvatar speed benchmark</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def bar_chart(
    labels: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], *, stacked: bool = False
) -> str:
    """Horizontal bars in seconds, one group for each label. stacked: the series of a label end to end."""
    totals = [sum(values[i] for _, values in series) for i in range(len(labels))]
    longest = max(totals if stacked else [v for _, values in series for v in values], default=0.0) or 1.0
    scale = (WIDTH - LABEL - MARGIN) / longest
    lines = 1 if stacked else len(series)
    shapes, y = [_legend([name for name, _ in series])], 32
    for i, label in enumerate(labels):
        shapes.append(_text(LABEL - 10, y + lines * BAR / 2 + 5, label, "end"))
        x = float(LABEL)
        for number, (name, values) in enumerate(series):
            width = values[i] * scale
            top = y if stacked else y + number * BAR
            tip = f"{label}, {name}: {seconds_text(values[i])}"
            shapes.append(
                f'<rect x="{x:.1f}" y="{top}" width="{max(width, 0.5):.1f}" height="{BAR - 3}" '
                f'fill="{COLOURS[number % len(COLOURS)]}"><title>{escape(tip)}</title></rect>'
            )
            if stacked:
                x += width
            else:
                shapes.append(_text(LABEL + width + 6, top + 14, seconds_text(values[i])))
        if stacked:
            shapes.append(_text(x + 6, y + 14, seconds_text(totals[i])))
        y += lines * BAR + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        f'role="img">{"".join(shapes)}</svg>'
    )


def _against_baseline(rows: Sequence[MeasuredRow]) -> str:
    all_in = [row.ranked.seconds for row in rows]
    baseline = [row.ranked.baseline_seconds for row in rows]
    return bar_chart(_labels(rows), [("all in", all_in), ("baseline: every step computed", baseline)])


def _window_parts(rows: Sequence[MeasuredRow]) -> str:
    windows = [row.window for row in rows]
    series = [
        ("denoising", [window.denoise for window in windows]),
        ("VAE decode", [window.decode for window in windows]),
        ("VAE encode", [window.encode for window in windows]),
        ("video write", [window.write for window in windows]),
    ]
    return bar_chart(_labels(rows), series, stacked=True)


def _labels(rows: Sequence[MeasuredRow]) -> list[str]:
    return [f"{row.name}{' (random)' if row.weights == 'random' else ''}" for row in rows]


def _titled(title: str, chart: str) -> str:
    return f"<h2>{escape(title)}</h2>{chart}"


def _legend(names: Sequence[str]) -> str:
    shapes, x = [], LABEL
    for number, name in enumerate(names):
        colour = COLOURS[number % len(COLOURS)]
        shapes.append(
            f'<rect x="{x}" y="6" width="12" height="12" fill="{colour}"/>{_text(x + 18, 17, name)}'
        )
        x += 40 + 8 * len(name)
    return "".join(shapes)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _blocks(text: str) -> list[str]:
    """The report's own Markdown (headings, tables, lists, paragraphs) as HTML."""
    blocks: list[str] = []
    lines = text.splitlines()
    while lines:
        line = lines.pop(0)
        if line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            blocks.append(f"<h{level}>{escape(line.lstrip('# '))}</h{level}>")
        elif line.startswith("|"):
            rows = [line]
            while lines and lines[0].startswith("|"):
                rows.append(lines.pop(0))
            blocks.append(_table(rows))
        elif line.startswith("- "):
            blocks.append(f"<ul><li>{escape(line[2:])}</li></ul>")
        elif line:
            blocks.append(f"<p>{escape(line)}</p>")
    return blocks


def _table(lines: Sequence[str]) -> str:
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    head, body = cells[0], cells[2:]
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
