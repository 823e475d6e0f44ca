"""`omniavatar batch`: many videos on many GPUs, through Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omniavatar.cli.common import (
    INTERRUPT_NOTE,
    INTERRUPTED,
    SOME_FAILED,
    ConfigOption,
    HpOption,
    LogFormat,
    LogOption,
    QuietOption,
    reporting,
    require_one_process,
    user_errors,
)
from omniavatar.serve.batch.seats import Wish, choose_seats, with_threads

if TYPE_CHECKING:
    from omniavatar.serve.batch.run import BatchResult


def batch(
    config: ConfigOption,
    input_file: Annotated[
        Path,
        typer.Option(
            "--input_file",
            "--input-file",
            help="Requests: one prompt@@image@@audio a line, or .jsonl or .csv.",
        ),
    ],
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="all|0,1,...|cpu",
            help="all (default): every GPU; numbers: with --split_input these share the queue, without it "
            "the first of them (the first --gpus-per-job) works through it; cpu: --workers processes.",
        ),
    ] = None,
    split_input: Annotated[
        bool,
        typer.Option(
            "--split_input",
            "--split-input",
            help="Share one queue among all GPUs named in --gpus. Without it the original gave the whole "
            "file to each of them; here it is one queue on the first.",
        ),
    ] = False,
    per_gpu_jobs: Annotated[
        int,
        typer.Option(
            "--per_gpu_jobs", "--per-gpu-jobs", min=1, help="Workers on each GPU, if memory allows."
        ),
    ] = 1,
    gpus_per_job: Annotated[
        int,
        typer.Option(
            "--gpus-per-job",
            "--gpus_per_job",
            min=1,
            help="GPUs that make each video together, as `generate --gpus` does; sp_size and cfg_parallel "
            "say how.",
        ),
    ] = 1,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --gpus cpu (default 1, of one thread or --hp=threads), or the most in a cluster.",
        ),
    ] = None,
    pin: Annotated[
        bool,
        typer.Option(
            help="With --gpus cpu: bind each worker to as many cores of its own as it has threads, if there "
            "are enough (Linux)."
        ),
    ] = True,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address", help="Join this Ray cluster (ray://head:10001) instead of starting Ray here."
        ),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Further attempts at an item that failed or was cut.")
    ] = 2,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="Folder or fsspec URL (s3://...); default: the config's output_dir."
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            help="Folder of the items' states; default: batch_<input file> in the output folder, for a URL "
            "in the config's output_dir.",
        ),
    ] = None,
    hp: HpOption = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Make finished and half-finished items anew.")
    ] = False,
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    log_format: LogOption = LogFormat.rich,
) -> None:
    """Make a video of every request, on all GPUs at once: one warm engine a GPU, one shared queue.

    The same command goes on where it was cut: it skips what is done, continues half-made videos and tries
    again what failed. States and summary.json lie in the run folder.
    """
    from omniavatar.cli.progress_batch import make_batch_display

    wish = Wish(gpus, split_input, per_gpu_jobs, gpus_per_job, workers, ray_address)
    with reporting(log_format, quiet, make_batch_display) as (recorder, report), user_errors(report):
        require_one_process()
        choice = choose_seats(wish)
        from omniavatar.config.load import load_config
        from omniavatar.engine.requests_file import read_requests
        from omniavatar.media.slug import slugify
        from omniavatar.plan.sharing import shared_among
        from omniavatar.serve.batch.destination import make_destination
        from omniavatar.serve.batch.pipelines import AvatarEngines, make_items, output_folder
        from omniavatar.serve.batch.ray_crew import RayCrew
        from omniavatar.serve.batch.run import run_batch
        from omniavatar.serve.batch.scheduler import Rules

        loaded = load_config(config, hp or ())
        shared_among(loaded.config, gpus_per_job, f"--gpus-per-job {gpus_per_job}")
        choice = with_threads(choice, loaded.config.runtime.threads or 1, pin)
        for warning in (*loaded.warnings, *choice.notes):
            recorder.event("message", text=warning, level="warning")
        items = make_items(read_requests(input_file, loaded.config.sampling), loaded.config)
        target = output or str(output_folder(loaded.config))
        stem = f"batch_{input_file.stem}"
        if "://" in target:
            usual = loaded.config.output.output_dir / f"{stem}_{slugify(target)}"
        else:
            usual = Path(target).expanduser() / stem
        folder = run_dir or usual
        destination = make_destination(target, folder / "work")
        engines = AvatarEngines(loaded.config, choice.pin)
        result = run_batch(
            items,
            lambda: RayCrew(choice.seats, choice.workers, engines, destination),
            destination,
            folder,
            Rules(retries=retries, fresh=no_resume),
            recorder.event,
        )
    _print(result, quiet=quiet, as_json=as_json)
    _exit(result, report)


def _print(result: BatchResult, *, quiet: bool, as_json: bool) -> None:
    import json

    from rich.console import Console

    from omniavatar.cli.progress_batch import print_summary

    if as_json:
        typer.echo(json.dumps(result.summary, indent=2, ensure_ascii=False))
    elif quiet:
        for state in result.ledger.states.values():
            if state.state == "done" and state.key not in result.ledger.skipped:
                typer.echo(state.name)
    else:
        print_summary(result.summary, Console(highlight=False))


def _exit(result: BatchResult, report: Callable[[str], None]) -> None:
    """End with the code of what stopped the batch, or with 1 if items failed."""
    if result.ledger.interrupted:
        report(INTERRUPT_NOTE)
        raise typer.Exit(INTERRUPTED)
    if result.ledger.error is not None:
        report(str(result.ledger.error))
        raise typer.Exit(result.ledger.error.exit_code)
    if result.summary["failed"]:
        report(f"{result.summary['failed']} of {result.summary['items']} items failed; see {result.path}")
        raise typer.Exit(SOME_FAILED)
