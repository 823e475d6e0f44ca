"""Measures every configuration that can run on this machine; the same as `omniavatar benchmark`.

python scripts/speed_benchmark.py [--configs configs/inference_1.3B.yaml] [--repeats 5] [--full]
"""

import sys

from omniavatar.cli import command

if __name__ == "__main__":
    command(["benchmark", *sys.argv[1:]])
