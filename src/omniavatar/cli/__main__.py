"""`python -m omniavatar.cli`: the command line, for programs that start it without the `omniavatar` script."""

from __future__ import annotations

from omniavatar.cli.main import command

if __name__ == "__main__":
    command()
