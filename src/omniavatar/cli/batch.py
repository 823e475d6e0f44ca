"""`omniavatar batch`: many videos on many GPUs, run by Ray."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
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
from omniavatar.errors import BUG, ConfigError, ResourceError
from omniavatar.serve.batch.seats import WorkerOptions, plan_workers, with_threads

if TYPE_CHECKING:
    from omniavatar.config.schema import PipelineConfig
    from omniavatar.serve.batch.crew import Crew
    from omniavatar.serve.batch.destination import Destination
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
    queue: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Give the videos to the queue of a server instead of own workers: its database "
            "(sqlite:///jobs.db, postgresql://...). The server's configuration of --queue-model makes them; "
            "of --config and --hp only the sampling values count.",
        ),
    ] = None,
    queue_files: Annotated[
        str | None,
        typer.Option("--queue-files", metavar="PLACE", help="Folder or URL of the server's job files."),
    ] = None,
    queue_model: Annotated[
        str | None, typer.Option("--queue-model", metavar="NAME", help="The server's name of the model.")
    ] = None,
    priority: Annotated[
        int | None, typer.Option(help="Of the jobs in the queue; higher ones come first (default 0).")
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
        wanted = _queue_options(queue, queue_files, queue_model, priority, options)
        plan = None if wanted else plan_workers(options)
        from omniavatar.config.load import load_config
        from omniavatar.config.values import expanded
        from omniavatar.engine.collisions import check_lines
        from omniavatar.engine.events import Message
        from omniavatar.engine.provenance import signer_of
        from omniavatar.engine.requests_file import read_requests
        from omniavatar.media.slug import slugify
        from omniavatar.plan.preview import with_family
        from omniavatar.plan.sharing import shared_among
        from omniavatar.serve.batch.destination import make_destination
        from omniavatar.serve.batch.pipelines import AvatarEngines, make_items, output_folder
        from omniavatar.serve.batch.ray_crew import RayCrew
        from omniavatar.serve.batch.rules import Rules
        from omniavatar.serve.batch.run import run_batch

        loaded = load_config(config, hp or ())
        shared_among(loaded.config, gpus_per_job, f"--gpus-per-job {gpus_per_job}")
        if plan is not None:
            plan = with_threads(plan, loaded.config.runtime.threads or 1, pin)
        else:
            _refuse_settings(loaded.origins)
        for warning in (*loaded.warnings, *(plan.notes if plan is not None else ())):
            recorder.event(Message(warning, "warning"))
        target = output or str(output_folder(loaded.config))
        stem = f"batch_{input_file.stem}"
        if "://" in target:
            default_run_dir = loaded.config.output.output_dir / f"{stem}_{slugify(target)}"
        else:
            default_run_dir = expanded(target, "--output") / stem
        folder = run_dir or default_run_dir
        videos = folder / "work" if "://" in target else expanded(target, "--output")
        lines = check_lines(
            read_requests(input_file, loaded.config.sampling, with_family(loaded.config).family.text),
            loaded.config,
            videos,
        )
        items = make_items(lines, loaded.config)
        destination = make_destination(target, folder / "work")
        open_crew: Callable[[], Crew]
        if plan is not None:
            if loaded.config.output.provenance:
                for note in signer_of(loaded.config.output).warnings:
                    recorder.event(Message(note, "warning"))
            engines, seats, count = AvatarEngines(loaded.config, plan.pin), plan.seats, plan.workers
            open_crew = lambda: RayCrew(seats, count, engines, destination)  # noqa: E731
        else:
            assert wanted is not None
            open_crew = _queue(*wanted, loaded.config, destination, folder / "work", len(items))
        with redirect_stdout(sys.stderr):  # Ray prints lost workers, but stdout holds the summary alone
            result = run_batch(
                items,
                open_crew,
                destination,
                folder,
                Rules(retries=retries, fresh=no_resume),
                recorder.event,
            )
    _print(result, quiet=quiet, as_json=as_json)
    _exit(result, report)


def _queue_options(
    url: str | None, files: str | None, model: str | None, priority: int | None, workers: WorkerOptions
) -> tuple[str, str, str, int] | None:
    """URL, files, model and priority of the queue; None without one. Raises ConfigError."""
    others = {"--queue-files": files, "--queue-model": model, "--priority": priority}
    if url is None:
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise ConfigError(f"{given[0]}: belongs to --queue; give the URL of the queue's database too")
        return None
    if files is None or model is None:
        raise ConfigError("--queue: needs --queue-files and --queue-model, as the server's configuration has")
    if workers != WorkerOptions():
        raise ConfigError("--queue: the server's workers make the videos; leave out --gpus, --workers, ...")
    return url, files, model, priority or 0


def _refuse_settings(origins: Mapping[str, str]) -> None:
    """Raise ConfigError for a setting of --hp that no server would read."""
    lost = [leaf for leaf, origin in origins.items() if origin == "--hp" and leaf.split(".")[0] != "sampling"]
    if lost:
        name = lost[0].split(".")[-1]
        raise ConfigError(
            f"--hp {name}: does not reach the workers of a queue; set it in the server's configuration"
        )


def _queue(
    url: str,
    files: str,
    model: str,
    priority: int,
    config: PipelineConfig,
    destination: Destination,
    work: Path,
    items: int,
) -> Callable[[], Crew]:
    try:
        from omniavatar.serve.jobs.queue_crew import QueueOrder, queue_crew
    except ImportError as error:
        raise ResourceError(
            f"--queue: the package {error.name} is missing; pip install 'omniavatar[serve]'"
        ) from None
    order = QueueOrder(model, config.sampling, priority, config.output.provenance)
    return queue_crew(url, files, order, destination, work, items)


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
