"""Exports the student and the small decoder to the files that the engine loads beside the packaged model.

`python -m training.export_live STUDENT_DIR TINY_DIR OUT_DIR` reads folders of `training.live` and writes
three files: `live.safetensors`, the student as differences from the packaged DiT; `live_decoder.safetensors`,
in bfloat16; and `live.yaml`, the configuration of both for `omniavatar live` and `generate`. If OUT_DIR is
the folder of the packaged weights, the configuration is `pocket_live.yaml` beside it, and in `configs/`.
The differences have the form of a LoRA file with whole deltas (`omniavatar.checkpoint.lora`) in float8,
because a second DiT in bfloat16 would double the package. A factor that is a power of two brings them into
float8's range; the strength takes it back.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniavatar.config.values import POCKET_WEIGHTS
from training.nets import load_shards

FLOAT8 = torch.float8_e4m3fn
HIGHEST = 448.0
"""Of float8 e4m3."""
STUDENT, DECODER, CONFIG = "live.safetensors", "live_decoder.safetensors", "live.yaml"
TEMPLATE = Path(__file__).parent / "configs" / "live_engine.yaml"
PACKAGED_CONFIGS = (
    POCKET_WEIGHTS.parent / "pocket_live.yaml",
    TEMPLATE.parents[2] / "configs" / "pocket_live.yaml",
)


def delta_key(name: str) -> str:
    """The name of the difference of a weight, as in published LoRA files."""
    layer, _, leaf = name.rpartition(".")
    roles = {"weight": f"{layer}.diff", "bias": f"{layer}.diff_b"}
    return roles.get(leaf, f"{name}.diff")


def differences(student: dict[str, Tensor], base: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The differences in float8, and the strength that makes the student of them.

    Raises ValueError if the two do not have the same weights.
    """
    if set(student) != set(base):
        raise ValueError(
            f"the student has other weights than its base: {sorted(set(student) ^ set(base))[:4]}"
        )
    changes = {name: student[name].float() - base[name].float() for name in student}
    most = max(float(change.abs().max()) for change in changes.values())
    strength = 2.0 ** math.ceil(math.log2(max(most, 1e-6) / HIGHEST))
    return {delta_key(name): (change / strength).to(FLOAT8) for name, change in changes.items()}, strength


def export(student: Path, tiny: Path, out: Path, weights: Path = POCKET_WEIGHTS) -> float:
    """Write all files below `out`; returns the strength of the student's differences.

    weights: the model that it was trained from.
    """
    changes, strength = differences(load_shards(student, "student"), load_file(weights / "dit.safetensors"))
    out.mkdir(parents=True, exist_ok=True)
    save_file(changes, out / STUDENT)
    decoder = {name: value.to(torch.bfloat16) for name, value in load_shards(tiny, "tiny").items()}
    save_file(decoder, out / DECODER)
    packaged = out.resolve() == POCKET_WEIGHTS.resolve()
    for path in PACKAGED_CONFIGS if packaged else (out / CONFIG,):
        path.write_text(config_text("pocket:" if packaged else f"{out.resolve()}/", strength))
    return strength


def config_text(place: str, strength: float) -> str:
    """The configuration for files at `place`, with a slash or a colon at its end."""
    return TEMPLATE.read_text().replace("live:", place, 2).replace("STRENGTH", repr(strength))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", type=Path, help="folder that `training.live student=...` wrote")
    parser.add_argument("tiny", type=Path, help="folder that `training.live tiny=...` wrote")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    strength = export(arguments.student, arguments.tiny, arguments.out)
    sizes = [(arguments.out / name).stat().st_size / 2**20 for name in (STUDENT, DECODER)]
    print(f"{STUDENT} {sizes[0]:.1f} MiB, strength {strength!r}; {DECODER} {sizes[1]:.2f} MiB")


if __name__ == "__main__":
    main()
