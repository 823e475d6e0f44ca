"""The small trained model that ships with the package: its weights, its config and a portrait to try it on.

`weights/` is what `training/export.py` writes; `pocket.yaml` is a copy of configs/pocket.yaml; `portrait.png`
is a rendered head that training never saw (`training/portraits.py`). See docs/pocket.md.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
CONFIG = FOLDER / "pocket.yaml"
PORTRAIT = FOLDER / "portrait.png"
PROMPT = "A person is talking to the camera, smiling, still"
