"""`omniavatar download`, `make-checkpoint` and `convert`: where weights come from, and in which form."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from omniavatar.cli.common import ConfigOption, HpOption, user_errors


class Released(StrEnum):
    """Scales with released weights."""

    large = "14B"
    small = "1.3B"


class Scale(StrEnum):
    """Scales a synthetic checkpoint can have."""

    nano = "nano"
    small = "1.3B"
    large = "14B"


def download(
    scale: Annotated[Released, typer.Argument(help="Which model, with the encoders it needs.")],
    root: Annotated[Path, typer.Option(help="Folder of the models; the configs name this one.")] = Path(
        "pretrained_models"
    ),
) -> None:
    """Fetch a model's files from the Hugging Face hub into the layout the configs expect.

    Checks the free disk space first; an interrupted download goes on where it stopped.
    """
    with user_errors(on_interrupt="interrupted; the same command goes on with the download"):
        from omniavatar.checkpoint.download import download as fetch

        fetch(scale.value, root)
        typer.echo(f"{scale.value} is in {root}")


def make_checkpoint(
    scale: Annotated[Scale, typer.Option(help="Size of the model; 14B writes about 70 GB.")],
    out: Annotated[Path, typer.Option(help="Folder to write, such as pretrained_models/nano.")],
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
) -> None:
    """Write a checkpoint with random weights in exactly the official layout, to try the engine with.

    Its pictures are noise.
    """
    with user_errors(on_interrupt="interrupted; run the command again, the folder is not complete"):
        from omniavatar.checkpoint.synthetic import make_checkpoint as write

        write(scale.value, out, seed=seed)
        typer.echo(f"{scale.value} checkpoint with random weights is in {out}")


def convert(
    config: ConfigOption,
    out: Annotated[
        Path, typer.Option(help="File to write, such as pretrained_models/avatar-14B-fp8.safetensors.")
    ],
    hp: HpOption = None,
) -> None:
    """Write the configured model as one file: merged, in its dtype, quantised as `quantize` says.

    It loads faster than the originals and needs less memory for it; its results are the same.
    """
    with user_errors(on_interrupt="interrupted; nothing was written, run the command again"):
        from omniavatar.config.load import load_config
        from omniavatar.engine.convert import convert_checkpoint
        from omniavatar.types import bytes_text

        done = convert_checkpoint(load_config(config, hp or ()).config, out)
        settings = "\n".join(
            f"{key}: {'null' if value is None else value}" for key, value in done.settings.items()
        )
        typer.echo(
            f"{done.path}: {bytes_text(done.num_bytes)}. To run it, set in the configuration:\n{settings}"
        )
