"""Joins two sessions that ran side by side: the DiT of one, the VAE's decoder of the other.

`python -m training.merge DIT_STATE DECODER_STATE OUT` reads folders that `training.run` wrote, both from the
same `--resume`, and writes a third one. The encoder must be the same, because the DiT was trained on its
latents.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from training.nets import Nets, load_state, save_state
from training.session import FOLDER, TOKENIZER

OF_THE_ENCODER = ("encoder.", "conv1.")


def merge(dit: Path, decoder: Path, out: Path) -> dict[str, Any]:
    """Write the joined state to `out`; returns its facts.

    Raises ValueError if the encoders of the two VAEs differ.
    """
    nets, other = (Nets.fresh(0, FOLDER / "assets" / TOKENIZER) for _ in range(2))
    facts, its_facts = load_state(nets, dit), load_state(other, decoder)
    weights = other.vae.state_dict()
    for name, value in nets.vae.state_dict().items():
        if name.startswith(OF_THE_ENCODER) and not torch.equal(value, weights[name]):
            raise ValueError(f"{decoder}: its encoder is not that of {dit}; resume both from one state")
    nets.vae.load_state_dict(weights)
    facts["log"] += [row for row in its_facts["log"] if row not in facts["log"]]
    facts["minutes"]["decoder"] = its_facts["minutes"]["decoder"]
    save_state(nets, facts, out)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dit", type=Path)
    parser.add_argument("decoder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    print(merge(arguments.dit, arguments.decoder, arguments.out)["minutes"])


if __name__ == "__main__":
    main()
