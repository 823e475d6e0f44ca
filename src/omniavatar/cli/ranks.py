"""`omniavatar generate` in several processes, started by torchrun or by `--gpus`.

Every process runs the same command. Rank 0 reads inputs, decides, reports and writes; the other ranks follow
its orders. An error that hits all ranks (a wrong configuration) is reported once, by rank 0: the others wait
before they report and are killed meanwhile. An error of one rank is reported by that rank.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from omniavatar.cli.common import (
    INTERRUPT_NOTE,
    INTERRUPTED,
    LogFormat,
    print_error,
    print_json_error,
    report_bug,
    reporting,
    user_errors,
)
from omniavatar.errors import BUG, ConfigError, ResourceError
from omniavatar.text import one_line, quoted

if TYPE_CHECKING:
    from omniavatar.config.schema import PipelineConfig
    from omniavatar.engine.recorder import RunRecorder
    from omniavatar.parallel.process import Process
    from omniavatar.parallel.team import Team

OWN_GRACE_S = 3.0
"""How long another rank waits for rank 0 to report the same error first."""
LOST_GRACE_S = 8.0
"""How long a rank waits for its supervisor to kill it after a peer died, before it reports the loss."""


@contextmanager
def rank_reporting(
    log_format: LogFormat, quiet: bool
) -> Iterator[tuple[RunRecorder, Callable[[str], None], Process]]:
    """`reporting` and `user_errors` for a process that may be one rank of several."""
    from omniavatar.parallel.process import Process

    with user_errors(print_json_error if log_format is LogFormat.json else print_error):
        process = Process.from_environment()
    with reporting(log_format, quiet or not process.leads) as (recorder, report):

        def report_later(text: str) -> None:
            time.sleep(OWN_GRACE_S)
            report(f"rank {process.rank}: {text}")

        report_error = report if process.leads else report_later
        several = process.world > 1
        with (
            _hard_exit(process, report_error),
            user_errors(report_error, INTERRUPT_NOTE, passes=lambda error: several),
        ):
            yield recorder, report_error, process


@contextmanager
def _hard_exit(process: Process, report_error: Callable[[str], None]) -> Iterator[None]:
    """Kill this process on an error if the ranks are connected: a normal exit would wait for the peers."""
    try:
        yield
    except Exception as error:
        if process.world == 1:
            raise
        from omniavatar.parallel.process import exit_now, is_connected, lost_another

        if not is_connected():
            if isinstance(error, typer.Exit):
                raise
            report_bug(error, report_error)
            raise typer.Exit(BUG) from None
        code = BUG
        if isinstance(error, typer.Exit):
            code = error.exit_code
        elif lost_another(error):
            time.sleep(LOST_GRACE_S)
            reason = one_line(str(error))[:200]
            report_error(f"lost contact with another process ({reason}); run the command again")
            code = ResourceError.exit_code
        else:
            report_bug(error, report_error)
        exit_now(code)


def parse_gpus(text: str) -> list[int]:
    """Device numbers from `0,1` or `all`. Raises ConfigError."""
    if text.strip() == "all":
        import torch

        return list(range(torch.cuda.device_count())) or [0]
    parts = [part.strip() for part in text.split(",")]
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 6]
    if len(numbers) < len(parts):
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers):
        raise ConfigError(f"--gpus: {quoted(text)} is not a list of distinct device numbers; give 0,1 or all")
    return numbers


def config_for_rank(config: PipelineConfig, gpus: Sequence[int] | None, process: Process) -> PipelineConfig:
    """`config` with the device of this rank; with `gpus`, `sp_size` and `cfg_parallel` get values if unset.

    Raises ConfigError if the number of processes differs from the configured one.
    """
    runtime = config.runtime
    changes: dict[str, object] = {}
    if gpus is not None:
        from omniavatar.plan.sharing import shared_among

        config = shared_among(config, len(gpus), f"--gpus: lists {len(gpus)} GPUs")
        runtime = config.runtime
    elif runtime.processes != process.world:
        started = f"torchrun started {process.world} processes" if process.world > 1 else "1 process runs"
        raise ConfigError(
            f"sp_size: {started}, but sp_size x cfg_parallel is {runtime.processes}; use "
            f"--nproc_per_node={runtime.processes} or --hp=sp_size={process.world}"
        )
    if (gpus is not None or process.world > 1) and runtime.device != "cpu":
        if runtime.device not in ("auto", "cuda"):
            raise ConfigError(
                f"device: {runtime.device} is one GPU, but the run uses several; use device=auto or --gpus"
            )
        if gpus is not None and process.world not in (1, len(gpus)):
            raise ConfigError(
                f"--gpus: lists {len(gpus)} GPUs, but torchrun started {process.world} processes; "
                "remove --gpus"
            )
        changes["device"] = _device(gpus, process.local_rank)
    if not changes:
        return config
    from omniavatar.config.change import changed

    return changed(config, runtime=changes)


def _device(gpus: Sequence[int] | None, local_rank: int) -> str:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus is None:
        return f"cuda:{local_rank}" if count else "cpu"
    if not count:
        raise ResourceError(
            "--gpus: this machine has no CUDA device; leave --gpus out, or set --hp=device=cpu"
        )
    if max(gpus) >= count:
        raise ResourceError(f"--gpus: this machine has no GPU {max(gpus)}; choose from 0 to {count - 1}")
    return f"cuda:{gpus[local_rank]}"


def start_ranks(arguments: Sequence[str], gpus: Sequence[int]) -> None:
    """Run this command once per GPU. Raises typer.Exit with the code of the first process that fails."""
    from omniavatar.parallel.launch import launch

    names = [f"rank {rank} (GPU {gpu})" for rank, gpu in enumerate(gpus)]
    try:
        code = launch([sys.executable, "-m", "omniavatar.cli", *arguments], names)
    except KeyboardInterrupt:
        code = INTERRUPTED  # rank 0 was interrupted too and has reported it
    if code:
        raise typer.Exit(code)


@contextmanager
def team_of(config: PipelineConfig, process: Process) -> Iterator[Team]:
    """The connected processes of a video; at the end the leader orders the others to end."""
    from omniavatar.parallel.team import ONE

    if process.world == 1:
        yield ONE
        return
    from omniavatar.device import choose_device
    from omniavatar.engine.orders import EndOrder
    from omniavatar.parallel.process import connect, disconnect

    team = connect(process, choose_device(config.runtime.device))
    yield team
    if team.leads:
        team.order(EndOrder())
    team.meet()
    disconnect()
