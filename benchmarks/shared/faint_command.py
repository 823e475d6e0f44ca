"""The `omniavatar` command with random decoders that paint faint pictures; see `inputs.py`.

    python -m benchmarks.shared.faint_command generate ...

`scaling_video` and `deadline` start it as a process, also under torchrun.
"""

import sys

from benchmarks.shared.inputs import paint_faintly
from omniavatar.cli import main

if __name__ == "__main__":
    paint_faintly()
    main(sys.argv[1:])
