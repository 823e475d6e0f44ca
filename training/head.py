"""The parametric head: vertices from coefficients of identity and expression, gaze and head pose.

All parts except rotations are linear: mean + identity axes + 52 ARKit shapes. Eyeballs turn about their
centres; the head turns about its joint, with a weight that fades down the neck. The hair shell consists of
copies of the scalp's vertices, moved along their normals by a thickness that depends on the identity (see
`looks`).

Coordinates as in `head_asset`. Shapes: B frames, V vertices (mesh, then hair shell), K identity axes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.head_asset import ASSET, HAIR, LASH, MOUTH, SKIN, TEETH, TONGUE

SHELL, CLOTH = 7, 8
HEAD_JOINT = (0.0, -0.35, -0.95)
HAIR_LINE = ((-1.9, -0.95), (-1.3, -0.85), (-1.0, -0.3), (-0.55, 0.0), (-0.35, 0.25), (0.0, 0.6), (0.3, 0.75))
TEETH_SHIFT = ((0.0, -0.055, -0.02), (0.0, -0.05, -0.02))
DOUBLE = (TEETH, LASH, HAIR, TONGUE)


@dataclass(frozen=True, eq=False)
class Pose:
    """Rigid motion per frame, in radians and decimetres.

    head: (B, 3) yaw, pitch and roll.
    gaze: (B, 2) right-left and up.
    sway: (B, 2) of the whole body.
    """

    head: Tensor
    gaze: Tensor
    sway: Tensor


class Head:
    """The head asset on a device. `names` are the ARKit shapes in the order of the coefficients."""

    def __init__(self, device: torch.device | str, path: Path = ASSET) -> None:
        arrays = np.load(path)

        def tensor(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.from_numpy(arrays[name]).to(device=device, dtype=dtype)

        self.device = torch.device(device)
        self.names: list[str] = [str(name) for name in arrays["action_names"]]
        parts = [str(name) for name in arrays["part_names"]]
        self.mean, self.identity, self.actions = tensor("mean"), tensor("identity"), tensor("actions")
        self.scores = tensor("scores")
        part = tensor("part", torch.int64)
        self.left_eye = (part == parts.index("left_eye")).nonzero().squeeze(1)
        self.right_eye = (part == parts.index("right_eye")).nonzero().squeeze(1)
        self.lip_pair = tensor("lip_pair", torch.int64)
        self.lips, self.eyelids, self.inside = tensor("mask_lips"), tensor("mask_eyelids"), tensor("inside")
        self.body = part == parts.index("body")
        self.lashes = part == parts.index("lashes")
        self.long_hair = part == parts.index("hair")
        self.tongue = part == parts.index("tongue")
        teeth = [part == parts.index(f"{row}_teeth") for row in ("upper", "lower")]
        for row, shift in zip(teeth, TEETH_SHIFT, strict=True):
            self.mean[row] += torch.tensor(shift, device=device)
        triangles, material = tensor("triangles", torch.int64), tensor("material", torch.int64)
        fringe = (material == HAIR) & self._before_face(triangles)
        triangles, material = triangles[~fringe], material[~fringe]
        self.scalp, shell = self._shell(triangles, material, tensor("mask_ears"))
        self.mesh_vertices = len(self.mean)
        self.triangles = torch.cat([triangles, shell])
        self.material = torch.cat([material, torch.full((len(shell),), SHELL, device=device)])
        two_sided = torch.zeros(len(self.material), dtype=torch.bool, device=device)
        for kind in DOUBLE:
            two_sided |= self.material == kind
        self.two_sided = two_sided
        self.rest = torch.cat([self.mean, self.mean[self.scalp]])
        self.rest_normals = self.normals(self.rest[None])[0]
        self.neck_weight = smoothstep(self.rest[:, 1], -2.05, -1.05)
        self.joint = torch.tensor(HEAD_JOINT, device=device)
        smooth = (self.material == SKIN) | (self.material == MOUTH)
        self.skin_triangles = self.triangles[smooth]

    def _shell(self, triangles: Tensor, material: Tensor, ears: Tensor) -> tuple[Tensor, Tensor]:
        """Vertices from which hair grows, and the triangles of the shell, numbered over all vertices."""
        grows = self.body & (hair_line(self.mean) > -0.22) & (ears < 0.3)
        chosen = grows[triangles].all(1) & (material == SKIN)
        scalp, inverse = triangles[chosen].flatten().unique(return_inverse=True)
        return scalp, inverse.view(-1, 3) + len(self.mean)

    def _before_face(self, triangles: Tensor) -> Tensor:
        """Triangles of the long-hair mesh that would hang over the face."""
        points = self.mean[triangles]
        return ((points[..., 2] > -0.5) & (points[..., 1] < 0.8)).any(1)

    def shape(self, identity: Tensor) -> Tensor:
        """Neutral vertices (B, mesh vertices, 3) for identity coefficients (B, K)."""
        return self.mean + torch.einsum("bk,kvc->bvc", identity, self.identity)

    def deform(
        self, shape: Tensor, coefficients: Tensor, pose: Pose, thickness: Tensor, swell: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Vertices and normals (B, V, 3) of a posed head.

        shape: (B, mesh vertices, 3), neutral.
        coefficients: (B, 52), ARKit shapes.
        thickness: (B, scalp vertices), of the hair shell.
        swell: (B, mesh vertices), moves skin along its normal at rest (clothes).
        """
        moved = shape + (coefficients @ self.actions.flatten(1)).unflatten(1, (-1, 3))
        moved = torch.addcmul(moved, swell[..., None], self.rest_normals[: self.mesh_vertices])
        turn = torch.cat([pose.gaze, torch.zeros_like(pose.gaze[:, :1])], 1)
        rotation = rotations(torch.stack([turn[:, 0], -turn[:, 1], turn[:, 2]], 1))
        for eye in (self.left_eye, self.right_eye):
            centre = shape[:, eye].mean(1, keepdim=True)
            moved[:, eye] = (shape[:, eye] - centre) @ rotation.transpose(1, 2) + centre
        normals = self.normals(moved)
        hair = moved[:, self.scalp] + normals[:, self.scalp] * thickness[..., None]
        vertices = torch.cat([moved, hair], 1)
        turned = (vertices - self.joint) @ rotations(pose.head).transpose(1, 2) + self.joint
        vertices = torch.lerp(vertices, turned, self.neck_weight[:, None])
        vertices[..., :2] += pose.sway[:, None]
        return vertices, self.normals(vertices)

    def normals(self, vertices: Tensor) -> Tensor:
        """Unit normals (B, V, 3): area-weighted means over the adjacent triangles; with or without shell."""
        triangles = self.triangles
        if vertices.shape[1] == self.mesh_vertices:
            triangles = triangles[(triangles < self.mesh_vertices).all(1)]
        corners = vertices[:, triangles.flatten()].unflatten(1, (-1, 3))
        across = torch.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0], dim=-1)
        total = torch.zeros_like(vertices)
        for corner in range(3):
            total.index_add_(1, triangles[:, corner], across)
        return torch.nn.functional.normalize(total, dim=-1, eps=1e-12)

    def mouth_opening(self, shape: Tensor, coefficients: Tensor) -> Tensor:
        """Mouth opening (B,): gap of the inner lips minus the gap at rest, over the distance of the eyes.

        It is the ground truth for lip sync.

        shape: (B, mesh vertices, 3), neutral.
        coefficients: (B, 52), ARKit shapes.
        """
        rest = shape[:, self.lip_pair]
        lips = rest + torch.einsum("bk,kvc->bvc", coefficients, self.actions[:, self.lip_pair])
        apart = shape[:, self.left_eye].mean(1) - shape[:, self.right_eye].mean(1)
        gap = (lips[:, 0] - lips[:, 1]).norm(dim=-1) - (rest[:, 0] - rest[:, 1]).norm(dim=-1)
        return gap.clamp_min(0) / apart.norm(dim=-1)


