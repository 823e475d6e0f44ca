"""Runs the Python that a README shows inside an `async def`, word by word, on a tiny model."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = {
    "num_steps": 1,
    "causal_block": 2,
    "causal_window": 4,
    "causal_sink": 0,
    "weights": "random",
    "scale": "nano",
    "device": "cpu",
    "dtype": "fp32",
    "image_sizes_720": [[64, 64]],
}


def place(folder: Path) -> None:
    """Write what the program finds in its folder: configs/livetalk.yaml, made tiny, and a portrait."""
    settings = yaml.safe_load((REPOSITORY / "configs/livetalk.yaml").read_text())
    settings = {name: value for name, value in settings.items() if not name.endswith("_path")}
    (folder / "configs").mkdir()
    (folder / "configs/livetalk.yaml").write_text(yaml.safe_dump({**settings, **TINY}))
    Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(folder / "face.png")


async def run(readme: Path, then: str, **names: Any) -> None:
    """Run the README's only Python, and `then` in the block that it ends with.

    names: what it takes as given.
    """
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.S)
    program = f"async def program():\n{textwrap.indent(code, '    ')}        {then}\n"
    exec(compile(program, str(readme), "exec"), names)
    await names["program"]()
