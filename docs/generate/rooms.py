"""docs/images/rooms.svg: the rooms of the package and their layers, from the contract in pyproject.toml."""

from __future__ import annotations

import tomllib
from html import escape
from pathlib import Path

import omniavatar

PACKAGE = Path(omniavatar.__file__).parent

WORDS = {
    "cli": "commands, options, progress",
    "serve": "many requests: batch",
    "measure": "profile, benchmark, doctor",
    "live": "sessions, audio sources",
    "engine": "the main path of one video",
    "plan": "known before the first step",
    "parallel": "one video on several GPUs",
    "accel": "one optimisation a file",
    "encoders": "text, audio, portrait",
    "checkpoint": "weight files, LoRA",
    "config": "settings: schema, values, load",
    "media": "decode and encode files",
    "model": "plain maths of DiT and VAE",
    "sampling": "schedule, guidance, windows",
    "device": "choosing a device",
    "text": "reading and showing text",
    "types": "values that flow",
    "errors": "errors and exit codes",
    "assets": "portrait, speech, pocket model",
}
"""What lives in a room, in a few words. A room of the contract without a line here is an error."""

WIDTH, ROW, BOX_HEIGHT, MARGIN, GAP = 760, 78, 52, 24, 14
COLOURS = ("#e8eaf6", "#e3f2fd", "#e0f7fa", "#e0f2f1", "#e8f5e9", "#f1f8e9", "#fffde7", "#fff3e0", "#fbe9e7")


def contract(pyproject: Path) -> list[list[str]]:
    """Rooms of each layer, highest layer first; rooms that do not exist yet are left out."""
    settings = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (entry["layers"] for entry in settings["contracts"] if entry["type"] == "layers")
    rows = [[part.strip(" ()").removeprefix("omniavatar.") for part in layer.split("|")] for layer in layers]
    found = [[room for room in row if _exists(room)] for row in rows]
    return [row for row in found if row]


def picture(layers: list[list[str]]) -> str:
    """The layers as SVG: a row a layer, a box a room, an arrow for the direction of imports."""
    height = 2 * MARGIN + len(layers) * ROW - (ROW - BOX_HEIGHT)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Rooms of the package in {len(layers)} layers" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0 0 L8 4 L0 8 Z" fill="#455a64"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for index, rooms in enumerate(layers):
        top = MARGIN + index * ROW
        width = (WIDTH - 2 * MARGIN - GAP * (len(rooms) - 1)) / len(rooms)
        for column, room in enumerate(rooms):
            left = MARGIN + column * (width + GAP)
            middle = left + width / 2
            lines += [
                f'<rect x="{left:g}" y="{top}" width="{width:g}" height="{BOX_HEIGHT}" rx="6" '
                f'fill="{COLOURS[index % len(COLOURS)]}" stroke="#455a64"/>',
                f'<text x="{middle:g}" y="{top + 21}" text-anchor="middle" font-size="16" '
                f'font-weight="bold" fill="#212121">{escape(room)}</text>',
                f'<text x="{middle:g}" y="{top + 40}" text-anchor="middle" font-size="12" '
                f'fill="#37474f">{escape(WORDS[room])}</text>',
            ]
        if index + 1 < len(layers):
            lines.append(
                f'<line x1="{WIDTH / 2:g}" y1="{top + BOX_HEIGHT + 3}" x2="{WIDTH / 2:g}" '
                f'y2="{top + ROW - 7}" stroke="#455a64" stroke-width="1.5" marker-end="url(#tip)"/>'
            )
    return "\n".join([*lines, "</svg>", ""])


def _exists(room: str) -> bool:
    return (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()
