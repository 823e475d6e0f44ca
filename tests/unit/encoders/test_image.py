"""Size buckets and portrait preparation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniavatar.encoders.image import choose_bucket, prepare_image
from omniavatar.errors import InputError

SIZES = [(400, 720), (720, 720), (720, 400)]


@pytest.mark.parametrize(
    ("height", "width", "bucket"),
    [(1, 1, (720, 720)), (400, 720, (400, 720)), (7, 9, (400, 720)), (7, 5, (720, 720)), (9, 1, (720, 400))],
)
def test_bucket_and_first_of_equals(height: int, width: int, bucket: tuple[int, int]) -> None:
    assert choose_bucket(height, width, SIZES) == bucket


def test_bucket_needs_pixels() -> None:
    with pytest.raises(InputError, match="0x5"):
        choose_bucket(5, 0, SIZES)


@given(st.integers(1, 130), st.integers(1, 130), st.sampled_from([(40, 72), (72, 72), (72, 40), (48, 80)]))
@settings(max_examples=60, deadline=None)
def test_a_white_image_stays_white_to_the_edge(height: int, width: int, size: tuple[int, int]) -> None:
    """In the original code, a scaled side one pixel too short left a black edge."""
    if max(height, width) > 32 * min(height, width):
        return
    prepared = prepare_image(np.full((height, width, 3), 255, np.uint8), size)
    assert prepared.shape == (1, 3, *size)
    assert prepared.min() > 0.9999


def test_scaling_does_not_round_to_bytes() -> None:
    ramp = np.repeat(np.arange(0, 64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    prepared = (prepare_image(ramp, (72, 72)) + 1) * 127.5
    assert (prepared - prepared.round()).abs().max() > 0.2


def test_crop_keeps_the_middle() -> None:
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    assert prepare_image(image, (10, 10)).min() == 1.0


def test_one_pixel_and_bad_arrays() -> None:
    assert prepare_image(np.full((1, 1, 3), 51, np.uint8), (16, 16)).std() == 0
    with pytest.raises(InputError, match="RGB"):
        prepare_image(np.zeros((4, 4, 4), np.uint8), (16, 16))
    with pytest.raises(InputError, match="RGB"):
        prepare_image(np.zeros((4, 4, 3), np.float32), (16, 16))
    with pytest.raises(InputError, match="longer than wide"):
        prepare_image(np.zeros((1, 1000, 3), np.uint8), (16, 16))
