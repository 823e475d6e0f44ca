"""`color_profile` decides how the portrait of a request is read, and is part of what makes a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from colour_profiles import P3, in_srgb, rgb_profile
from engine import make_pipeline, request
from omniavatar.config.identity import config_hash
from omniavatar.config.load import load_config
from omniavatar.engine.prepare import read_inputs

SKIN = (200, 140, 110)


@pytest.mark.parametrize("setting", ["convert", "ignore"])
def test_the_setting_decides_the_portrait(nano_checkpoint: Path, tmp_path: Path, setting: str) -> None:
    path = tmp_path / "phone.png"
    PIL.Image.new("RGB", (80, 80), SKIN).save(path, icc_profile=rgb_profile(P3, 2.2))
    pipeline = make_pipeline(nano_checkpoint, tmp_path / "cache", color_profile=setting)
    pixels = read_inputs(pipeline.models, request(image=path)).image
    right = SKIN if setting == "ignore" else in_srgb(SKIN, P3, 2.2)
    assert np.abs(pixels - np.array(right)).max() <= 1


def test_the_setting_changes_the_identity() -> None:
    convert, ignore = (load_config(None, {"color_profile": value}).config for value in ("convert", "ignore"))
    assert load_config(None, {}).config == convert
    assert config_hash(convert) != config_hash(ignore)
