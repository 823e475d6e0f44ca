"""`omniavatar calibrate`: measures step-cache constants or sparse attention on the configured model."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omniavatar.assets import PORTRAIT, SPEECH
from omniavatar.cli.common import (
    ConfigOption,
    HpOption,
    JsonOption,
    print_warning,
    require_one_process,
    user_errors,
)

if TYPE_CHECKING:
    from rich.table import Table

    from omniavatar.config.schema import PipelineConfig
    from omniavatar.measure.calibrate import CalibrationRun
    from omniavatar.measure.sparse_calibration import SparseCalibrationRun
    from omniavatar.types import AvatarRequest


class Mode(StrEnum):
    """What is measured."""

    steps = "steps"
    sparse = "sparse"


def calibrate(
    config: ConfigOption,
    mode: Annotated[
        Mode,
        typer.Option(
            help="steps: constants of the step caches. sparse: which blocks of the attention matrix matter."
        ),
    ] = Mode.steps,
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    image: Annotated[Path | None, typer.Option("--image", "--portrait", help="Portrait.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Voice; without it the video is silent.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input_file",
            "--input-file",
            help="With --mode sparse: file with the speakers to measure, who count equally: one "
            "prompt@@image@@audio per line, or .jsonl or .csv.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write; default: step_cache.json or sparse_attention.safetensors, beside the "
            "checkpoint.",
        ),
    ] = None,
    windows: Annotated[
        int,
        typer.Option(
            min=1,
            help="Windows to measure, of each speaker; steps: their median, sparse: their mean is used.",
        ),
    ] = 2,
    step_groups: Annotated[
        int,
        typer.Option(
            min=1, help="With --mode sparse: groups of consecutive steps, each with its own blocks."
        ),
    ] = 1,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Also run the first window by the plan and report error and seconds."),
    ] = False,
    hp: HpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what step caches or sparse attention need to know about this model, and write it to a file.

    Runs a few windows with every step computed and every block of attention. Without --prompt and --image,
    or --input_file, it takes the packaged portrait and voice. Later runs of the same model and schedule use
    the file: the constants of TeaCache and MagCache by step_cache_file: auto, the blocks that matter by
    sparse_attention: calibrated.
    """
    if (prompt is None) != (image is None):
        raise typer.BadParameter("give --prompt and --image, or neither for the packaged ones")
    if prompt is None and audio is not None:
        raise typer.BadParameter("--audio belongs to --prompt and --image")
    if input_file is not None and prompt is not None:
        raise typer.BadParameter("give either --input_file, or --prompt and --image")
    if mode is Mode.steps and input_file is not None:
        raise typer.BadParameter("--input_file belongs to --mode sparse")
    if mode is Mode.steps and step_groups != 1:
        raise typer.BadParameter("--step-groups belongs to --mode sparse")
    with user_errors():
        require_one_process()
        from omniavatar.cli.progress import make_display
        from omniavatar.config.load import load_config
        from omniavatar.measure.calibrate import calibrate as run
        from omniavatar.types import AvatarRequest

        loaded = load_config(config, hp or ())
        for warning in loaded.warnings:
            print_warning(warning)
        if prompt is not None and image is not None:
            request = AvatarRequest(prompt, image, audio)
        else:
            request = AvatarRequest("A woman speaks", PORTRAIT, SPEECH)
        if mode is Mode.sparse:
            from omniavatar.measure.sparse_calibration import calibrate_sparse

            speakers = [request] if input_file is None else _speakers(input_file, loaded.config)
            with make_display("rich", as_json, sys.stderr) as display:
                found = calibrate_sparse(
                    loaded.config, speakers, output, windows, step_groups, verify, [display]
                )
            _report_sparse(found, as_json)
            return
        with make_display("rich", as_json, sys.stderr) as display:
            done = run(loaded.config, request, output, windows, verify, [display])
        if as_json:
            from dataclasses import asdict

            from omniavatar.cli.terminal import say_json

            report = {
                "output": str(done.output),
                "seconds": done.seconds,
                "calibration": done.calibration.model_dump(mode="json"),
                "trials": [asdict(trial) for trial in done.trials],
                "verified": [asdict(row) for row in done.verified],
            }
            say_json(report)
        else:
            _print(done)


def _speakers(input_file: Path, config: PipelineConfig) -> list[AvatarRequest]:
    """The requests of an input file. Raises InputError for a line that cannot be used."""
    from dataclasses import asdict

    from omniavatar.engine.requests_file import BadLine, read_requests
    from omniavatar.errors import InputError
    from omniavatar.plan.preview import with_family

    speakers = []
    for line in read_requests(input_file, config.sampling, with_family(config).family.text):
        if isinstance(line, BadLine):
            raise line.error
        for name, value in asdict(line.sampling).items():
            if value is not None and name != "seed":
                raise InputError(
                    f"{input_file}:{line.line}: {name} cannot differ among speakers; take "
                    "it out of the line and set it in the config"
                )
        speakers.append(line.request())
    return speakers


