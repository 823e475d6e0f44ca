"""`python -m omniavatar.cli`: the command line without the `omniavatar` script."""

from __future__ import annotations

from omniavatar.cli.main import command

if __name__ == "__main__":
    command()
