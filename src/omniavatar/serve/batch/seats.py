"""Assigns GPUs and threads to the workers of a batch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from omniavatar.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from omniavatar.serve.batch.ray_crew import Seats


@dataclass(frozen=True)
class WorkerOptions:
    """Command-line options about workers; the fields have the options' names."""

    gpus: str | None = None
    split_input: bool = False
    per_gpu_jobs: int = 1
    gpus_per_job: int = 1
    workers: int | None = None
    ray_address: str | None = None


@dataclass(frozen=True)
class WorkerPlan:
    """The workers of a batch and their hardware.

    workers: None for as many as the cluster can run.
    notes: messages for the user.
    pin: bind each worker on the CPU to cores that no other worker uses.
    """

    seats: Seats
    workers: int | None
    notes: tuple[str, ...] = ()
    pin: bool = False


def plan_workers(options: WorkerOptions) -> WorkerPlan:
    """The workers for these options. Raises ConfigError, ResourceError."""
    from omniavatar.serve.batch.ray_crew import Seats

    devices = options.gpus_per_job
    if devices > 1 and options.per_gpu_jobs > 1:
        raise ConfigError("--gpus-per-job, --per_gpu_jobs: both are larger than 1; set only one of them")
    if devices > 1 and sys.platform != "linux":
        raise ConfigError("--gpus-per-job: values above 1 need Linux; use 1 on this system")
    if options.gpus == "cpu":
        if options.per_gpu_jobs > 1:
            raise ConfigError("--per_gpu_jobs: does not work with --gpus cpu; use --workers")
        seats = Seats((), 0, devices, options.ray_address, devices)
        return WorkerPlan(seats, options.workers or (None if options.ray_address else 1))
    share = devices / options.per_gpu_jobs
    if options.ray_address is not None:
        if options.gpus not in (None, "all"):
            raise ConfigError(
                "--gpus: cannot select GPUs of a cluster by number; use --workers to run fewer workers"
            )
        return WorkerPlan(Seats((), share, devices, options.ray_address, devices), options.workers)
    if options.workers is not None:
        raise ConfigError(
            "--workers: works only with --gpus cpu or --ray-address; use --gpus and --per_gpu_jobs"
        )
    return _local_gpus(options, share)


def with_threads(plan: WorkerPlan, threads: int, pin: bool) -> WorkerPlan:
    """`plan` with `threads` per process of a CPU worker; with `pin`, bound to cores if there are enough."""
    from omniavatar.serve.batch.cores import bindable_cores

    seats, notes = plan.seats, plan.notes
    if seats.gpus_per_worker > 0:
        return plan
    seats = replace(seats, cpus_per_worker=threads * seats.devices)
    available = bindable_cores()
    needed = seats.cpus_per_worker * (plan.workers or 1) if seats.address is None else 1
    if pin and available and needed > available:
        notes = (*notes, f"{needed} threads share {available} cores: workers are not bound to cores")
    return replace(plan, seats=seats, notes=notes, pin=pin and needed <= available)


def _local_gpus(options: WorkerOptions, share: float) -> WorkerPlan:
    from omniavatar.serve.batch.ray_crew import Seats

    visible = _visible_gpus()
    if not visible:
        raise ResourceError("--gpus: this machine has no CUDA device; use --gpus cpu --workers N")
    devices = options.gpus_per_job
    chosen = visible if options.gpus in (None, "all") else _selected(options.gpus, visible)
    if len(chosen) < devices:
        raise ResourceError(
            f"--gpus-per-job {devices}: only {len(chosen)} selected ({', '.join(chosen)}); use a lower number"
        )
    used = len(chosen) - len(chosen) % devices
    why = f"--gpus-per-job {devices} does not divide {len(chosen)}"
    if options.gpus not in (None, "all") and not options.split_input and len(chosen) > devices:
        used, why = devices, f"only GPU {', '.join(chosen[:devices])} runs the queue; add --split_input"
    idle = chosen[used:]
    notes = (f"GPUs {', '.join(idle)} stay idle: {why}",) if idle else ()
    workers = used // devices * options.per_gpu_jobs
    threads = max(devices, (os.cpu_count() or 1) // workers)
    return WorkerPlan(Seats(chosen[:used], share, threads, devices=devices), workers, notes)


def _selected(text: str | None, visible: tuple[str, ...]) -> tuple[str, ...]:
    assert text is not None
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise ConfigError(f"--gpus {text}: must be all, cpu, or distinct numbers such as 0,1,2")
    missing = [number for number in numbers if int(number) >= len(visible)]
    if missing:
        raise ResourceError(
            f"--gpus {text}: this machine has no GPU {missing[0]}; choose from 0 to {len(visible) - 1}"
        )
    return tuple(visible[int(number)] for number in numbers)


def _visible_gpus() -> tuple[str, ...]:
    """The GPUs that torch can use, by their names in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    named = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return tuple(named[:count] if named else map(str, range(count)))