def _report_sparse(done: SparseCalibrationRun, as_json: bool) -> None:
    from dataclasses import asdict

    from omniavatar.cli.terminal import SafeConsole, say_json

    if as_json:
        say_json(
            {
                "output": str(done.output),
                "seconds": done.seconds,
                "header": done.header.model_dump(mode="json"),
                "plans": [asdict(row) for row in done.plans],
                "verified": [asdict(row) for row in done.verified],
            }
        )
        return
    console = SafeConsole()
    header = done.header
    count, speakers = header.measured["windows"], header.measured.get("speakers", 1)
    whose = f" of {speakers} speakers," if speakers > 1 else ""
    grid = " x ".join(map(str, header.grid))
    console.print(
        f"{count} window{'s' if count > 1 else ''}{whose} of {grid} tokens in blocks of {header.block} "
        f"measured on {header.measured['device']} in {done.seconds:.1f} s; {header.dense_steps} of "
        f"{header.schedule.steps} steps stay dense",
        soft_wrap=True,
    )
    table = _table("sparse_density", "computed", "softmax kept", left=())
    for plan in done.plans:
        table.add_row(f"{plan.wanted:g}", f"{plan.density:.1%}", f"at least {plan.mass:.1%}")
    console.print(table)
    if done.verified:
        table = _table("attention", "computed", "seconds", "error", "PSNR", "SSIM", left=("attention",))
        table.title, table.title_justify = "the first window with another seed, against dense", "left"
        table.add_row("dense", "100.0%", f"{done.verified[0].dense_seconds:.2f}", "-", "-", "-")
        for row in done.verified:
            psnr = "equal" if row.psnr_db is None else f"{row.psnr_db:.1f} dB"
            figures = (f"{row.density:.1%}", f"{row.seconds:.2f}", f"{row.error:.2%}", psnr)
            table.add_row(row.attention, *figures, f"{row.ssim:.4f}")
        console.print(table)
    console.print(f"block masses written to {done.output}", soft_wrap=True, markup=False)


def _table(*heads: str, left: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right")
    return table


def _print(done: CalibrationRun) -> None:
    from rich.table import Table

    from omniavatar.cli.terminal import SafeConsole

    console = SafeConsole()
    schedule, fit = done.calibration.schedule, done.calibration.teacache
    count = done.calibration.measured["windows"]
    console.print(
        f"{count} window{'s' if count > 1 else ''} of {schedule.steps} steps measured on "
        f"{done.calibration.measured['device']} in {done.seconds:.1f} s"
    )
    for name, branch in done.calibration.branches.items():
        ratios = branch.magnitude_ratios[1:]
        console.print(
            f"{name}: magnitude ratios {min(ratios):.4f} to {max(ratios):.4f}, "
            f"changes {min(branch.changes[1:]):.3f} to {max(branch.changes):.3f}, "
            f"cosine distances to {max(branch.cosine_distances):.4f}",
            soft_wrap=True,
        )
    console.print(
        f"TeaCache: polynomial of degree {len(fit.polynomial) - 1} over time changes "
        f"{fit.fitted[0]:.4f} to {fit.fitted[1]:.4f}, RMS error {fit.rms_error:.0%} of the mean change",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for head in ("cache", "threshold", "steps computed", "estimated error", "pattern"):
        table.add_column(head, justify="left" if head in ("cache", "pattern") else "right")
    for trial in done.trials:
        computed = f"{trial.computed} of {schedule.steps}"
        table.add_row(trial.policy, f"{trial.threshold:g}", computed, f"{trial.error:.1%}", trial.pattern)
    console.print(table)
    for note in dict.fromkeys(note for trial in done.trials for note in trial.notes):
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    if done.verified:
        table = Table(box=None, pad_edge=False, title="measured on the first window", title_justify="left")
        for head in ("constants", "cache", "threshold", "steps computed", "seconds", "error", "PSNR"):
            table.add_column(head, justify="left" if head in ("constants", "cache") else "right")
        table.add_row("-", "none", "-", str(schedule.steps), f"{done.verified[0].full_seconds:.2f}", "-", "-")
        for row in done.verified:
            psnr = "equal" if row.psnr_db is None else f"{row.psnr_db:.1f} dB"
            cells = (f"{row.threshold:g}", str(row.computed), f"{row.seconds:.2f}", f"{row.error:.2%}", psnr)
            table.add_row(row.constants, row.policy, *cells)
        console.print(table)
    console.print(f"constants written to {done.output}", soft_wrap=True, markup=False)
