"""The inference command of the original code, on this engine; the same as `omniavatar generate`.

torchrun --standalone --nproc_per_node=1 scripts/inference.py --config configs/inference.yaml \
    --input_file examples/infer_samples.txt [--hp=num_steps=25,seed=1]
"""

import sys

from omniavatar.cli import command

if __name__ == "__main__":
    command(["generate", *sys.argv[1:]])
