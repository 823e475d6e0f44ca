"""`omniavatar doctor`: what this machine can run, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from omniavatar.assets import pocket
from omniavatar.cli.choose import CONFIGS
from omniavatar.cli.common import JsonOption, user_errors


def doctor(
    configs: Annotated[
        list[Path] | None,
        typer.Option("--configs", metavar="FILE|FOLDER", help="Configurations to check; default: configs/."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Report what this machine has, what it can run now, and how to get the rest.

    Lists devices, versions, backends, codecs, memory, disk and weights. It changes nothing.
    """
    with user_errors():
        from omniavatar.measure.benchmark.run import find_configs
        from omniavatar.measure.doctor import examine

        places = configs or [CONFIGS if CONFIGS.is_dir() else pocket.CONFIG]
        findings = examine(find_configs(places))
        if as_json:
            from omniavatar.cli.terminal import say_json

            say_json(findings)
        else:
            _print_findings(findings)


def _unavailable(backends: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each backend that is not available, with the reason."""
    missing = [row for row in backends if not row["available"]]
    return [f"{row['setting']}: {row['name']} ({row['reason']})" for row in missing] or ["none"]


def _print_findings(findings: dict[str, Any]) -> None:
    from omniavatar.cli.terminal import SafeConsole
    from omniavatar.types import bytes_text

    console = SafeConsole()

    def show(title: str, lines: Sequence[str]) -> None:
        console.print(f"[bold]{title}[/]")
        for line in lines:
            console.print(f"  {line}", soft_wrap=True, markup=False)

    def available(row: dict[str, Any]) -> str:
        return f"{'yes' if row['available'] else 'no ':<4}{row['name']}: {row['purpose']}"

    show(
        f"devices (auto: {findings['device']}, CUDA {findings['cuda'] or 'not in this torch'})",
        [
            f"{row['name']}: {row['model']} ({row['capability']}), "
            f"{bytes_text(row['free_bytes'])} of {bytes_text(row['total_bytes'])} free"
            for row in findings["devices"]
        ],
    )
    show("versions", [", ".join(f"{name} {value}" for name, value in findings["versions"].items())])
    show(
        "attention backends",
        [
            f"{dtype}: {', '.join(r['available'])} (auto: {r['auto']})"
            for dtype, r in findings["attention"].items()
        ],
    )
    show("threads that wait on the CPU", [findings["waiting_threads"]])
    show("video VAE", [f"auto: {findings['vae']}"])
    show("backends that cannot be used here", _unavailable(findings["backends"]))
    choices = findings["memory_auto"].items()
    show("memory: auto", [f"{scale}: {line.removeprefix('memory: ')}" for scale, line in choices])
    show("optional packages", [available(row) for row in findings["optional"]])
    encoder = findings["encoder"]
    show(
        "video and sound",
        [
            *(available(row) for row in findings["codecs"]),
            f"encoder auto: {encoder['auto']} (NVENC: {encoder['nvenc']})",
        ],
    )
    show("disk", [f"{bytes_text(row['free_bytes'])} free for {row['folder']}" for row in findings["disk"]])
    show("configurations", [_readiness(row) for row in findings["configs"]])
    fetched = {config for each in findings["fetch"] for config in each["configs"]}
    if others := [line for line in findings["problems"] if line.partition(": ")[0] not in fetched]:
        show("to do", others)
    if findings["fetch"]:
        show("to get the rest", [line for each in findings["fetch"] for line in _fetching(each)])
    show("you can run this now", findings["run_now"])


def _readiness(row: dict[str, Any]) -> str:
    """One line for a configuration: ready, or why not."""
    if row["ready"]:
        return f"{'ready':<10}{row['config']}"
    count = len(row["missing"])
    reason = f"{count} {'files' if count > 1 else 'file'} missing" if count else "see below"
    return f"{'not ready':<10}{row['config']} ({reason})"


def _fetching(found: dict[str, Any]) -> list[str]:
    """The command, and what it is for."""
    lines = []
    if found["files"]:
        lines.append(found["command"])
        lines.append(f"    {len(found['files'])} files for {', '.join(found['configs'])}")
    lines += [f"LoRA {lora}" for lora in found["loras"]]
    if found["loras"]:
        lines.append("    the comments of its configuration name the source")
    return lines
