"""The small trained model in the package: weights, configuration and a portrait (docs/pocket.md).

`training/export.py` writes `weights/`. `pocket.yaml` is a copy of configs/pocket.yaml. `portrait.png` is a
rendered head outside the training data (`training/portraits.py`).
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
CONFIG = FOLDER / "pocket.yaml"
PORTRAIT = FOLDER / "portrait.png"
PROMPT = "A person is talking to the camera, smiling, still"
