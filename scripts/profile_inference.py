"""Measures the time of each stage of a run; the same as `omniavatar profile`.

torchrun --standalone --nproc_per_node=1 scripts/profile_inference.py \
    --config configs/inference_optimized.yaml \
    --input_file examples/infer_samples.txt [--json report.json] [--trace trace.json] [--torch kernels.json]
"""

import sys

from omniavatar.cli import command

if __name__ == "__main__":
    command(["profile", *sys.argv[1:]])
