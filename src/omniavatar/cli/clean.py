"""`omniavatar clean`: lists and deletes what interrupted runs left on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omniavatar.cli.common import JsonOption, require_one_process, user_errors

CACHE_DAYS = 30.0
"""Cached prompts that are older are leftovers."""


def clean(
    place: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER|OUTPUT",
            help="Folder to search with the folders inside it, or one video's output path; default: this "
            "folder and the cache of prompts.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete what is listed.")] = False,
    cache: Annotated[
        bool,
        typer.Option("--cache", help="Also new cached prompts; without it, those older than 30 days."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List unfinished jobs and calibrations, previews, lock files and old cached prompts, with their sizes.

    The place is a folder with the folders inside it, or one video's output; without it, this folder and the
    cache of prompts.

    With --yes it deletes them. Files of others, finished videos, and jobs that run now are never deleted. An
    unfinished job that is deleted cannot be continued.
    """
    with user_errors():
        require_one_process()
        from omniavatar.cli.terminal import say, say_json
        from omniavatar.config.schema import RuntimeConfig
        from omniavatar.engine.leftovers import delete, find_leftovers
        from omniavatar.types import bytes_text

        days = 0.0 if cache else CACHE_DAYS
        found = find_leftovers(place or Path(), days)
        cached = RuntimeConfig().text_cache
        if place is None and cached is not None and cached.is_dir():
            found += [each for each in find_leftovers(cached, days) if each not in found]
        free = [each for each in found if each.holder is None]
        deleted = [each for each in free if yes and delete(each)]
        size = sum(each.size for each in (deleted if yes else free))
        if as_json:
            rows = [
                {
                    "kind": each.kind,
                    "paths": [str(path) for path in each.paths],
                    "bytes": each.size,
                    "holder": each.holder,
                    "deleted": each in deleted,
                }
                for each in found
            ]
            say_json({"leftovers": rows, "bytes": size})
            return
        for each in found:
            state = f"kept: {each.holder} uses it" if each.holder else "deleted" if each in deleted else ""
            paths = ", ".join(str(path) for path in each.paths)
            say("  ".join(part for part in (each.kind, bytes_text(each.size), paths, state) if part))
        count = len(deleted if yes else free)
        what = f"{count} leftover{'' if count == 1 else 's'}, {bytes_text(size)}"
        if not free:
            say("nothing to delete")
        elif yes:
            say(f"{what} deleted")
        else:
            say(f"{what}; add --yes to delete")
