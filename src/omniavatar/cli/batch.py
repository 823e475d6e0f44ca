"""`omniavatar batch`: many videos on many GPUs, run by Ray."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
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
from omniavatar.errors import BUG
from omniavatar.serve.batch.seats import WorkerOptions, plan_workers, with_threads

if TYPE_CHECKING:
    from omniavatar.serve.batch.run import BatchResult


def batch(
    config: ConfigOption,
    input_file: Annotated[
        Path,
        typer.Option(
            "--input_file",
            "--input-file",
            help="File with the requests: one prompt@@image@@audio per line, or .jsonl or .csv.",
        ),
    ],
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="all|0,1,...|cpu",
            help="all (default): every GPU. Numbers: these GPUs share the queue with --split_input; without "
            "it, only the first GPU (the first --gpus-per-job GPUs) is used. cpu: --workers processes.",
        ),
    ] = None,
    split_input: Annotated[
        bool,
        typer.Option(
            "--split_input",
            "--split-input",
            help="Share one queue among all GPUs in --gpus. Without it, the first GPU runs the whole queue "
            "(the original code ran the whole file on each GPU).",
        ),
    ] = False,
    per_gpu_jobs: Annotated[
        int,
        typer.Option(
            "--per_gpu_jobs", "--per-gpu-jobs", min=1, help="Workers per GPU; all must fit into its memory."
        ),
    ] = 1,
    gpus_per_job: Annotated[
        int,
        typer.Option(
            "--gpus-per-job",
            "--gpus_per_job",
            min=1,
            help="GPUs that make each video together, as with `generate --gpus`; sp_size and cfg_parallel "
            "set how they share the work.",
        ),
    ] = 1,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of workers with --gpus cpu (default 1; each has --hp=threads threads, default 1), "
            "or their maximum in a cluster.",
        ),
    ] = None,
    pin: Annotated[
        bool,
        typer.Option(
            help="With --gpus cpu on Linux: give each worker one core per thread that no other worker uses, "
            "if the machine has enough cores."
        ),
    ] = True,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            help="Join this Ray cluster (ray://head:10001) instead of starting Ray on this machine.",
        ),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Retries of a video that failed or was interrupted.")
    ] = 2,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder or fsspec URL (s3://...) for the videos; default: the config's output_dir.",
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            help="Folder for the state of each video and summary.json; default: batch_<input file> in the "
            "output folder, or in the config's output_dir if --output is a URL.",
        ),
    ] = None,
    hp: HpOption = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Make every video again, also finished ones.")
    ] = False,
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    log_format: LogOption = LogFormat.rich,
) -> None:
    """Make one video per request, on all GPUs: workers with loaded models share one queue.

    Give the same command again after an interruption: it skips finished videos, continues unfinished ones
    and retries failed ones. The run folder holds the state of each video and summary.json.
    """
    from omniavatar.cli.progress_batch import make_batch_display

    options = WorkerOptions(gpus, split_input, per_gpu_jobs, gpus_per_job, workers, ray_address)
    with reporting(log_format, quiet, make_batch_display) as (recorder, report), user_errors(report):
        require_one_process()
        plan = plan_workers(options)
        from omniavatar.config.load import load_config
        from omniavatar.config.values import expanded
        from omniavatar.engine.collisions import check_lines
        from omniavatar.engine.events import Message
        from omniavatar.engine.requests_file import read_requests
        from omniavatar.media.slug import slugify
        from omniavatar.plan.sharing import shared_among
        from omniavatar.serve.batch.destination import make_destination
        from omniavatar.serve.batch.pipelines import AvatarEngines, make_items, output_folder
        from omniavatar.serve.batch.ray_crew import RayCrew
        from omniavatar.serve.batch.rules import Rules
        from omniavatar.serve.batch.run import run_batch

        loaded = load_config(config, hp or ())
        shared_among(loaded.config, gpus_per_job, f"--gpus-per-job {gpus_per_job}")
        plan = with_threads(plan, loaded.config.runtime.threads or 1, pin)
        for warning in (*loaded.warnings, *plan.notes):
            recorder.event(Message(warning, "warning"))
        target = output or str(output_folder(loaded.config))
        stem = f"batch_{input_file.stem}"
        if "://" in target:
            default_run_dir = loaded.config.output.output_dir / f"{stem}_{slugify(target)}"
        else:
            default_run_dir = expanded(target, "--output") / stem
        folder = run_dir or default_run_dir
        videos = folder / "work" if "://" in target else expanded(target, "--output")
        lines = check_lines(read_requests(input_file, loaded.config.sampling), loaded.config, videos)
        items = make_items(lines, loaded.config)
        destination = make_destination(target, folder / "work")
        engines = AvatarEngines(loaded.config, plan.pin)
        with redirect_stdout(sys.stderr):  # Ray prints lost workers, but stdout holds the summary alone
            result = run_batch(
                items,
                lambda: RayCrew(plan.seats, plan.workers, engines, destination),
                destination,
                folder,
                Rules(retries=retries, fresh=no_resume),
                recorder.event,
            )
    _print(result, quiet=quiet, as_json=as_json)
    _exit(result, report)


def _print(result: BatchResult, *, quiet: bool, as_json: bool) -> None:
    from omniavatar.cli.progress_batch import print_summary
    from omniavatar.cli.terminal import SafeConsole, say, say_json

    if as_json:
        say_json(result.summary)
    elif quiet:
        for state in result.ledger.states.values():
            if state.state == "done" and state.key not in result.ledger.skipped:
                say(state.name)
    else:
        print_summary(result.summary, SafeConsole())


def _exit(result: BatchResult, report: Callable[[str], None]) -> None:
    """Exit with the code of the error that stopped the batch; for failed items 1, or 70 for a bug."""
    from omniavatar.serve.batch.items import is_bug

    if result.ledger.interrupted:
        report(INTERRUPT_NOTE)
        raise typer.Exit(INTERRUPTED)
    if result.ledger.error is not None:
        report(str(result.ledger.error))
        raise typer.Exit(result.ledger.error.exit_code)
    if result.summary["failed"]:
        failed = [state for state in result.ledger.states.values() if state.state == "failed"]
        bugs = sum(is_bug(state.error_class) for state in failed)
        note = f"; {bugs} of them met a bug, please report what it says there" if bugs else ""
        report(
            f"{result.summary['failed']} of {result.summary['items']} items failed; see {result.path}{note}"
        )
        raise typer.Exit(BUG if bugs else SOME_FAILED)
