"""Trains what live use needs beside the packaged model: `python -m training.live student=7.5 --out DIR`.

`tiny=8` in place of `student=7.5` trains the small decoder. Run it in the repository root with
`PYTHONPATH=src:.` (see `live_session`). This file imports nothing at its top, because every worker process
imports it again.
"""

if __name__ == "__main__":
    from training.live_session import main

    main()
