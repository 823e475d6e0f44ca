"""Finds the face of a portrait, and cuts the square around its head that FlashHead was made with.

The detector is MediaPipe's full-range model (`assets/face`), run by LiteRT (package ai-edge-litert). Its
boxes are those of MediaPipe 0.10.21: the picture is sampled in the same places, and boxes of one face are
averaged by their scores. Unlike the original, a picture without a face is an error, of several faces the
clearest one is taken, and a square that the picture's edge cuts is not stretched.
Source: SoulX-FlashHead (its inference code), MediaPipe (BlazeFace, arXiv 1907.05047).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import numpy as np
from PIL import Image

from omniavatar.assets.face import DETECTOR
from omniavatar.errors import InputError, ResourceError

SIDE, STRIDE = 192, 4
"""Pixels of the detector's picture, and of one of its cells; each cell has one box."""
LEAST_SCORE = 0.5
SAME_FACE = 0.3
"""Boxes that share more of their union than this are of one face."""
MOST_LOGIT = 80.0
CROP, ABOVE = 2.0, 0.55
"""Side of the square in widths of the face, and the part of it above the face's centre."""
LEAST_SHARE = 0.3
"""Width of a face in widths of the square that is shown, below which the head is too small. The crop makes
it 0.5."""
INSTALL = "pip install 'omniavatar[face]'"


@dataclass(frozen=True)
class Face:
    """A face in pixels of the picture; parts of it may lie outside. score: from 0 to 1."""

    left: float
    top: float
    width: float
    height: float
    score: float


def detector_available() -> bool:
    """Whether the package of the detector is installed."""
    return importlib.util.find_spec("ai_edge_litert") is not None


def find_faces(image: np.ndarray) -> list[Face]:
    """The faces of a picture (H, W, 3) uint8, the clearest one first. Raises ResourceError without LiteRT."""
    height, width = image.shape[:2]
    side = max(height, width)
    scale, across, down = side / SIDE, (side - width) / 2.0, (side - height) / 2.0
    shift = 0.5 - 0.5 * scale  # Pillow counts from a pixel's corner, MediaPipe from its centre
    places = (scale, 0.0, shift - across, 0.0, scale, shift - down)
    shown = Image.fromarray(image).transform(
        (SIDE, SIDE), Image.Transform.AFFINE, places, Image.Resampling.BILINEAR
    )
    boxes, scores = _detect(np.asarray(shown, np.float32)[None] / 127.5 - 1.0)
    found = []
    order = [int(each) for each in np.argsort(-scores, kind="stable") if scores[each] >= LEAST_SCORE]
    while order:
        same = [each for each in order if _shared(boxes[order[0]], boxes[each]) > SAME_FACE]
        weights = scores[same, None]
        left, top, right, bottom = (boxes[same] * weights).sum(0) / weights.sum() * scale
        found.append(
            Face(
                float(left - across),
                float(top - down),
                float(right - left),
                float(bottom - top),
                float(scores[order[0]]),
            )
        )
        order = [each for each in order if each not in same]
    return found


def head_square(face: Face, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the square around the head, cut at the edges of the picture."""
    side = CROP * face.width
    x, y = face.left + face.width / 2.0, face.top + face.height / 2.0
    top, bottom = y - ABOVE * side, y + (1.0 - ABOVE) * side
    left, right = x - side / 2.0, x + side / 2.0
    return int(max(top, 0.0)), int(min(bottom, height)), int(max(left, 0.0)), int(min(right, width))


def crop_to_head(image: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The square around the head of a portrait (H, W, 3) uint8, and what the user should know.

    Raises InputError for a picture without a face, ResourceError without LiteRT.
    """
    faces = find_faces(image)
    if not faces:
        raise InputError(
            "image: face_crop found no face; give a portrait that shows one, or set face_crop to false"
        )
    height, width = image.shape[:2]
    top, bottom, left, right = head_square(faces[0], height, width)
    if min(bottom - top, right - left) < 2:
        raise InputError("image: the face lies at its edge; give a portrait that shows the whole head")
    notes = []
    if len(faces) > 1:
        notes.append(
            f"image: has {len(faces)} faces; the clearest one is taken, crop the picture for another"
        )
    return np.ascontiguousarray(image[top:bottom, left:right]), notes


def portrait_notes(image: np.ndarray, size: tuple[int, int]) -> list[str]:
    """Why a head model needs another crop of a portrait (H, W, 3) uint8; empty if it does not.

    - size: (height, width) of the video, which shows the middle of the portrait.
    """
    faces = find_faces(image)
    if not faces:
        return ["image: no face was found, and this model makes heads only; give a portrait of one head"]
    height, width = image.shape[:2]
    scale = min(height / size[0], width / size[1])
    shown_height, shown_width = size[0] * scale, size[1] * scale
    top, left = (height - shown_height) / 2.0, (width - shown_width) / 2.0
    face = faces[0]
    x, y = face.left + face.width / 2.0 - left, face.top + face.height / 2.0 - top
    half = min(face.width, face.height) / 2.0
    outside = min(x, shown_width - x, y, shown_height - y) < half
    if outside:
        return ["image: the face lies outside the middle, which is shown; set face_crop to true"]
    share = face.width / min(shown_height, shown_width)
    if share < LEAST_SHARE:
        return [f"image: the face fills {share:.0%} of the picture's width; set face_crop to true"]
    return []


def _detect(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4: left, top, right, bottom) and scores (N,) of a picture (1, 192, 192, 3) in [-1, 1]."""
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError:
        raise ResourceError(f"face_crop: the package ai-edge-litert is missing; {INSTALL}") from None
    # without delegates, LiteRT prints nothing to the terminal
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    network = Interpreter(str(DETECTOR), experimental_op_resolver_type=plain, num_threads=1)
    network.allocate_tensors()
    network.set_tensor(network.get_input_details()[0]["index"], picture)
    network.invoke()
    outputs = [network.get_tensor(each["index"])[0] for each in network.get_output_details()]
    (values,) = (each for each in outputs if each.shape[1] > 1)  # centre, size, six points of the face
    (logits,) = (each[:, 0] for each in outputs if each.shape[1] == 1)
    rows, columns = np.divmod(np.arange(len(values)), SIDE // STRIDE)
    centres = np.stack([columns, rows], axis=1) * STRIDE + STRIDE / 2.0 + values[:, :2]
    halves = values[:, 2:4] / 2.0
    scores = 1.0 / (1.0 + np.exp(-np.clip(logits.astype(np.float64), -MOST_LOGIT, MOST_LOGIT)))
    return np.concatenate([centres - halves, centres + halves], axis=1), scores


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """The part of the union of two boxes that is in both."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    inside = float(np.prod(np.clip(high - low, 0.0, None)))
    union = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - inside
    return inside / union if union > 0 else 0.0
