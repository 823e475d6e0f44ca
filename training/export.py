"""Exports the trained networks to the files that the engine loads: bfloat16, with the released names.

`python -m training.export STATE_DIR OUT_DIR` writes `dit.safetensors` (merged, 33 channels, with audio
layers), `vae.safetensors`, `text_encoder.safetensors`, `google/umt5-xxl/` (tokenizer), `wav2vec/` (weights
and `config.json`), `config.yaml` for `omniavatar generate --config`, and `state.json`, from which
`training.run --resume OUT_DIR` continues. Every file is checked against the layout. With
`src/omniavatar/assets/pocket/weights` as OUT_DIR, the files replace the packaged model, whose configuration
is configs/pocket.yaml.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from omniavatar.checkpoint.layout import Shape, dit_tensors, text_tensors, wav2vec_tensors
from omniavatar.checkpoint.layout_files import TOKENIZER
from omniavatar.checkpoint.layout_vae import vae_tensors
from omniavatar.checkpoint.synthetic import wav2vec_config
from omniavatar.config.values import POCKET as POCKET_PATH
from omniavatar.config.values import POCKET_WEIGHTS
from omniavatar.encoders.audio import RENAMED
from omniavatar.encoders.text import BLOCK_KEYS, WHOLE_MODEL_KEYS
from training.nets import Nets, load_state
from training.scale import POCKET

ASSETS = Path(__file__).parent / "assets"
CONFIG = Path(__file__).parent.parent / "configs" / "pocket.yaml"


def config_text(folder: Path) -> str:
    """configs/pocket.yaml with the paths in `folder` and without input limits, which are measured later."""
    lines = [line for line in CONFIG.read_text().splitlines() if not line.startswith("input_limits")]
    return "\n".join(line.replace(": " + POCKET_PATH, f": {folder}/") for line in lines) + "\n"


def text_names() -> dict[str, str]:
    """The released names of the prompt encoder's tensors, by their names in transformers."""
    names = {library: released for released, library in WHOLE_MODEL_KEYS.items()}
    for block in range(POCKET.text.num_layers):
        names |= {f"block.{block}.{library}": f"blocks.{block}.{key}" for key, library in BLOCK_KEYS.items()}
    return names


def released(nets: Nets) -> dict[str, tuple[nn.Module, dict[str, str], Iterable[tuple[str, Shape]]]]:
    """For each file: the network, the network's tensor names by released name, and the required layout."""
    old_names = {library: key for key, library in RENAMED.items()}
    wav2vec = {f"wav2vec2.{old_names.get(name, name)}": name for name in nets.audio.wav2vec.state_dict()}
    used = [(key, shape) for key, shape in wav2vec_tensors(POCKET.wav2vec) if not key.startswith("lm_head")]
    text = {key: name for name, key in text_names().items()}
    same = {name: {key: key for key in getattr(nets, name).state_dict()} for name in ("dit", "vae")}
    return {
        "dit": (nets.dit, same["dit"], dit_tensors(POCKET.dit)),
        "vae": (nets.vae, same["vae"], vae_tensors(POCKET.vae)),
        "text_encoder": (nets.text.stack, text, text_tensors(POCKET.text)),
        "wav2vec/model": (nets.audio.wav2vec, wav2vec, used),
    }


def load_files(nets: Nets, folder: Path) -> list[str]:
    """Load the exported files below `folder` into `nets`; returns their names.

    Networks without a file keep their weights. Raises FileNotFoundError if no file exists.
    """
    read = []
    for name, (module, names, _) in released(nets).items():
        path = folder / f"{name}.safetensors"
        if path.is_file():
            module.load_state_dict({names[key]: value.float() for key, value in load_file(path).items()})
            read.append(name)
    if not read:
        raise FileNotFoundError(f"{folder}: contains neither a training state nor exported files")
    return read


def export(nets: Nets, out: Path) -> int:
    """Write all files below `out`; returns their size in bytes. Raises ValueError if a tensor differs from
    the layout."""
    for name, (module, names, layout) in released(nets).items():
        held = module.state_dict()
        weights = {key: held[library] for key, library in names.items()}
        expected = dict(layout)
        found = {key: tuple(value.shape) for key, value in weights.items()}
        if found != expected:
            raise ValueError(
                f"{name}: differs from the layout in {sorted(set(found.items()) ^ set(expected.items()))[:4]}"
            )
        path = out / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.to(torch.bfloat16).contiguous() for key, value in weights.items()}, path)
    (out / "wav2vec" / "config.json").write_text(json.dumps(wav2vec_config(POCKET.wav2vec), indent=2) + "\n")
    shutil.copytree(ASSETS / TOKENIZER, out / TOKENIZER, dirs_exist_ok=True)
    if out.resolve() != POCKET_WEIGHTS:
        (out / "config.yaml").write_text(config_text(out))
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("state", type=Path, help="folder that training.run wrote")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    nets = Nets.fresh(0, ASSETS / TOKENIZER)
    facts = load_state(nets, arguments.state)
    size = export(nets, arguments.out)
    (arguments.out / "state.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{arguments.out}: {size / 2**20:.1f} MiB, trained for {facts['minutes']} minutes")


if __name__ == "__main__":
    main()
