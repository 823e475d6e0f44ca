"""The `omniavatar` command with random decoders that paint faint pictures, for `scaling_video.py`.

    [torchrun --standalone --nproc_per_node=N] benchmarks/faint_command.py generate ...

Random decoders paint noise, which costs x264 five times what a face does; see `whole_video.py`.
"""

import sys

from whole_video import paint_faintly

from omniavatar.cli import main

if __name__ == "__main__":
    paint_faintly()
    main(sys.argv[1:])
