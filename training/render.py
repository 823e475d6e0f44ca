"""Renders talking heads: deform, rasterise at twice the size, shade, filter, and put on the background.

Shading depends on the material. Features of the skin (brows, beard, freckles, blush, lids, lips, neckline)
are functions of the position on the mean head, which is interpolated over the triangles and so moves with the
face. The light is a sky-ground ambient, a key light and a fill light without cast shadows; dark areas under
the chin, at the hairline and deep in the mouth are painted.

Shapes: N identities, T frames each, H W pixels, P covered samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from training.head import CLOTH, Head, Pose, smoothstep
from training.head_asset import EYE, HAIR, LASH, MOUTH, SKIN, TEETH, TONGUE
from training.looks import Looks
from training.raster import Hits, interpolate, rasterise

SUPERSAMPLE = 2
FRAMES_AT_ONCE = {"cuda": 96, "cpu": 4}


@dataclass(frozen=True, eq=False)
class Performance:
    """Motion of N people over T frames: ARKit coefficients (N, T, 52), head (N, T, 3), gaze and sway
    (N, T, 2)."""

    coefficients: Tensor
    head: Tensor
    gaze: Tensor
    sway: Tensor

    def flat(self) -> tuple[Tensor, Pose]:
        """Coefficients and poses of all frames in one batch."""
        return self.coefficients.flatten(0, 1), Pose(
            self.head.flatten(0, 1), self.gaze.flatten(0, 1), self.sway.flatten(0, 1)
        )


def gather(tracks: list[dict[str, np.ndarray]], device: torch.device) -> Performance:
    """Performances of equal length as one batch on `device`."""
    return Performance(
        **{
            name: torch.from_numpy(np.stack([track[name] for track in tracks])).to(device)
            for name in tracks[0]
        }
    )


class Renderer:
    """Renders square frames of `size` pixels on the head's device."""

    def __init__(self, head: Head, size: int = 192) -> None:
        self.head, self.size = head, size
        self.rest = head.rest
        self.marks = torch.zeros(len(head.rest), 3, device=head.device)
        count = head.mesh_vertices
        self.marks[:count] = torch.stack([head.lips, head.eyelids, head.inside], 1)
        self.eye_centres = torch.stack([head.mean[head.right_eye].mean(0), head.mean[head.left_eye].mean(0)])
        spread = head.mean[head.left_eye] - self.eye_centres[1]
        self.eye_radius = float(spread.norm(dim=1).mean())

    @torch.no_grad()
    def frames(self, looks: Looks, performance: Performance) -> tuple[Tensor, Tensor]:
        """Frames uint8 (N, T, 3, H, W) of N looks and performances, and the places (N, T, 3, 2) of the mouth,
        the left eye and the right eye in pixels."""
        count, length = performance.coefficients.shape[:2]
        coefficients, pose = performance.flat()
        owner = torch.arange(count, device=self.head.device).repeat_interleave(length)
        shapes = self.head.shape(looks.identity)
        pieces = []
        for rows in torch.arange(count * length, device=self.head.device).split(
            FRAMES_AT_ONCE[self.head.device.type]
        ):
            part = Pose(pose.head[rows], pose.gaze[rows], pose.sway[rows])
            pieces.append(self._piece(looks, shapes, owner[rows], coefficients[rows], part))
        pictures, places = (
            torch.cat(part).unflatten(0, (count, length)) for part in zip(*pieces, strict=True)
        )
        return pictures, places

    def _piece(
        self, looks: Looks, shapes: Tensor, owner: Tensor, coefficients: Tensor, pose: Pose
    ) -> tuple[Tensor, Tensor]:
        head = self.head
        first = int(owner[0])
        looks, shapes = looks.select(slice(first, int(owner[-1]) + 1)), shapes[first : int(owner[-1]) + 1]
        owner = owner - first
        vertices, normals = head.deform(
            shapes[owner], coefficients, pose, looks.thickness[owner], looks.swell[owner]
        )
        points = self._project(vertices, looks.camera[owner])
        parts = (head.lip_pair, head.left_eye, head.right_eye)
        places = torch.stack([points[:, part, :2].mean(1) for part in parts], 1) / SUPERSAMPLE
        for hidden, shown in ((head.lashes, looks.lashes), (head.long_hair, looks.long_hair)):
            keep = torch.ones(len(owner), points.shape[1], dtype=torch.bool, device=points.device)
            keep[:, : head.mesh_vertices] = ~hidden[None] | (shown[owner][:, None] > 0)
            points = torch.where(keep[..., None], points, points.new_tensor([-9.0, -9.0, 1.0]))
        scaled = self.size * SUPERSAMPLE
        hits = rasterise(points, head.triangles, head.two_sided, (scaled, scaled))
        colours = self._shade(hits, looks, owner, normals)
        image = torch.zeros(len(owner) * scaled * scaled, 4, device=points.device)
        image[hits.pixel] = torch.cat([colours, torch.ones_like(colours[:, :1])], 1)
        image = avg_pool2d(image.view(len(owner), scaled, scaled, 4).permute(0, 3, 1, 2), SUPERSAMPLE)
        final = image[:, :3] + (1 - image[:, 3:]) * looks.background[owner]
        return (final.clamp(0, 1) * 255).round().to(torch.uint8), places

    def _project(self, vertices: Tensor, camera: Tensor) -> Tensor:
        height, centre_x, centre_y, distance = camera[:, :, None].unbind(1)
        scaled = self.size * SUPERSAMPLE
        away = distance - vertices[..., 2]
        focal = scaled / height * distance
        return torch.stack(
            [
                scaled / 2 + focal * (vertices[..., 0] - centre_x) / away,
                scaled / 2 - focal * (vertices[..., 1] - centre_y) / away,
                away,
            ],
            -1,
        )

    def _shade(self, hits: Hits, looks: Looks, owner: Tensor, normals: Tensor) -> Tensor:
        head = self.head
        normal = torch.nn.functional.normalize(interpolate(hits, head.triangles, normals), dim=1)
        fixed = interpolate(hits, head.triangles, torch.cat([self.rest, self.marks], 1))
        place, marks = fixed[:, :3], fixed[:, 3:]
        who = owner[hits.frame]
        material = head.material[hits.triangle]
        neckline = looks.cloth_form[who]
        below = neckline[:, 0] - neckline[:, 1] * (1 - (place[:, 0].abs() / 0.55)).clamp_min(0)
        material = torch.where((material == SKIN) & (place[:, 1] < below), CLOTH, material)
        facing = normal * torch.where(normal[:, 2:] < -0.2, -1.0, 1.0)
        colours = torch.empty_like(place)
        for kinds, paint in (
            ((SKIN,), self._skin),
            ((EYE,), self._eye),
            ((TEETH,), self._teeth),
            ((TONGUE,), self._tongue),
            ((MOUTH,), self._mouth),
            ((LASH,), self._lash),
            ((HAIR, HAIR + 1), self._hair),
            ((CLOTH,), self._cloth),
        ):
            chosen = material == kinds[0]
            for kind in kinds[1:]:
                chosen |= material == kind
            rows = chosen.nonzero().squeeze(1)
            colours[rows] = paint(looks, who[rows], place[rows], marks[rows], facing[rows])
        return colours

    def _light(
        self, looks: Looks, who: Tensor, normal: Tensor, wrap: float, shine: float, power: float
    ) -> Tensor:
        """The factor of the albedo and the highlight to add: (2, P, 3)."""
        sky = looks.ground[who] + (looks.sky[who] - looks.ground[who]) * (0.5 + 0.5 * normal[:, 1:2])
        key_direction = looks.key_direction[who]
        key = ((normal * key_direction).sum(1, keepdim=True) + wrap).clamp_min(0) / (1 + wrap)
        fill = (normal * looks.fill_direction[who]).sum(1, keepdim=True).clamp_min(0)
        diffuse = sky + key * looks.key[who] + fill * looks.fill[who]
        if not shine:
            return torch.stack([diffuse, torch.zeros_like(diffuse)])
        half = key_direction + torch.tensor([0.0, 0.0, 1.0], device=normal.device)
        half = torch.nn.functional.normalize(half, dim=1)
        glint = (normal * half).sum(1, keepdim=True).clamp_min(0).pow(power) * shine
        return torch.stack([diffuse, glint * looks.key[who]])

    def _waves(self, looks: Looks, who: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Angle at scale 1 without phase, and the phase, of the person's waves: (P, 8) each."""
        waves = looks.waves[who]
        return (waves[..., :3] * place[:, None]).sum(-1), waves[..., 3]

    def _skin(self, looks: Looks, who: Tensor, place: Tensor, marks: Tensor, normal: Tensor) -> Tensor:
        x, y, z = place.unbind(1)
        side = x.abs()
        front = smoothstep(z, -0.5, 0.0)
        waves = self._waves(looks, who, place)
        tone = looks.skin[who] * (1 + 0.035 * _noise(waves, 1.0))[:, None]
        spots = smoothstep(_noise(waves, 11.0), 0.3, 0.5) * front * smoothstep(-y, 0.0, 0.25)
        tone = tone * (1 - looks.freckles[who] * spots)[:, None]
        cheek = torch.exp(-((side - 0.42).square() + (y + 0.38).square()) / 0.05) + 0.6 * torch.exp(
            -(side.square() + (y + 0.42).square()) / 0.02
        )
        red = (looks.blush[who] * cheek * front)[:, None]
        tone = tone * (1 - red * torch.tensor([0.05, 0.45, 0.40], device=x.device))
        lid = (smoothstep(marks[:, 1], 0.2, 0.8) * looks.shadow_strength[who])[:, None]
        tone = torch.lerp(tone, looks.shadow[who], lid)
        face_hair = torch.where(looks.hat[who][:, None] > 0, looks.skin[who] * 0.25, looks.hair[who] * 0.75)
        tone = torch.lerp(tone, face_hair, self._beard(looks, who, place, marks, waves)[:, None])
        lip = smoothstep(marks[:, 0], 0.25, 0.65)[:, None]
        tone = torch.lerp(tone, looks.lip[who], lip)
        tone = torch.lerp(tone, face_hair, self._brow(looks, who, place)[:, None])
        shade = 1 - 0.38 * smoothstep(-y, 1.0, 1.35) * smoothstep(-z, -0.2, 0.35) * smoothstep(y, -2.3, -1.6)
        shade = shade * (1 - 0.85 * smoothstep(marks[:, 2], 0.3, 0.9))
        diffuse, glint = self._light(looks, who, normal, 0.25, 0.10, 16.0)
        return tone * diffuse * shade[:, None] + glint * (1 + 0.8 * lip) * shade[:, None]

    def _brow(self, looks: Looks, who: Tensor, place: Tensor) -> Tensor:
        height, arch, slope, thick, opacity, length = looks.brow[who].unbind(1)
        x, y, z = place.unbind(1)
        along = (x.abs() - 0.11) / (length - 0.11)
        inside = along.clamp(0, 1)
        centre = height + slope * (inside - 0.5) + arch * (1 - (inside - 0.6).square() * 4)
        half = thick * (1.15 - 0.75 * inside)
        across = 1 - smoothstep((y - centre).abs() / half, 0.55, 1.15)
        ends = smoothstep(along, -0.08, 0.08) * (1 - smoothstep(along, 0.9, 1.05))
        return across * ends * opacity * smoothstep(z, -0.3, -0.1)

    def _beard(
        self, looks: Looks, who: Tensor, place: Tensor, marks: Tensor, waves: tuple[Tensor, Tensor]
    ) -> Tensor:
        full, moustache, edge = looks.beard[who].unbind(1)
        x, y, z = place.unbind(1)
        side = x.abs()
        jaw = smoothstep(-(y + 0.62 - 0.55 * side), 0.0, 0.18) * smoothstep(y - edge, 0.0, 0.15)
        jaw = jaw * smoothstep(z, -0.85, -0.6)
        upper = (
            smoothstep(y, -0.68, -0.62)
            * (1 - smoothstep(y, -0.55, -0.49))
            * (1 - smoothstep(side, 0.24, 0.34))
        )
        cover = torch.maximum(full * jaw, moustache * upper * (z > 0))
        grain = 0.8 + 0.2 * _noise(waves, 9.0)
        return cover * grain * (1 - smoothstep(marks[:, 0], 0.05, 0.3))

    def _eye(self, looks: Looks, who: Tensor, place: Tensor, marks: Tensor, normal: Tensor) -> Tensor:
        centre = torch.where(place[:, :1] > 0, self.eye_centres[1], self.eye_centres[0])
        away = (place - centre) / self.eye_radius
        radius = (away[:, 0].square() + away[:, 1].square()).sqrt()
        size = looks.iris_size[who]
        white = torch.tensor([0.93, 0.92, 0.91], device=place.device).expand_as(place)
        ring = (1 - smoothstep(radius / size, 0.92, 1.08)) * (away[:, 2] > 0)
        pupil = 1 - smoothstep(radius / size, 0.36, 0.5)
        iris = looks.iris[who] * (0.55 + 0.75 * radius / size).clamp_max(1.15)[:, None]
        rim = smoothstep(radius / size, 0.78, 1.0)[:, None]
        colour = torch.lerp(white, iris * (1 - 0.6 * rim), ring[:, None])
        colour = colour * (1 - 0.95 * (pupil * ring))[:, None]
        diffuse, glint = self._light(looks, who, normal, 0.5, 0.9, 120.0)
        lid_shadow = 1 - 0.35 * smoothstep(away[:, 1], 0.05, 0.75)
        return colour * diffuse * lid_shadow[:, None] * 0.9 + glint

    def _teeth(self, looks: Looks, who: Tensor, place: Tensor, marks: Tensor, normal: Tensor) -> Tensor:
        depth = 1 - 0.7 * smoothstep(-place[:, 2], -0.20, 0.10)
        gaps = 1 - 0.22 * (place[:, 0] / 0.062).mul(torch.pi).cos().abs().pow(10)
        diffuse, glint = self._light(looks, who, normal, 0.6, 0.2, 30.0)
        return looks.teeth[who] * diffuse * (0.92 * depth * gaps)[:, None] + glint * 0.5

    def _tongue(self, looks: Looks, who: Tensor, place: Tensor, marks: Tensor, normal: Tensor) -> Tensor:
        depth = 1 - 0.75 * smoothstep(-place[:, 2], -0.15, 0.25)
        diffuse, glint = self._light(looks, who, normal, 0.3, 0.15, 20.0)
        colour = torch.tensor([0.72, 0.33, 0.34], device=place.device)
        return colour * diffuse * (0.75 * depth)[:, None] + glint * depth[:, None]

    def _mouth(self, looks: Looks, who: Tensor, place: Tensor, marks: Tensor, normal: Tensor) -> Tensor:
        depth = smoothstep(place[:, 2], -0.1, 0.32)
        diffuse, _ = self._light(looks, who, normal, 0.3, 0.0, 1.0)
        colour = torch.tensor([0.38, 0.13, 0.13], device=place.device)
        return colour * diffuse * (0.08 + 0.7 * depth)[:, None]

    def _lash(self, looks: Looks, who: Tensor, place: Tensor, marks: Tensor, normal: Tensor) -> Tensor:
        return (looks.hair[who] * 0.25).clamp_max(0.12)

    def _hair(self, looks: Looks, who: Tensor, place: Tensor, marks: Tensor, normal: Tensor) -> Tensor:
        x, y, z = place.unbind(1)
        around = torch.atan2(x, z + 0.85)
        phase = looks.waves[who][:, :4, 3]
        strands = sum(
            (frequency * around + slant * y + phase[:, number]).sin()
            for number, (frequency, slant) in enumerate(((31.0, 3.0), (53.0, -4.0), (79.0, 6.0), (17.0, 1.5)))
        )
        knit = (place[:, 1] * 60).sin() * (around * 40).sin()
        texture = torch.where(looks.hat[who] > 0, 0.05 * knit, 0.075 * strands)
        diffuse, glint = self._light(looks, who, normal, 0.1, 0.12, 10.0)
        bright = (1 + texture)[:, None]
        return looks.hair[who] * diffuse * bright + glint * bright * looks.hair[who].clamp_min(0.12) * 1.5

    def _cloth(self, looks: Looks, who: Tensor, place: Tensor, marks: Tensor, normal: Tensor) -> Tensor:
        form = looks.cloth_form[who]
        phase = (place[:, 1] + form[:, 3] * place[:, 0]) * form[:, 2] * 2 * torch.pi
        stripe = smoothstep(phase.sin(), -0.15, 0.15) * (form[:, 2] > 0)
        colour = torch.lerp(looks.cloth[who], looks.cloth_other[who], stripe[:, None])
        below = form[:, 0] - form[:, 1] * (1 - (place[:, 0].abs() / 0.55)).clamp_min(0)
        hem = 1 - 0.3 * smoothstep(place[:, 1] - below, -0.06, -0.03)
        diffuse, _ = self._light(looks, who, normal, 0.1, 0.0, 1.0)
        return (
            colour
            * diffuse
            * hem[:, None]
            * (1 + 0.05 * _noise(self._waves(looks, who, place), 1.5))[:, None]
        )


def _noise(waves: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Mean of sines (P,) in -1..1; a larger scale gives finer noise."""
    angle, phase = waves
    return torch.addcmul(phase, angle, angle.new_tensor(scale)).sin().mean(1)
