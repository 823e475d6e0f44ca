"""The small trained model in the package: weights, configuration and a portrait (docs/pocket.md).

`training/export.py` writes `weights/`, and `training/export_live.py` the files of live use beside them.
`pocket.yaml` and `pocket_live.yaml` are copies of those in configs/. `portrait.png` is a
rendered head outside the training data (`training/portraits.py`).
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
CONFIG = FOLDER / "pocket.yaml"
LIVE_CONFIG = FOLDER / "pocket_live.yaml"
PORTRAIT = FOLDER / "portrait.png"
PROMPT = "A person is talking to the camera, smiling, still"


def holds(*paths: Path | None) -> bool:
    """Whether one of these weight files is the packaged model's."""
    return any(path is not None and path.is_relative_to(FOLDER) for path in paths)
