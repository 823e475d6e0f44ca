"""Writes contact sheets to look at: people, the mouth shape of every phone, and a talking clip.

`python -m training.contact_sheet OUT_DIR` made the sheets in `training/sheets`. Looks and takes are held out.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from training.head import Head
from training.looks import draw_looks
from training.motion import Manner, perform
from training.phones import PHONES, Phone, articulate, mouth_coefficients
from training.render import Performance, Renderer, gather

SPOKEN = "SIL HH AH L OW SIL W ER L D SIL M AY N EY M IH Z P AA K AH T SIL"


def grid(frames: Tensor, columns: int, names: tuple[str, ...] = ()) -> Image.Image:
    """One image of uint8 frames (n, 3, H, W) in rows of `columns`, each with a name in its corner."""
    size = frames.shape[-1]
    missing = -len(frames) % columns
    padded = torch.cat([frames, frames.new_zeros(missing, *frames.shape[1:])])
    rows = [torch.cat(list(row), 2) for row in padded.split(columns)]
    image = Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(image)
    for number, name in enumerate(names):
        draw.text((number % columns * size + 4, number // columns * size + 3), name, fill=(255, 255, 0))
    return image


def people(renderer: Renderer, count: int) -> Image.Image:
    """A sheet of different people; some have an open mouth, some smile."""
    head = renderer.head
    generator = torch.Generator().manual_seed(2)
    coefficients = torch.zeros(count, 1, 52)
    coefficients[::3, 0, head.names.index("jawOpen")] = 0.4
    for side in ("Left", "Right"):
        coefficients[1::3, 0, head.names.index(f"mouthSmile{side}")] = 0.6
    turned = torch.randn(count, 1, 3, generator=generator) * torch.tensor([0.15, 0.07, 0.05])
    still = torch.zeros(count, 1, 2)
    frames, _ = renderer.frames(draw_looks(head, count, 21), Performance(coefficients, turned, still, still))
    return grid(frames[:, 0], 8)


def mouths(renderer: Renderer) -> Image.Image:
    """A sheet with the middle of every phone between two neutral vowels."""
    head = renderer.head
    shapes = []
    for phone in PHONES:
        phones = [Phone("AH", 0, 0.12), Phone(phone, 0.12, 0.26), Phone("AH", 0.26, 0.38)]
        shapes.append(mouth_coefficients(articulate(phones, np.array([0.18])), head.names))
    coefficients = torch.from_numpy(np.stack(shapes, 1))
    looks = replace(
        draw_looks(head, 4, 0).select(slice(3, 4)), camera=torch.tensor([[1.0, 0.0, -0.62, 10.0]])
    )
    still = torch.zeros(1, len(PHONES), 2)
    performance = Performance(coefficients, torch.zeros(1, len(PHONES), 3), still, still)
    return grid(renderer.frames(looks, performance)[0][0], 10, PHONES)


def clip(renderer: Renderer, frames: int) -> Image.Image:
    """A sheet with every frame of a few words: neutral and still above, smiling and lively below."""
    phones, start = [], 0.2
    for name in SPOKEN.split():
        length = 0.16 if name in ("SIL", "OW", "AY", "EY", "AA", "ER") else 0.09
        phones.append(Phone(name, start, start + length))
        start += length
    manners = (Manner("neutral", "still", ""), Manner("smiling", "lively", ""))
    tracks = [
        perform(renderer.head.names, phones, frames, manner, np.random.default_rng(3)) for manner in manners
    ]
    made, _ = renderer.frames(draw_looks(renderer.head, 2, 5), gather(tracks, renderer.head.device))
    return grid(made.flatten(0, 1), 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    renderer = Renderer(Head("cpu"))
    for name, image, width in (
        ("people", people(renderer, 32), 1152),
        ("mouths", mouths(renderer), 960),
        ("clip", clip(renderer, 48), 1152),
    ):
        height = round(image.height * width / image.width)
        image.resize((width, height), Image.LANCZOS).save(out / f"{name}.jpg", quality=72)


if __name__ == "__main__":
    main()
