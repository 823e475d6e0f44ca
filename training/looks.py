"""The look of a person, a room and a camera: everything that is constant during one performance.

`draw_looks` draws independent looks from a seed. All values are tensors per identity, so one shading pass
serves any mixture of people. Hair styles are thicknesses of the scalp's shell (and the long-hair mesh); skin
marks, brows and beards are functions of the position on the mean head (see `render`).

Shapes: N identities, S scalp vertices, V mesh vertices, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate as resize

from training.head import Head, hair_line, smoothstep

BALD, BUZZ, SHORT, PARTED, BULKY, LONG, HAT = range(7)
STYLE_ODDS = (0.07, 0.13, 0.25, 0.17, 0.13, 0.15, 0.10)
SKIN_TONES = (
    (0.98, 0.87, 0.80), (0.95, 0.80, 0.70), (0.90, 0.73, 0.60), (0.83, 0.64, 0.50), (0.74, 0.54, 0.40),
    (0.62, 0.43, 0.30), (0.48, 0.32, 0.22), (0.36, 0.24, 0.17),
)  # fmt: skip
HAIR_TONES = (
    (0.06, 0.05, 0.05), (0.12, 0.08, 0.06), (0.25, 0.15, 0.09), (0.40, 0.25, 0.14), (0.62, 0.45, 0.25),
    (0.80, 0.66, 0.42), (0.55, 0.24, 0.12), (0.62, 0.62, 0.62), (0.85, 0.85, 0.84),
)  # fmt: skip
IRIS_TONES = (
    (0.20, 0.11, 0.06),
    (0.30, 0.18, 0.09),
    (0.35, 0.30, 0.14),
    (0.24, 0.38, 0.30),
    (0.30, 0.45, 0.60),
)


@dataclass(frozen=True, eq=False)
class Looks:
    """Tensors per identity; colours are (N, 3) in 0..1, other shapes are given."""

    identity: Tensor  # (N, K)
    thickness: Tensor  # (N, S) of the hair shell
    swell: Tensor  # (N, V) of the clothes
    long_hair: Tensor  # (N,) 0 or 1
    hat: Tensor  # (N,) 0 or 1
    lashes: Tensor  # (N,) 0 or 1
    skin: Tensor
    lip: Tensor
    blush: Tensor  # (N,)
    freckles: Tensor  # (N,)
    brow: Tensor  # (N, 6) height, arch, slope, thickness, opacity, length
    beard: Tensor  # (N, 3) opacity of beard, of moustache, lower edge
    hair: Tensor
    iris: Tensor
    iris_size: Tensor  # (N,)
    teeth: Tensor
    shadow: Tensor  # (N, 3) eye shadow colour
    shadow_strength: Tensor  # (N,)
    cloth: Tensor
    cloth_other: Tensor
    cloth_form: Tensor  # (N, 4) neckline height, depth of the V, stripes per dm, stripe direction
    waves: Tensor  # (N, 8, 4) frequencies (3) and phase of the skin and hair noise
    sky: Tensor
    ground: Tensor
    key: Tensor
    key_direction: Tensor  # (N, 3)
    fill: Tensor
    fill_direction: Tensor  # (N, 3)
    background: Tensor  # (N, 3, H, W)
    camera: Tensor  # (N, 4) view height in dm, centre x, centre y, distance

    def __len__(self) -> int:
        return len(self.identity)

    def select(self, rows: Tensor | slice) -> Looks:
        """The looks of some identities."""
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})


class _Draw:
    """Random tensors of N rows from one CPU generator, the same on every device."""

    def __init__(self, count: int, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.count, self.device = count, device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        value = torch.rand(self.count, *shape, generator=self.generator)
        return (low + (high - low) * value).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.count, *shape, generator=self.generator).to(self.device)

    def chance(self, odds: float) -> Tensor:
        return (self.uniform(0, 1) < odds).float()

    def pick(self, rows: tuple[tuple[float, ...], ...]) -> Tensor:
        table = torch.tensor(rows, device=self.device)
        return table[torch.randint(len(rows), (self.count,), generator=self.generator).to(self.device)]

    def kind(self, odds: tuple[float, ...]) -> Tensor:
        weights = torch.tensor(odds)
        return torch.multinomial(weights, self.count, replacement=True, generator=self.generator).to(
            self.device
        )


def draw_looks(head: Head, count: int, seed: int, size: int = 192) -> Looks:
    """`count` independent looks for frames of `size` x `size` pixels, determined by `seed`."""
    draw = _Draw(count, seed, head.device)
    mix = head.scores[torch.randint(len(head.scores), (count, 2), generator=draw.generator).to(head.device)]
    share = draw.uniform(0, 1, 1)
    identity = share * mix[:, 0] + (1 - share) * mix[:, 1]
    identity = identity + 0.35 * draw.normal(identity.shape[1])
    tone = draw.uniform(0, len(SKIN_TONES) - 1.001)
    tones = torch.tensor(SKIN_TONES, device=head.device)
    below, part = tone.long(), (tone - tone.floor())[:, None]
    skin = (tones[below] * (1 - part) + tones[below + 1] * part) * (
        1 + 0.04 * draw.normal(1) + 0.012 * draw.normal(3)
    )
    style = draw.kind(STYLE_ODDS)
    hair = draw.pick(HAIR_TONES) * draw.uniform(0.85, 1.15, 1) + 0.015 * draw.normal(3)
    dyed = draw.chance(0.06)[:, None]
    hair = (hair * (1 - dyed) + draw.uniform(0.1, 0.8, 3) * dyed).clamp(0.03, 0.95)
    hat = (style == HAT).float()
    rosy = torch.tensor([0.86, 0.52, 0.52], device=head.device)
    painted = draw.chance(0.2)[:, None]
    lip = (skin * rosy * draw.uniform(0.9, 1.15, 1) + 0.06) * (1 - painted)
    lip = lip + painted * torch.stack(
        [draw.uniform(0.5, 0.85), draw.uniform(0.08, 0.3), draw.uniform(0.15, 0.4)], 1
    )
    bearded = draw.chance(0.28)
    brow = torch.stack(
        [
            draw.uniform(0.235, 0.30),
            draw.uniform(0.02, 0.09),
            draw.uniform(-0.06, 0.05),
            draw.uniform(0.022, 0.05),
            draw.uniform(0.55, 0.95),
            draw.uniform(0.50, 0.60),
        ],
        1,
    )
    beard = torch.stack(
        [bearded * draw.uniform(0.12, 0.85), bearded * draw.uniform(0.1, 0.8), draw.uniform(-1.35, -1.15)], 1
    )
    return Looks(
        identity=identity,
        thickness=_hair_thickness(head, draw, style),
        swell=_clothes_swell(head, draw),
        long_hair=(style == LONG).float(),
        hat=hat,
        lashes=draw.chance(0.75),
        skin=skin.clamp(0.05, 1),
        lip=lip.clamp(0.05, 0.95),
        blush=draw.uniform(0, 0.35),
        freckles=draw.chance(0.35) * draw.uniform(0.1, 0.3),
        brow=brow,
        beard=beard,
        hair=torch.where(hat[:, None] > 0, draw.uniform(0.08, 0.9, 3), hair),
        iris=(draw.pick(IRIS_TONES) * draw.uniform(0.8, 1.3, 1)).clamp(0, 1),
        iris_size=draw.uniform(0.42, 0.5),
        teeth=torch.tensor([0.93, 0.91, 0.86], device=head.device) * draw.uniform(0.86, 1.04, 1),
        shadow=skin * draw.uniform(0.45, 0.9, 3),
        shadow_strength=draw.uniform(0.1, 0.4) + draw.chance(0.15) * 0.4,
        cloth=draw.uniform(0.06, 0.92, 3),
        cloth_other=draw.uniform(0.06, 0.92, 3),
        cloth_form=torch.stack(
            [
                draw.uniform(-1.72, -1.36),
                draw.chance(0.4) * draw.uniform(0.1, 0.5),
                draw.chance(0.35) * draw.uniform(2, 7),
                draw.uniform(-1.2, 1.2),
            ],
            1,
        ),
        waves=torch.cat(
            [draw.normal(8, 3) * draw.uniform(2, 10, 8, 1), draw.uniform(0, 2 * math.pi, 8, 1)], 2
        ),
        **_lights(draw),
        background=_backgrounds(draw, size),
        camera=torch.stack(
            [
                draw.uniform(2.3, 2.75),
                0.05 * draw.normal(),
                -0.16 + 0.05 * draw.normal(),
                draw.uniform(8, 14),
            ],
            1,
        ),
    )


def _hair_thickness(head: Head, draw: _Draw, style: Tensor) -> Tensor:
    """Thickness (N, S) in decimetres; negative (under the skin) below the hairline and for bald heads."""
    points = head.mean[head.scalp]
    above = hair_line(points)
    amount = torch.tensor([0.0, 0.03, 0.10, 0.13, 0.34, 0.12, 0.10], device=head.device)[style]
    amount = amount * draw.uniform(0.75, 1.3)
    lift = draw.uniform(-0.10, 0.14)[:, None]
    grown = smoothstep(above[None] + lift, -0.03, 0.16)
    frequency, phase = draw.normal(4, 3) * 2.5, draw.uniform(0, 2 * math.pi, 4, 1)
    lumps = (torch.einsum("nfc,sc->nfs", frequency, points) + phase).sin().mean(1)
    side = draw.uniform(-0.5, 0.5)[:, None]
    parted = (style == PARTED).float()[:, None] * 0.09 * torch.tanh((points[None, :, 0] - side) * 4)
    top = 1 + draw.uniform(0, 1.2)[:, None] * smoothstep(points[None, :, 1], 0.5, 1.1)
    bulk = 1 + (style == BULKY).float()[:, None] * (smoothstep(above[None], 0.0, 0.6) - 1) * 0.75
    shell = amount[:, None] * bulk * grown * (1 + 0.35 * lumps) * top + parted * grown
    hat = (style == HAT)[:, None]
    band = smoothstep(points[None, :, 1] - 0.12 * points[None, :, 2], 0.42, 0.5)
    shell = torch.where(hat, 0.11 * band, shell)
    return torch.where((style == BALD)[:, None], torch.full_like(shell, -0.05), shell - 0.025)


def _clothes_swell(head: Head, draw: _Draw) -> Tensor:
    below = smoothstep(-head.mean[:, 1], 1.5, 1.8) * head.body
    return below[None] * draw.uniform(0.0, 0.09)[:, None]


def _lights(draw: _Draw) -> dict[str, Tensor]:
    def direction(yaw: Tensor, pitch: Tensor) -> Tensor:
        return torch.stack([yaw.sin() * pitch.cos(), pitch.sin(), yaw.cos() * pitch.cos()], 1)

    warmth = draw.uniform(-0.08, 0.08)
    tint = torch.stack([1 + warmth, torch.ones_like(warmth), 1 - warmth], 1)
    ambient = draw.uniform(0.28, 0.5, 1)
    return {
        "sky": ambient * (1.05 + 0.05 * draw.normal(3)) / tint,
        "ground": ambient * draw.uniform(0.45, 0.8, 1) * (1 + 0.05 * draw.normal(3)),
        "key": draw.uniform(0.45, 0.75, 1) * tint,
        "key_direction": direction(draw.uniform(-1.0, 1.0), draw.uniform(0.15, 0.95)),
        "fill": draw.uniform(0.0, 0.25, 1) * (1 + 0.08 * draw.normal(3)),
        "fill_direction": direction(draw.uniform(-1.5, 1.5), draw.uniform(-0.2, 0.6)),
    }


def _backgrounds(draw: _Draw, size: int) -> Tensor:
    """Backgrounds (N, 3, size, size): a gradient with soft discs and boxes, often a floor line, blurred."""
    axis = torch.linspace(-1, 1, size, device=draw.device)
    y, x = axis[:, None], axis[None, :]

    def planes(value: Tensor) -> Tensor:
        return value[:, None, None]

    angle = planes(draw.uniform(0, 2 * math.pi))
    share = ((x * angle.cos() + y * angle.sin()) * planes(draw.uniform(0.3, 0.9)) + 0.5).clamp(0, 1)
    first = draw.uniform(0.08, 0.9, 1) + 0.06 * draw.normal(3)
    second = first + draw.uniform(-0.35, 0.35, 1) + 0.05 * draw.normal(3)
    picture = first[:, :, None, None] * (1 - share[:, None]) + second[:, :, None, None] * share[:, None]
    for number in range(7):
        visible = draw.chance(0.55 if number else 0.8)
        centre_x, centre_y = planes(draw.uniform(-1.1, 1.1)), planes(draw.uniform(-1.1, 1.1))
        wide, tall = planes(draw.uniform(0.1, 0.6)), planes(draw.uniform(0.1, 0.7))
        edge = planes(draw.uniform(0.02, 0.25))
        boxed = planes(draw.chance(0.6))
        apart_x, apart_y = (x - centre_x).abs() / wide, (y - centre_y).abs() / tall
        disc = (apart_x.square() + apart_y.square()).sqrt()
        far = torch.maximum(apart_x, apart_y) * boxed + disc * (1 - boxed)
        cover = smoothstep(1 - far, 0, 1) if number == 6 else ((1 - far) / edge).clamp(0, 1)
        cover = cover * planes(visible * draw.uniform(0.3, 1.0))
        colour = (first + draw.uniform(-0.35, 0.35, 1) + 0.07 * draw.normal(3))[:, :, None, None]
        picture = picture * (1 - cover[:, None]) + colour * cover[:, None]
    floor = planes(draw.chance(0.4)) * smoothstep(y - planes(draw.uniform(0.1, 0.8)), 0.0, 0.03)
    picture = picture * (1 - 0.3 * floor[:, None])
    small = resize(picture, scale_factor=1 / 4, mode="area")
    blurred = resize(small, size=(size, size), mode="bicubic", align_corners=False)
    soft = draw.uniform(0, 1)[:, None, None, None]
    return (picture * (1 - soft) + blurred * soft).clamp(0.02, 0.98)
