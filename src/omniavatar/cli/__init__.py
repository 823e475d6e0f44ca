"""The command line. `app` is its Typer application, `command` the entry point of `omniavatar`."""

from __future__ import annotations

from omniavatar.cli.main import app, command, main

__all__ = ["app", "command", "main"]
