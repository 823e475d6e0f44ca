"""Trains OmniAvatar-Pocket: `python -m training.run --stages vae=5 audio=3 dit=12 [--resume DIR] --out DIR`.

Run it in the repository root with `PYTHONPATH=src:.` (see `session`). This file imports nothing at its top,
because every worker process imports it again.
"""

if __name__ == "__main__":
    from training.session import main

    main()
