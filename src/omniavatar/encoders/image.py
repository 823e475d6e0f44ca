"""The portrait: which size bucket it goes to, and how it becomes a tensor of that size.

A bucket is chosen by aspect ratio alone, in exact fractions. The portrait is then scaled until it covers the
bucket, cropped around its middle and put in [-1, 1]. Scaling works on floats (scaling bytes rounds every
pixel) and never stops one pixel short of the bucket, which left a black edge in the original.

Limits: RGB bytes only (decoding, rotation and alpha are `media`'s); aspect ratios up to `MAX_ASPECT`, since
a narrower image would be blown up to gigabytes before the crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from omniavatar.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

MAX_ASPECT = 32


def choose_bucket(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size (H, W) of `sizes` with the least `|height/width - H/W|`; of equals, the first.

    Raises `InputError` for a portrait without pixels.
    """
    if height < 1 or width < 1:
        raise InputError(f"image: {width}x{height} pixels is no picture; give one of at least 1x1")
    ratio = Fraction(height, width)
    return min(sizes, key=lambda size: abs(ratio - Fraction(size[0], size[1])))


def prepare_image(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Scale and crop a portrait: `image` (h, w, 3) uint8 RGB -> (1, 3, H, W) float32 in [-1, 1], on the CPU.

    `size` is (H, W). Works a colour plane at a time: a 100-megapixel image needs 0.4 GB besides itself.
    Raises `InputError` when the array is not RGB bytes or is more than `MAX_ASPECT` times longer than wide.
    """
    import numpy as np
    import torch
    from torch.nn.functional import interpolate

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        found = f"{image.shape} {image.dtype}"
        raise InputError(f"image: want (h, w, 3) uint8 RGB, got {found}; convert it first")
    height, width = image.shape[:2]
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(
            f"image: {width}x{height} pixels is more than {MAX_ASPECT} times longer than wide; crop it first"
        )
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
