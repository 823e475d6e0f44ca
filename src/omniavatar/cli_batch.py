"""`omniavatar batch`: many videos on many GPUs, through Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omniavatar.cli_common import (
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
from omniavatar.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from omniavatar.serve.batch.ray_crew import Seats
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
    from omniavatar.console_batch import make_batch_display

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

    from omniavatar.console_batch import print_summary

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


@dataclass(frozen=True)
class Wish:
    """What the user said about workers; fields as the options."""

    gpus: str | None = None
    split_input: bool = False
    per_gpu_jobs: int = 1
    gpus_per_job: int = 1
    workers: int | None = None
    ray_address: str | None = None


@dataclass(frozen=True)
class Choice:
    """workers: None takes as many as a cluster has room for. notes: lines for the user. pin: to own cores."""

    seats: Seats
    workers: int | None
    notes: tuple[str, ...] = ()
    pin: bool = False


def choose_seats(wish: Wish) -> Choice:
    """Workers and what each runs on. Raises ConfigError, ResourceError."""
    from omniavatar.serve.batch.ray_crew import Seats

    devices = wish.gpus_per_job
    if devices > 1 and wish.per_gpu_jobs > 1:
        raise ConfigError(
            "--gpus-per-job, --per_gpu_jobs: several GPUs a video and several videos a GPU; give one of them"
        )
    if devices > 1 and sys.platform != "linux":
        raise ConfigError("--gpus-per-job: needs Linux for more than 1")
    if wish.gpus == "cpu":
        if wish.per_gpu_jobs > 1:
            raise ConfigError("--per_gpu_jobs: there is no GPU with --gpus cpu; use --workers")
        seats = Seats((), 0, devices, wish.ray_address, devices)
        return Choice(seats, wish.workers or (None if wish.ray_address else 1))
    share = devices / wish.per_gpu_jobs
    if wish.ray_address is not None:
        if wish.gpus not in (None, "all"):
            raise ConfigError("--gpus: GPUs of a cluster have no numbers here; use --workers for fewer")
        return Choice(Seats((), share, devices, wish.ray_address, devices), wish.workers)
    if wish.workers is not None:
        raise ConfigError("--workers: is for --gpus cpu and --ray-address; use --gpus and --per_gpu_jobs")
    return _local_gpus(wish, share)


def with_threads(choice: Choice, threads: int, pin: bool) -> Choice:
    """The choice where each process of a worker on the CPU has `threads`, and with `pin` cores of its own."""
    from omniavatar.serve.batch.cores import cores_here

    seats, notes = choice.seats, choice.notes
    if seats.gpus_per_worker > 0:
        return choice
    seats = replace(seats, cpus_per_worker=threads * seats.devices)
    there = cores_here()
    wanted = seats.cpus_per_worker * (choice.workers or 1) if seats.address is None else 1
    if pin and there and wanted > there:
        notes = (*notes, f"{wanted} threads on {there} cores: workers have no cores of their own")
    return replace(choice, seats=seats, notes=notes, pin=pin and wanted <= there)


def _local_gpus(wish: Wish, share: float) -> Choice:
    from omniavatar.serve.batch.ray_crew import Seats

    visible = _visible_gpus()
    if not visible:
        raise ResourceError("--gpus: no CUDA device here; use --gpus cpu --workers N")
    devices = wish.gpus_per_job
    chosen = visible if wish.gpus in (None, "all") else _named(wish.gpus, visible)
    if len(chosen) < devices:
        raise ResourceError(
            f"--gpus-per-job {devices}: there are {len(chosen)} GPUs ({', '.join(chosen)}); use fewer a job"
        )
    used, why = len(chosen) - len(chosen) % devices, f"--gpus-per-job {devices} doesn't divide {len(chosen)}"
    if wish.gpus not in (None, "all") and not wish.split_input and len(chosen) > devices:
        used, why = devices, f"one queue on GPU {', '.join(chosen[:devices])}; add --split_input"
    idle = chosen[used:]
    notes = (f"GPUs {', '.join(idle)} stay idle: {why}",) if idle else ()
    workers = used // devices * wish.per_gpu_jobs
    threads = max(devices, (os.cpu_count() or 1) // workers)
    return Choice(Seats(chosen[:used], share, threads, devices=devices), workers, notes)


def _named(text: str | None, visible: tuple[str, ...]) -> tuple[str, ...]:
    assert text is not None
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise ConfigError(f"--gpus {text}: must be all, cpu, or different numbers such as 0,1,2")
    missing = [number for number in numbers if int(number) >= len(visible)]
    if missing:
        raise ResourceError(
            f"--gpus {text}: there is no GPU {missing[0]}, there are {len(visible)}; choose lower numbers"
        )
    return tuple(visible[int(number)] for number in numbers)


def _visible_gpus() -> tuple[str, ...]:
    """The GPUs torch can use, by their names in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    named = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return tuple(named[:count] if named else map(str, range(count)))
