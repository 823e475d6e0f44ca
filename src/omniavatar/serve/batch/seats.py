"""Which workers of a batch get which GPUs and threads."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from omniavatar.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from omniavatar.serve.batch.ray_crew import Seats


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
