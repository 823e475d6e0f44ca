"""`omniavatar benchmark`: which configuration is fastest on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from omniavatar.assets import pocket
from omniavatar.cli.common import (
    SOME_FAILED,
    HpOption,
    print_error,
    require_one_process,
    user_errors,
)
from omniavatar.cli.profile import CONFIGS, _write, _write_json


def benchmark(
    configs: Annotated[
        list[Path] | None,
        typer.Option("--configs", metavar="FILE|FOLDER", help="What to measure; may be repeated."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for benchmark.md, .json and .html.")
    ] = Path("benchmark_out"),
    hp: HpOption = None,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, help="Untimed runs of each part.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each part.")] = 5,
    minutes: Annotated[
        str, typer.Option(help="Lengths of video to project, minutes, comma-separated.")
    ] = "1,5,10",
    forward_limit: Annotated[
        float,
        typer.Option("--forward-limit", min=0.001, help="Skip where one forward takes longer, seconds."),
    ] = 60.0,
    full: Annotated[
        bool,
        typer.Option("--full", help="Make whole videos too: real seconds, PSNR and SSIM of the step cache."),
    ] = False,
) -> None:
    """Measure every configuration that can run here, each in a process of its own, and rank them.

    Without --configs: those of the folder configs/, or the packaged nano model where there is none. Weights
    that are not on this disk are replaced by random ones, and the table says so.
    """
    with user_errors():
        require_one_process()
        from omniavatar.errors import ConfigError
        from omniavatar.measure.benchmark.page import html_page
        from omniavatar.measure.benchmark.row import Options
        from omniavatar.measure.benchmark.run import find_configs, measure_all
        from omniavatar.measure.benchmark.summary import markdown
        from omniavatar.media.atomic import check_writable

        try:
            lengths = tuple(float(text) for text in minutes.split(","))
        except ValueError:
            raise ConfigError(f"--minutes {minutes}: give numbers with commas between, such as 1,5") from None
        if min(lengths) <= 0:
            raise ConfigError(f"--minutes {minutes}: must be above 0")
        check_writable(output.absolute())
        places = configs or [CONFIGS if CONFIGS.is_dir() else pocket.CONFIG]
        options = Options("", "", tuple(hp or ()), warm_up, repeats, lengths, forward_limit, full)
        rows = measure_all(find_configs(places), options, lambda text: print(text, file=sys.stderr))
        result = {"benchmark": "speed", "warm_up": warm_up, "repeats": repeats, "rows": rows}
        text = markdown(result)
        _write_json(output / "benchmark.json", result)
        _write(output / "benchmark.md", text)
        _write(output / "benchmark.html", html_page(result))
        typer.echo(text)
        typer.echo(f"{output / 'benchmark.html'}, .md and .json")
        if not any(row["status"] == "measured" for row in rows):
            print_error("no configuration could be measured; the reasons are above")
            raise typer.Exit(SOME_FAILED)
