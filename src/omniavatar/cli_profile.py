"""`omniavatar profile | benchmark | doctor`: where the time goes, what this machine can do, what it has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omniavatar import pocket
from omniavatar.cli_common import (
    SOME_FAILED,
    ConfigOption,
    HpOption,
    JsonOption,
    print_error,
    print_warning,
    require_one_process,
    user_errors,
)

if TYPE_CHECKING:
    from omniavatar.config.schema import SamplingConfig
    from omniavatar.engine.requests_file import RequestLine

CONFIGS = Path("configs")


def profile(
    config: ConfigOption,
    input_file: Annotated[
        Path | None,
        typer.Option("--input_file", "--input-file", help="Requests: one prompt@@image@@audio a line."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One request instead: what the video shows.")] = None,
    image: Annotated[Path | None, typer.Option(help="Its portrait.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Its voice.")] = None,
    hp: HpOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the whole report as JSON.")
    ] = None,
    trace_file: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE", help="Write stages and steps as a Chrome trace (ui.perfetto.dev)."
        ),
    ] = None,
    torch_file: Annotated[
        Path | None,
        typer.Option(
            "--torch", metavar="FILE", help="Write torch.profiler's kernel trace of one window (slows it)."
        ),
    ] = None,
) -> None:
    """Make videos and report where the time went: stages, windows, steps, TFLOP/s, memory.

    Without --input_file and --prompt it takes the packaged portrait and voice. Videos go to
    <output_dir>/profile and are always made anew. A line that cannot be read is reported and left out.
    """
    if prompt is not None and (input_file is not None or image is None):
        raise typer.BadParameter("give --input_file, or --prompt with --image, or neither")
    if prompt is None and (image is not None or audio is not None):
        raise typer.BadParameter("--image and --audio belong to --prompt")
    with user_errors():
        require_one_process()
        from rich.console import Console

        from omniavatar.config.load import load_config
        from omniavatar.console import make_display
        from omniavatar.engine.requests_file import RequestLine
        from omniavatar.measure.profile import profile_requests
        from omniavatar.measure.report_table import print_report
        from omniavatar.media.atomic import check_writable

        for path in (json_file, trace_file, torch_file):
            if path is not None:
                check_writable(path.absolute().parent)
        loaded = load_config(config, hp or ())
        for warning in loaded.warnings:
            print_warning(warning)
        bad = 0
        with as_file(files("omniavatar.assets")) as assets:
            if input_file is not None:
                lines, bad = _lines(input_file, loaded.config.sampling)
            elif prompt is not None and image is not None:
                lines = [RequestLine(0, 0, prompt, image, audio)]
            else:
                lines = [RequestLine(0, 0, "A woman speaks", assets / "portrait.png", assets / "speech.flac")]
            with make_display("rich", False, sys.stderr) as display:
                run = profile_requests(loaded.config, lines, [display], torch_file)
        print_report(run.report, Console(highlight=False))
        _write_json(json_file, {"config": str(config), **run.report})
        _write_json(trace_file, run.trace)
        if bad:
            raise typer.Exit(SOME_FAILED)


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


def doctor(
    configs: Annotated[
        list[Path] | None,
        typer.Option("--configs", metavar="FILE|FOLDER", help="Configurations to check; default: configs/."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine has: devices, versions, attention backends, codecs, memory, disk, weights."""
    with user_errors():
        from omniavatar.measure.benchmark.run import find_configs
        from omniavatar.measure.doctor import examine

        places = configs or [CONFIGS if CONFIGS.is_dir() else pocket.CONFIG]
        findings = examine(find_configs(places))
        if as_json:
            import json

            typer.echo(json.dumps(findings, indent=2))
        else:
            _print_findings(findings)


def _lines(path: Path, configured: SamplingConfig) -> tuple[list[RequestLine], int]:
    """The usable requests of the file, and how many are not; those are reported."""
    from omniavatar.engine.requests_file import RequestLine, read_requests
    from omniavatar.errors import InputError

    usable: list[RequestLine] = []
    bad = 0
    for line in read_requests(path, configured):
        if isinstance(line, RequestLine):
            usable.append(line)
        else:
            print_error(str(line.error))
            bad += 1
    if not usable:
        raise InputError(f"{path}: no usable request; correct the lines named above")
    return usable, bad


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        from omniavatar.media.atomic import atomic_write_json

        atomic_write_json(path, content)


def _write(path: Path, text: str) -> None:
    from omniavatar.media.atomic import atomic_write_bytes

    atomic_write_bytes(path, text.encode())


def _print_findings(findings: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)

    def show(title: str, lines: Sequence[str]) -> None:
        console.print(f"[bold]{title}[/]")
        for line in lines:
            console.print(f"  {line}", soft_wrap=True, markup=False)

    def size(count: int) -> str:
        return f"{count / 2**30:.1f} GiB"

    def there(row: dict[str, Any]) -> str:
        return f"{'yes' if row['there'] else 'no ':<4}{row['name']}: {row['purpose']}"

    show(
        f"devices (auto: {findings['device']}, CUDA {findings['cuda'] or 'not in this torch'})",
        [
            f"{row['name']}: {row['model']} ({row['capability']}), "
            f"{size(row['free_bytes'])} of {size(row['total_bytes'])} free"
            for row in findings["devices"]
        ],
    )
    show("versions", [", ".join(f"{name} {value}" for name, value in findings["versions"].items())])
    show(
        "attention backends",
        [
            f"{dtype}: {', '.join(r['there'])} (auto: {r['auto']})"
            for dtype, r in findings["attention"].items()
        ],
    )
    show("video VAE", [f"auto: {findings['vae']}"])
    choices = findings["memory_auto"].items()
    show("memory: auto", [f"{scale}: {line.removeprefix('memory: ')}" for scale, line in choices])
    show("optional packages", [there(row) for row in findings["optional"]])
    encoder = findings["encoder"]
    show(
        "video and sound",
        [
            *(there(row) for row in findings["codecs"]),
            f"encoder auto: {encoder['auto']} (NVENC: {encoder['nvenc']})",
        ],
    )
    show("disk", [f"{size(row['free_bytes'])} free for {row['folder']}" for row in findings["disk"]])
    show(
        "configurations",
        [f"{'ready' if row['ready'] else 'not ready':<10}{row['config']}" for row in findings["configs"]],
    )
    show("to do" if findings["problems"] else "nothing to do", findings["problems"])
