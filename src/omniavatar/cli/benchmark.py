"""`omniavatar benchmark`: which configuration is fastest on this machine."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from omniavatar.assets import pocket
from omniavatar.cli.choose import CONFIGS
from omniavatar.cli.common import (
    MOST_MINUTES,
    SOME_FAILED,
    HpOption,
    print_error,
    require_one_process,
    user_errors,
)


def benchmark(
    configs: Annotated[
        list[Path] | None,
        typer.Option("--configs", metavar="FILE|FOLDER", help="Configurations to measure; may be repeated."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for benchmark.md, .json and .html.")
    ] = Path("benchmark_out"),
    hp: HpOption = None,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, help="Untimed runs of each part.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each part.")] = 5,
    minutes: Annotated[
        str, typer.Option(help="Lengths of video to project, in minutes, separated by commas.")
    ] = "1,5,10",
    forward_limit: Annotated[
        float,
        typer.Option(
            "--forward-limit",
            min=0.001,
            help="Skip a configuration whose forward would take longer than this many seconds.",
        ),
    ] = 60.0,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Also make whole videos: measured seconds, PSNR and SSIM of the step cache."
        ),
    ] = False,
) -> None:
    """Measure every configuration that can run here, each in a new process, and rank them.

    Without --configs it takes those of the folder configs/, or the packaged pocket model without that folder.
    Weights that are not on this disk are replaced by random ones, and the table says so.
    """
    with user_errors(), ExitStack() as held:
        require_one_process()
        from omniavatar.cli.terminal import say
        from omniavatar.errors import ConfigError
        from omniavatar.measure.benchmark.page import html_page
        from omniavatar.measure.benchmark.row import Options
        from omniavatar.measure.benchmark.rows import BenchmarkResult
        from omniavatar.measure.benchmark.run import find_configs, measure_all
        from omniavatar.measure.benchmark.summary import markdown
        from omniavatar.measure.benchmark.target import own_reports
        from omniavatar.media.atomic import atomic_write_bytes, atomic_write_json
        from omniavatar.text import printable

        try:
            lengths = tuple(float(text) for text in minutes.split(","))
        except ValueError:
            raise ConfigError(f"--minutes {minutes}: give numbers separated by commas, such as 1,5") from None
        if not all(0 < length <= MOST_MINUTES for length in lengths):
            raise ConfigError(f"--minutes {minutes}: lengths are above 0 and at most {MOST_MINUTES:,}")
        held.enter_context(own_reports(output))
        places = configs or [CONFIGS if CONFIGS.is_dir() else pocket.CONFIG]
        options = Options("", "", tuple(hp or ()), warm_up, repeats, lengths, forward_limit, full)
        show = partial(print, file=sys.stderr)
        rows = measure_all(find_configs(places), options, lambda text: show(printable(text)))
        result = BenchmarkResult(warm_up, repeats, rows)
        text = markdown(result)
        atomic_write_json(output / "benchmark.json", result.as_dict())
        atomic_write_bytes(output / "benchmark.md", text.encode())
        atomic_write_bytes(output / "benchmark.html", html_page(result).encode())
        say(text)
        say(f"The reports are {output / 'benchmark.html'}, benchmark.md and benchmark.json.")
        if not result.measured:
            print_error("no configuration could be measured; the reasons are above")
            raise typer.Exit(SOME_FAILED)
