"""Writes `portrait.heic` beside this file, as a phone would: Display P3, turned by EXIF.

Run `PYTHONPATH=tests python tests/data/make_portrait_heic.py`.
"""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pillow_heif

from colour_profiles import P3, rgb_profile

if __name__ == "__main__":
    pillow_heif.register_heif_opener()
    image = PIL.Image.new("RGB", (64, 48), (180, 60, 70))
    image.paste((60, 70, 180), (32, 0, 64, 48))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image.save(
        Path(__file__).with_name("portrait.heic"),
        quality=95,
        exif=exif.tobytes(),
        icc_profile=rgb_profile(P3, 2.2),
    )
