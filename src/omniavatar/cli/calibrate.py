"""`omniavatar calibrate`: measures step-cache constants on the configured model."""

from __future__ import annotations

import sys
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
    from omniavatar.measure.calibrate import CalibrationRun


def calibrate(
    config: ConfigOption,
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    image: Annotated[Path | None, typer.Option("--image", "--portrait", help="Portrait.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Voice; without it the video is silent.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; default: step_cache.json beside the checkpoint."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows to measure; their median is used.")] = 2,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Also run the first window by the plan and report error and seconds."),
    ] = False,
    hp: HpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the constants that TeaCache and MagCache need on this model, and write them to a file.

    Runs a few windows with every step computed. Without --prompt and --image it takes the packaged portrait
    and voice. Later runs of the same model and schedule use the file (step_cache_file: auto).
    """
    if (prompt is None) != (image is None):
        raise typer.BadParameter("give --prompt and --image, or neither for the packaged ones")
    if prompt is None and audio is not None:
        raise typer.BadParameter("--audio belongs to --prompt and --image")
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
