"""The command line: `app` is the Typer application, `command` the entry point of the `omniavatar` script."""

from __future__ import annotations

from omniavatar.cli.main import app, command, main

__all__ = ["app", "command", "main"]
