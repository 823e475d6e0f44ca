"""The `omniavatar` command with random decoders that paint faint pictures, for `scaling_video.py`.

    [torchrun --standalone --nproc_per_node=N] benchmarks/faint_command.py generate ...

Random decoders paint noise, which costs x264 five times what a face does; see `whole_video.py`.
"""

import sys

from whole_video import faint_vae

from omniavatar import vae_loading
from omniavatar.cli import main

if __name__ == "__main__":
    vae_loading.random_vae = faint_vae
    main(sys.argv[1:])
