"""Chooses the size bucket of a portrait, and scales and crops the portrait to a tensor of that size.

The bucket depends only on the aspect ratio, compared in exact fractions. The portrait is scaled until it
covers the bucket, cropped around its centre and mapped to [-1, 1]. Scaling works on floats, because scaling
bytes would round every pixel. The scaled side is never one pixel too short; in the original code that left a
black edge.

Limits: RGB bytes only (`media` handles decoding, rotation and alpha). Aspect ratios go up to `MAX_ASPECT`: a
narrower image would be scaled to gigabytes before the crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from omniavatar.errors import InputError
from omniavatar.media.picture_file import MAX_ASPECT

if TYPE_CHECKING:
    import numpy as np
    import torch


def choose_bucket(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size (H, W) in `sizes` with the smallest `|height/width - H/W|`; the first of equal ones.

    Raises `InputError` for a portrait without pixels.
    """
    if height < 1 or width < 1:
        raise InputError(f"image: {width}x{height} pixels is empty; give an image of at least 1x1")
    ratio = Fraction(height, width)
    return min(sizes, key=lambda size: abs(ratio - Fraction(size[0], size[1])))


def prepare_image(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """The portrait, scaled and cropped: (1, 3, H, W) float32 in [-1, 1] on the CPU.

    Colour planes are processed one by one: a 100-megapixel image needs 0.4 GB of extra memory.

    image: (h, w, 3) uint8 RGB.
    size: (H, W).

    Raises `InputError` if the array is not RGB bytes or its aspect ratio exceeds `MAX_ASPECT`.
    """
    import numpy as np
    import torch
    from torch.nn.functional import interpolate

    height, width = _checked(image)
    target_height, target_width = size
    scale = max(target_height / height, target_width / width)
    scaled_height = max(target_height, int(height * scale))
    scaled_width = max(target_width, int(width * scale))
    top = (scaled_height - target_height + 1) // 2
    left = (scaled_width - target_width + 1) // 2
    planes = torch.empty(1, 3, target_height, target_width)
    for channel in range(3):
        plane = torch.from_numpy(image[:, :, channel].astype(np.float32))
        scaled = interpolate(
            plane[None, None],
            size=(scaled_height, scaled_width),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        planes[0, channel] = scaled[0, 0, top : top + target_height, left : left + target_width]
    return planes.div_(127.5).sub_(1.0).clamp_(-1.0, 1.0)


def prepare_image_bytes(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Like `prepare_image`, as FlashHead does it: bytes are scaled, by Pillow, and the crop rounds to even.

    Raises what `prepare_image` raises.
    """
    import numpy as np
    import torch
    from PIL import Image

    height, width = _checked(image)
    target_height, target_width = size
    scale = max(target_height / height, target_width / width)
    scaled = (math.ceil(scale * width), math.ceil(scale * height))
    pixels = np.array(Image.fromarray(image).resize(scaled, Image.Resampling.BILINEAR))
    top, left = round((scaled[1] - target_height) / 2), round((scaled[0] - target_width) / 2)
    cropped = torch.from_numpy(pixels[top : top + target_height, left : left + target_width])
    return ((cropped.permute(2, 0, 1)[None].float() / 255.0 - 0.5) * 2.0).contiguous()


def _checked(image: np.ndarray) -> tuple[int, int]:
    """Height and width of RGB bytes. Raises InputError."""
    if image.dtype != "uint8" or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        found = f"{image.shape} {image.dtype}"
        raise InputError(f"image: must be (h, w, 3) uint8 RGB, got {found}; convert it first")
    height, width = image.shape[:2]
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(
            f"image: {width}x{height} pixels is more than {MAX_ASPECT} times longer than wide; crop it first"
        )
    return height, width