def hair_line(points: Tensor) -> Tensor:
    """Height in decimetres of points (..., 3) of the mean head above the hairline; hair grows above 0."""
    y, z = points[..., 1], points[..., 2]
    line = torch.full_like(y, HAIR_LINE[0][1])
    for (start, low), (stop, high) in itertools.pairwise(HAIR_LINE):
        line = line + ((z - start) / (stop - start)).clamp(0, 1) * (high - low)
    return y - line


def rotations(angles: Tensor) -> Tensor:
    """Rotation matrices (B, 3, 3) for yaw, pitch, roll (B, 3): roll first, then pitch, then yaw."""
    cos, sin = angles.cos(), angles.sin()
    one, zero = torch.ones_like(cos[:, 0]), torch.zeros_like(cos[:, 0])

    def matrix(*rows: Tensor) -> Tensor:
        return torch.stack(rows, 1).unflatten(1, (3, 3))

    (cy, cp, cr), (sy, sp, sr) = cos.unbind(1), sin.unbind(1)
    yaw = matrix(cy, zero, sy, zero, one, zero, -sy, zero, cy)
    pitch = matrix(one, zero, zero, zero, cp, -sp, zero, sp, cp)
    roll = matrix(cr, -sr, zero, sr, cr, zero, zero, zero, one)
    return yaw @ pitch @ roll


def smoothstep(x: Tensor, low: float, high: float) -> Tensor:
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)
