"""`omniavatar config show`: the effective values and their origins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omniavatar.cli.common import HpOption, JsonOption, user_errors


def show(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="YAML", help="Configuration file; without it, the defaults."),
    ] = None,
    hp: HpOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the meaning of each key.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show every config value and its origin: default, file and line, checkpoint, or --hp."""
    import json

    with user_errors():
        from omniavatar.config.identity import config_hash, flat_values
        from omniavatar.config.load import load_config
        from omniavatar.config.schema import PipelineConfig

        loaded = load_config(config, hp or ())
        values = flat_values(loaded.config)
        if as_json:
            report = {
                "values": values,
                "origins": dict(loaded.origins),
                "ignored": dict(loaded.ignored),
                "warnings": list(loaded.warnings),
                "hash": config_hash(loaded.config),
            }
            from omniavatar.cli.terminal import say_json

            say_json(report)
            return

        from rich.markup import escape
        from rich.table import Table

        from omniavatar.cli.terminal import SafeConsole

        table = Table(box=None, pad_edge=False)
        for name in ("key", "value", "from", *(["meaning"] if explain else [])):
            table.add_column(name, overflow="fold", header_style="bold", no_wrap=name == "key")
        for section in PipelineConfig.model_fields:
            for leaf, description in _leaves(section):
                key = f"{section}.{leaf}"
                value = json.dumps(values[key], ensure_ascii=False)
                shown = value if explain or len(value) <= 90 else f"{value[:87]}..."
                cells = [key, shown, loaded.origins[key], *([description] if explain else [])]
                table.add_row(*(escape(cell) for cell in cells))
        console = SafeConsole()
        console.print(table)
        for warning in loaded.warnings:
            console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
        console.print(f"hash of the values that affect the video: {config_hash(loaded.config)[:16]}")


def _leaves(section: str) -> list[tuple[str, str]]:
    from omniavatar.config.schema import PipelineConfig

    annotation = PipelineConfig.model_fields[section].annotation
    fields = getattr(annotation, "model_fields", {})
    return [(name, field.description or "") for name, field in fields.items()]
