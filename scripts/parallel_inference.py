"""Makes many videos on many GPUs; the same as `omniavatar batch`.

python scripts/parallel_inference.py --config configs/inference_1.3B_optimized.yaml \
    --input_file your_prompts.txt --gpus 0,1,2,3 --split_input [--per_gpu_jobs 2]
"""

import sys

from omniavatar.cli import command

if __name__ == "__main__":
    command(["batch", *sys.argv[1:]])
