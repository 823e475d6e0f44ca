"""`omniavatar verify-provenance`: what the C2PA manifest of a file says, and whether it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omniavatar.cli.common import JsonOption, user_errors

if TYPE_CHECKING:
    from omniavatar.media.provenance import Provenance


def verify_provenance(
    file: Annotated[Path, typer.Argument(help="Video to check.")],
    trust: Annotated[
        Path | None,
        typer.Option(
            metavar="PEM", help="Certificates of the signers to trust, or of their authorities (PEM)."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print what the C2PA manifest of a video says, and whether it holds.

    It holds if the file is unchanged since it was signed and the signature is valid. Anybody can make a
    certificate, so who signed is known only with --trust. Nothing is fetched from the network.

    The command fails if the file has no manifest, if it does not hold, or if --trust does not name the
    signer.
    """
    with user_errors():
        from dataclasses import asdict

        from omniavatar.cli.terminal import say, say_json
        from omniavatar.errors import InputError
        from omniavatar.media.provenance import read_provenance

        found = read_provenance(file, anchors=trust)
        if as_json:
            say_json(asdict(found))
        else:
            for line in _lines(found):
                say(line)
        if not found.holds:
            raise InputError(
                f"{file}: its manifest does not hold ({'; '.join(found.problems)}); do not rely on it"
            )
        if found.trusted is False:
            raise InputError(f"{file}: {trust} does not name its signer, {found.signer}; do not rely on it")


def _lines(found: Provenance) -> Iterator[str]:
    yield f"manifest    {found.label}"
    yield f"holds       {'yes' if found.holds else 'no'}"
    known = {True: "trusted", False: "not trusted", None: "not checked; add --trust"}[found.trusted]
    yield f"signer      {found.signer} ({known}), {found.algorithm}"
    yield f"time stamp  {found.time or 'none'}"
    yield f"program     {found.generator}"
    for action in found.actions:
        parts = (action.name, action.source, action.agent and f"by {action.agent}", action.when)
        yield f"action      {', '.join(part for part in parts if part)}"
    for each in found.ingredients:
        inside = "its content is inside" if each.embedded else ""
        parts = (each.title, each.relationship, each.identity, inside)
        yield f"ingredient  {', '.join(part for part in parts if part)}"
        for problem in each.problems:
            yield f"            its own manifest does not hold: {problem}"
    for problem in found.problems:
        yield f"problem     {problem}"
