"""`omniavatar download`, `make-checkpoint` and `convert`: get weights, make random ones, convert them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from omniavatar.cli.common import ConfigOption, HpOption, user_errors, whole_number


class Released(StrEnum):
    """Checkpoints with released weights."""

    large = "14B"
    small = "1.3B"
    livetalk = "livetalk"
    flashhead = "flashhead"
    leaptalk = "leaptalk"


class Scale(StrEnum):
    """Checkpoints that can be made with random weights."""

    nano = "nano"
    small = "1.3B"
    large = "14B"
    livetalk = "livetalk"
    livetalk_nano = "livetalk-nano"
    flashhead = "flashhead"
    flashhead_nano = "flashhead-nano"
    leaptalk = "leaptalk"
    leaptalk_nano = "leaptalk-nano"


def download(
    scale: Annotated[Released, typer.Argument(help="Model; its encoders are downloaded too.")],
    root: Annotated[Path, typer.Option(help="Folder for the models; the configs expect the default.")] = Path(
        "pretrained_models"
    ),
) -> None:
    """Download a model from the Hugging Face hub into the folders the configs expect.

    The command checks the free disk space first. Give it again to continue an interrupted download.
    """
    with user_errors(on_interrupt="interrupted; the same command continues the download"):
        from omniavatar.checkpoint.download import download as fetch
        from omniavatar.cli.terminal import say

        fetch(scale.value, root, report=say)
        say(f"{scale.value} is in {root}")


def make_checkpoint(
    scale: Annotated[Scale, typer.Option(help="Model; 14B takes about 70 GB of disk.")],
    out: Annotated[Path, typer.Option(help="Folder to write, such as pretrained_models/nano.")],
    seed: Annotated[
        int,
        typer.Option(
            parser=whole_number,
            metavar="<int>",
            help="Seed of the weights; the same seed gives the same bytes.",
        ),
    ] = 0,
) -> None:
    """Write a checkpoint with random weights in the official file layout, to test the engine.

    Its videos show noise.
    """
    with user_errors(on_interrupt="interrupted; the folder is incomplete, run the command again"):
        from omniavatar.checkpoint.synthetic import make_checkpoint as write
        from omniavatar.cli.terminal import say

        write(scale.value, out, seed=seed)
        say(f"{scale.value} checkpoint with random weights is in {out}")


def convert(
    config: ConfigOption,
    out: Annotated[
        Path, typer.Option(help="File to write, such as pretrained_models/avatar-14B-fp8.safetensors.")
    ],
    hp: HpOption = None,
) -> None:
    """Write the configured model into one file, with LoRAs merged and `dtype` and `quantize` applied.

    The file loads faster and with less memory than the original files. Results are the same.
    """
    with user_errors(on_interrupt="interrupted; nothing was written, run the command again"):
        from omniavatar.cli.terminal import say
        from omniavatar.config.load import load_config
        from omniavatar.engine.convert import convert_checkpoint
        from omniavatar.types import bytes_text

        done = convert_checkpoint(load_config(config, hp or ()).config, out)
        settings = "\n".join(
            f"{key}: {'null' if value is None else value}" for key, value in done.settings.items()
        )
        say(f"{done.path}: {bytes_text(done.num_bytes)}. To run it, set in the configuration:\n{settings}")
