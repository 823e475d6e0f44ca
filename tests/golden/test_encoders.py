"""Image, text and audio preparation against the recordings of the original code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from omniavatar.encoders.image import choose_bucket, prepare_image

SIZES = {
    "720": [(400, 720), (720, 720), (720, 400)],
    "1280": [(720, 720), (528, 960), (960, 528), (720, 1280), (1280, 720)],
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    worst = (actual.double() - expected.double()).abs().max().item()
    assert worst <= tolerance * expected.abs().max().item(), worst


def test_size_buckets(golden) -> None:
    for name, chosen in json.loads(golden.path("image_sizes.json").read_text()).items():
        height, width = map(int, name.split("x"))
        for max_hw, bucket in chosen.items():
            assert choose_bucket(height, width, SIZES[max_hw]) == tuple(bucket), (name, max_hw)


def test_image_preparation(golden) -> None:
    tensors, _ = golden("image_prep.safetensors")
    names = sorted(key.removesuffix(".input") for key in tensors if key.endswith(".input"))
    assert names
    for name in names:
        expected = tensors[f"{name}.output"]
        image = np.asarray(tensors[f"{name}.input"])
        assert_close(prepare_image(image, tuple(expected.shape[-2:])), expected)
